"""Image features by the content of the pixels: a picture that was seen lately is not encoded again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from mipha.models.modeling import LlavaForConditionalGeneration

_IMAGES_AT_A_TIME = 8


class ImageFeatures:
    """Features of pictures, the newest of them kept.

    Args:
        model: Whose tower and projector make them.
        max_bytes: How much is kept. One picture of Mipha-3B (729 tokens of 2,560 float32) takes 7.5 MB.
    """

    def __init__(self, model: LlavaForConditionalGeneration, max_bytes: int = 256 * 2**20) -> None:
        self._model, self._max_bytes = model, max_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.num_encoded = self.num_found = 0

    @torch.inference_mode()
    def of(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Features `(tokens, width)` of each picture.

        Args:
            pixels: Each `(1, 3, height, width)`, as the tower reads it.
        """
        keys = [_key(picture) for picture in pixels]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {
            key: picture for key, picture in zip(keys, pixels, strict=True) if key not in found
        }
        self.num_found += len(found)
        self.num_encoded += len(missing)
        todo = list(missing)
        for start in range(0, len(todo), _IMAGES_AT_A_TIME):
            part = todo[start : start + _IMAGES_AT_A_TIME]
            made = self._model.get_image_features(
                torch.cat([missing[key] for key in part])
            ).pooler_output
            found |= {
                key: features.clone() for key, features in zip(part, made, strict=True)
            }  # a view would keep the whole batch alive
        for key in keys:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    @property
    def num_bytes(self) -> int:
        """What is kept now."""
        return sum(features.nbytes for features in self._kept.values())

    def _keep(self, key: bytes, features: Tensor) -> None:
        self._kept[key] = features
        self._kept.move_to_end(key)
        while self._kept and self.num_bytes > self._max_bytes:
            self._kept.popitem(last=False)


def _key(pixels: Tensor) -> bytes:
    content = pixels.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(
        str(tuple(pixels.shape)).encode() + content.tobytes(), digest_size=16
    ).digest()
