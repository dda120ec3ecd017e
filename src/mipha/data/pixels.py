"""Images -> the pixels that a model takes, by the geometry of its processor.

    upright images --bounded--> strips padded --tiles, anyres, ...--> tensors by name

The tensors hold the tiles of all images in reading order, without padding tiles, so no image
needs to know its row.

Training reads bytes, a quarter of the memory, and scales them on its device:

    images --read_pixels(as_bytes=True)--> uint8 and their scaling --scale_pixels--> float32
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from mipha.geometry import Anyres, Geometry, Native, Shuffled, Tiles, geometry_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlavaProcessor

_BICUBIC = Image.Resampling.BICUBIC


def read_pixels(
    images: Sequence[Image.Image],
    processor: LlavaProcessor,
    counts: Sequence[int] | None = None,
    as_bytes: bool = False,
) -> dict[str, Tensor]:
    """Return the model's inputs for some images, at least one.

    Args:
        images: Upright RGB images, in reading order.
        processor: Processor of the model.
        counts: For each image, how many its conversation shows; None: each is alone.
        as_bytes: Whether pixels stay as they are until `scale_pixels`. Native images never do,
            because their padding is zeros of scaled pixels.

    Returns:
        `pixel_values`, float32: `(tiles, 3, height, width)`, of a native image `(tiles, patches,
        3 x patch x patch)`; and what its class takes beside them, such as `image_sizes`. As bytes,
        they are uint8, beside `pixel_scaling` `(3, 3)`: the byte that stands for 1, mean and
        deviation of each channel.
    """
    geometry = geometry_of(processor)
    counts = counts or [1] * len(images)
    make, mean = processor.image_processor, processor.image_processor.image_mean
    images = [bounded(image, geometry, mean) for image in images]

    scaling = scaling_of(make) if as_bytes and not isinstance(geometry, Native) else None
    if scaling is not None:
        unscaled = partial(make, do_rescale=False, do_normalize=False)
        return _inputs(images, geometry, unscaled, mean, counts) | {"pixel_scaling": scaling}
    return _inputs(images, geometry, make, mean, counts)


def scaling_of(image_processor: Any) -> Tensor | None:
    """Return how an image processor scales bytes, as `read_pixels`; None if it does otherwise."""
    rules = ("do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")
    if not all(getattr(image_processor, rule, None) for rule in rules):
        return None
    import torch  # who only prepares images for another engine has no use for it

    whole = [1 / image_processor.rescale_factor] * 3
    return torch.tensor([whole, list(image_processor.image_mean), list(image_processor.image_std)])


def scale_pixels(pixels: Tensor, scaling: Tensor) -> Tensor:
    """Return bytes as the float32 that the image processor makes of them, to the bit.

    Args:
        pixels: `(tiles, 3, height, width)`, uint8.
        scaling: `(3, 3)`, as `read_pixels` gives it, on the same device. A number in its place
            would be multiplied with on a GPU, where this divides.
    """
    whole, mean, deviation = scaling[:, :, None, None]  # each (3, 1, 1)
    return (pixels.float() / whole).sub_(mean).div_(deviation)


def _inputs(
    images: Sequence[Image.Image],
    geometry: Geometry,
    make: Any,
    mean: Sequence[float],
    counts: Sequence[int],
) -> dict[str, Tensor]:
    """Return what an image processor makes of images, cut as their geometry says."""

    if isinstance(geometry, Tiles):
        images = [
            tile
            for image, count in zip(images, counts, strict=True)
            for tile in cut_tiles(image, geometry, mean, count)
        ]
        return {"pixel_values": make(images, return_tensors="pt")["pixel_values"]}

    if isinstance(geometry, Shuffled):
        return {"pixel_values": make([images], return_tensors="pt")["pixel_values"][0]}

    if isinstance(geometry, Anyres):
        return _anyres(images, geometry, make, counts)

    return dict(make(images, return_tensors="pt"))


def as_tiles(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the tiles in the result of `read_pixels`, each `(3, height, width)`."""
    pixels = inputs["pixel_values"]
    if "spatial_shapes" not in inputs:
        return list(pixels)
    patch = math.isqrt(pixels.shape[-1] // 3)
    tiles = []
    for values, (high, wide) in zip(pixels, inputs["spatial_shapes"].tolist(), strict=True):
        patches = values[: high * wide].reshape(high, wide, patch, patch, 3)
        tiles.append(patches.permute(4, 0, 2, 1, 3).reshape(3, high * patch, wide * patch))
    return tiles


def bounded(image: Image.Image, geometry: Geometry, mean: Sequence[float]) -> Image.Image:
    """Return an image whose strip is not too long, its short side padded in the mean colour."""
    size = geometry.bounded_size(*image.size)
    if size == image.size:
        return image
    return _centred(image, size, mean)


def cut_tiles(
    image: Image.Image, geometry: Tiles, mean: Sequence[float], count: int = 1
) -> list[Image.Image]:
    """Return the tiles of an image row by row, each a square, and then the whole image."""
    rows, columns = geometry.grid(*image.size, count)
    if rows * columns == 1:
        return [image]

    # Fit it into the grid; the side that is free is rounded up.
    side = geometry.side
    canvas = (columns * side, rows * side)
    across, down = canvas[0] / image.width, canvas[1] / image.height
    if across < down:
        fitted = (canvas[0], min(math.ceil(image.height * across), canvas[1]))
    else:
        fitted = (min(math.ceil(image.width * down), canvas[0]), canvas[1])
    scaled = _centred(image.resize(fitted, _BICUBIC), canvas, mean)
    tiles = [
        scaled.crop((left, top, left + side, top + side))
        for top in range(0, canvas[1], side)
        for left in range(0, canvas[0], side)
    ]
    return [*tiles, image]


def as_square(
    image: Image.Image, side: int, mean: Sequence[float], pads: bool = True
) -> Image.Image:
    """Return a tile as the tower sees it: padded in the mean colour or squashed, and resized.

    Source: transformers 5.23 `LlavaImageProcessorPil`, whose pixels are the same.
    """
    longest = max(image.size)
    square = _centred(image, (longest, longest), mean) if pads else image
    return square if square.size == (side, side) else square.resize((side, side), _BICUBIC)


def _anyres(
    images: Sequence[Image.Image], geometry: Anyres, make: Any, counts: Sequence[int]
) -> dict[str, Tensor]:
    """Return tiles without padding tiles, and the sizes from which the class finds the grids."""
    import torch  # cutting tiles needs none, and is done in front of other programs too

    made = [
        # The stock processor gives one tile to each image of a list of several.
        make([[image, image]] if geometry.cap and count > 1 else [image], return_tensors="pt")
        for image, count in zip(images, counts, strict=True)
    ]
    inputs = {
        "pixel_values": torch.cat([one["pixel_values"][0] for one in made]),
        "image_sizes": torch.cat([one["image_sizes"][:1] for one in made]),
    }
    if geometry.cap is not None:
        inputs["batch_num_images"] = torch.tensor(counts)
    return inputs


def _centred(image: Image.Image, size: tuple[int, int], mean: Sequence[float]) -> Image.Image:
    if image.size == size:
        return image
    canvas = Image.new("RGB", size, tuple(int(255 * value) for value in mean))
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas
