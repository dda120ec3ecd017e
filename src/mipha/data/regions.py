"""Boxes and points: where they are in an image, and where they are after the image is changed.

A `Region` has fractions of the upright image: origin at the top left, edges and not centres of
pixels, so no +1 and no -1. Every operation takes numbers and the size of the image in pixels, and
returns both as they are afterwards; operations are composed in the order that an image is made in:

    pad_to_square((100, 50, 300, 200), (640, 480)) -> (100, 130, 300, 280), (640, 640)
    resize(..., (384, 384))                        -> (60, 78, 180, 168), (384, 384)

Numbers are x1, y1, x2, y2 of a box or x, y of a point; sizes are width, height.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

from mipha.data.faults import RecordError

Numbers = tuple[float, ...]
Size = tuple[int, int]

_SLACK = 1.0
"""Pixels that a box may reach over the edge; rounding does that, and it is cut off."""


class Region(NamedTuple):
    """One box or one point.

    Args:
        image: Number of the image in its sample, from 0.
        numbers: x1, y1, x2, y2 or x, y: fractions of the upright image.
        size: Width and height of the upright image in pixels.
        label: What it shows.
    """

    image: int
    numbers: Numbers
    size: Size
    label: str = ""


# Conventions.


def corners(numbers: Numbers, form: str) -> Numbers:
    """Return x1, y1, x2, y2 of a box that is given as `xyxy`, `xywh` or `cxcywh`."""
    x, y, third, fourth = numbers
    if form == "xywh":
        return x, y, x + third, y + fourth
    if form == "cxcywh":
        return x - third / 2, y - fourth / 2, x + third / 2, y + fourth / 2
    return numbers


def to_pixels(numbers: Numbers, scale: str, size: Size) -> Numbers:
    """Return numbers of a scale as pixels of the image.

    Args:
        numbers: Of a box by its corners, or of a point.
        scale: As `ReadingRecipe.bbox_scale`; `square` is 0 to 1 of the image padded to a square.
        size: Of the image.
    """
    if scale == "pixels":
        return numbers
    if scale == "square":
        side = max(size)
        left, top = (side - size[0]) // 2, (side - size[1]) // 2
        return _map(numbers, lambda x: x * side - left, lambda y: y * side - top)
    unit = {"unit": 1, "hundred": 100, "thousand": 1000}[scale]
    return _map(numbers, lambda x: x / unit * size[0], lambda y: y / unit * size[1])


def as_region(
    numbers: Numbers, size: Size, image: int, label: str, where: str, scale: str = "pixels"
) -> Region:
    """Return a region of an image, after checking that it can be meant.

    Args:
        numbers: Pixels of the upright image: corners of a box, or a point.
        size: Of that image.
        image: Number of the image in its sample.
        label: What the region shows.
        where: File and row, for messages.
        scale: Unit that the data gave the numbers in.

    Raises:
        RecordError: It is outside of the image by more than a pixel, or has no area.
    """
    width, height = size
    xs, ys = numbers[::2], numbers[1::2]
    shown = f"{[round(number, 1) for number in numbers]} of an image of {width} x {height} pixels"
    if not all(map(isfinite, numbers)):
        raise RecordError(f"the region {shown} is not finite", "fix it", where, "region-outside")
    if min(numbers) < -_SLACK or max(xs) > width + _SLACK or max(ys) > height + _SLACK:
        swapped = max(xs) <= height + _SLACK and max(ys) <= width + _SLACK
        hint = ", and would be inside with x and y exchanged" if swapped else ""
        raise RecordError(
            f"the region {shown} reaches outside{hint}",
            f"fix it, or say what its numbers are: bbox_format, bbox_scale (now {scale})",
            where,
            "region-outside",
        )
    if len(numbers) == 4 and (numbers[2] <= numbers[0] or numbers[3] <= numbers[1]):
        raise RecordError(
            f"the box {shown} has no area",
            "fix it, or say what its numbers are: bbox_format",
            where,
            "region-empty",
        )
    unit = _map(
        numbers,
        lambda x: min(max(x / width, 0.0), 1.0),
        lambda y: min(max(y / height, 0.0), 1.0),
    )
    return Region(image, unit, size, label)


# Operations.


def turn_upright(numbers: Numbers, size: Size, orientation: int) -> tuple[Numbers, Size]:
    """Turn an image as stored upright.

    Args:
        numbers: In the image as stored.
        size: Of the image as stored.
        orientation: EXIF's, from 1 to 8.
    """
    width, height = size
    swaps = orientation >= 5
    turned: list[float] = []
    for x, y in zip(numbers[::2], numbers[1::2], strict=True):
        right, down = width - x, height - y
        turned += {
            1: (x, y),
            2: (right, y),
            3: (right, down),
            4: (x, down),
            5: (y, x),
            6: (down, x),
            7: (down, right),
            8: (y, right),
        }[orientation]
    xs, ys = sorted(turned[::2]), sorted(turned[1::2])
    ordered = tuple(number for pair in zip(xs, ys, strict=True) for number in pair)
    return ordered, (height, width) if swaps else size


def pad_to_square(numbers: Numbers, size: Size) -> tuple[Numbers, Size]:
    """Pad an image to a centred square; an odd rest goes to the right or below."""
    side = max(size)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    return _map(numbers, lambda x: x + left, lambda y: y + top), (side, side)


def resize(numbers: Numbers, size: Size, to: Size) -> tuple[Numbers, Size]:
    """Resize an image, also to another aspect."""
    across, down = to[0] / size[0], to[1] / size[1]
    return _map(numbers, lambda x: x * across, lambda y: y * down), to


def reduce(numbers: Numbers, size: Size, factor: int) -> tuple[Numbers, Size]:
    """Average squares of `factor` pixels a side to one, as `images.upright_rgb` does."""
    to = (-(-size[0] // factor), -(-size[1] // factor))
    return _map(numbers, lambda x: x / factor, lambda y: y / factor), to


def crop(numbers: Numbers, window: Numbers) -> tuple[Numbers, Size, float]:
    """Cut a window out of an image, such as a tile.

    Args:
        numbers: In the whole image.
        window: x1, y1, x2, y2 of the window, whole pixels.

    Returns:
        Numbers in the window; its size; and the share of the box's area, or of the point, that is
        left: 0 where nothing is, and the numbers then are of no use.
    """
    left, top, right, bottom = window
    width, height = right - left, bottom - top
    moved = _map(numbers, lambda x: x - left, lambda y: y - top)
    cut = _map(moved, lambda x: min(max(x, 0.0), width), lambda y: min(max(y, 0.0), height))
    size = round(width), round(height)
    if len(numbers) == 2:
        return cut, size, float(cut == moved)
    return cut, size, area(cut) / area(numbers)


def area(box: Numbers) -> float:
    """Return the area of a box, 0 where its corners are in the wrong order."""
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _map(numbers: Numbers, of_x, of_y) -> Numbers:  # type: ignore[no-untyped-def]
    return tuple(
        of_y(number) if place % 2 else of_x(number) for place, number in enumerate(numbers)
    )
