"""Image features of any of the classes, and a cache of them by the content of the pixels."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mipha.models.modeling import LlavaForConditionalGeneration

_IMAGES_AT_A_TIME = 8


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """One image as the model reads it.

    Args:
        inputs: Arguments of `get_image_features` by name: `pixel_values` of all its tiles, and what
            the class takes beside them.
        num_tokens: Image tokens that it becomes.
    """

    inputs: Mapping[str, Tensor]
    num_tokens: int

    def to(self, device: torch.device | str, dtype: torch.dtype) -> ImageInputs:
        """Return it on a device, its pixels in a dtype."""
        moved = {
            name: value.to(device, dtype if name == "pixel_values" else None)
            for name, value in self.inputs.items()
        }
        return ImageInputs(moved, self.num_tokens)


def image_features(
    model: LlavaForConditionalGeneration, images: Sequence[ImageInputs]
) -> list[Tensor]:
    """Return the features `(tokens, width)` of each image; all tiles pass the tower together."""
    # Tiles that are whole images of several have rules of their own in LLaVA-OneVision.
    alone = [_is_alone(image) for image in images]
    found: dict[int, Tensor] = {}
    for kind in set(alone):
        places = [place for place, is_alone in enumerate(alone) if is_alone == kind]
        inputs = join_inputs([images[place].inputs for place in places])
        if not kind:
            # The class asks how many images a sample shows, and does not cut two or more.
            inputs["batch_num_images"] = torch.tensor([max(2, len(places))])
        made = torch.cat(list(model.get_image_features(**inputs, return_dict=True).pooler_output))
        sizes = [images[place].num_tokens for place in places]
        if len(made) != sum(sizes):
            raise ValueError(
                f"the tower makes {len(made)} tokens of these images, and the processor writes "
                f"{sum(sizes)}: save processor and model from one build"
            )
        found |= zip(places, made.split(sizes), strict=True)
    return [found[place] for place in range(len(images))]


def join_inputs(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the inputs of several images as one; native ones are padded to the longest."""
    joined = {}
    for name in images[0]:
        values = [image[name] for image in images]
        longest = max(value.shape[1] for value in values) if values[0].dim() > 1 else 0
        joined[name] = torch.cat(
            [
                F.pad(value, (*(0, 0) * (value.dim() - 2), 0, longest - value.shape[1]))
                if longest
                else value
                for value in values
            ]
        )
    return joined


def _is_alone(image: ImageInputs) -> bool:
    counts = image.inputs.get("batch_num_images")
    return counts is None or int(counts[0]) == 1


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
    def of(self, images: Sequence[ImageInputs]) -> list[Tensor]:
        """Return the features `(tokens, width)` of each image."""
        # Look in the cache; an image that comes twice is encoded once.
        keys = [_key(image) for image in images]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
        self.num_found += len(found)
        self.num_encoded += len(missing)

        # Encode the others, a few at a time.
        todo = list(missing)
        for start in range(0, len(todo), _IMAGES_AT_A_TIME):
            part = todo[start : start + _IMAGES_AT_A_TIME]
            made = image_features(self._model, [missing[key] for key in part])
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


def _key(image: ImageInputs) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(image.inputs.items()):
        content = value.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest.update(f"{name} {tuple(value.shape)}".encode() + content.tobytes())
    return digest.digest()
