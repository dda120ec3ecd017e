"""A cache of image features by the content of the pixels, so that no image is encoded twice."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from mipha.models.modeling import LlavaForConditionalGeneration

_IMAGES_AT_A_TIME = 8


class ImageFeatures:
    """A cache of image features; the ones used longest ago are dropped first.

    Args:
        model: Model whose tower and projector compute them.
        max_bytes: Size of the cache. An image of Mipha-3B takes 7.5 MB (729 tokens of 2,560
            float32).
    """

    def __init__(self, model: LlavaForConditionalGeneration, max_bytes: int = 256 * 2**20) -> None:
        self._model, self._max_bytes = model, max_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.num_encoded = self.num_found = 0

    @torch.inference_mode()
    def of(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Return the features `(tokens, width)` of each image.

        Args:
            pixels: Each `(1, 3, height, width)`, as the tower reads it.
        """
        # Look in the cache; an image that comes twice is encoded once.
        keys = [_key(image) for image in pixels]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: image for key, image in zip(keys, pixels, strict=True) if key not in found}
        self.num_found += len(found)
        self.num_encoded += len(missing)

        # Encode the others, a few at a time.
        todo = list(missing)
        for start in range(0, len(todo), _IMAGES_AT_A_TIME):
            part = todo[start : start + _IMAGES_AT_A_TIME]
            batch = torch.cat([missing[key] for key in part])  # (images, 3, height, width)
            made = self._model.get_image_features(batch).pooler_output  # images x (tokens, width)
            for key, features in zip(part, made, strict=True):
                found[key] = features.clone()  # a view would keep the whole batch alive

        for key in keys:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    @property
    def num_bytes(self) -> int:
        """Bytes in the cache now."""
        return sum(features.nbytes for features in self._kept.values())

    def _keep(self, key: bytes, features: Tensor) -> None:
        self._kept[key] = features
        self._kept.move_to_end(key)
        while self._kept and self.num_bytes > self._max_bytes:
            self._kept.popitem(last=False)


def _key(pixels: Tensor) -> bytes:
    content = pixels.detach().cpu().contiguous().view(torch.uint8).numpy()
    shape = str(tuple(pixels.shape)).encode()
    return hashlib.blake2b(shape + content.tobytes(), digest_size=16).digest()
