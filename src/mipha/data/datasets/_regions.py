"""Regions of a record: placeholders of ms-swift, and what the recipe says about the numbers.

    {"messages": [... "Where is <ref-object>?" ... "At <bbox>." ...],
     "objects": {"ref": ["the cat"], "bbox": [[20, 15, 60, 45]]}}

Numbers are corners in pixels of the upright image, unless the recipe says another `bbox_format`,
`bbox_scale` or `bbox_frame`. Nothing is guessed: numbers that cannot be meant are an error.

Source: ms-swift, Custom-dataset.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from mipha.data.datasets._images import is_list, short
from mipha.data.faults import RecordError
from mipha.data.images import ImageSource, read_size
from mipha.data.regions import Numbers, Region, as_region, corners, to_pixels, turn_upright
from mipha.data.sample import REGION, Message
from mipha.recipe import ReadingRecipe

if TYPE_CHECKING:
    from mipha.data.datasets._keys import Keys

BBOX, REF = "<bbox>", "<ref-object>"
_PLACEHOLDER = re.compile(f"{BBOX}|{REF}")

READS = ("bbox_format", "bbox_scale", "bbox_frame")
"""Keys of the recipe about boxes."""


def place_regions(
    keys: Keys, reading: ReadingRecipe, messages: Sequence[Message], images: Sequence[ImageSource]
) -> tuple[list[Message], tuple[Region, ...]]:
    """Return turns with the words of `objects` and region markers for their placeholders.

    Args:
        keys: Keys of the record; `objects` counts as read where its placeholders are there.
        reading: What the recipe says about the numbers.
        messages: Turns of the record.
        images: Images of the record.

    Raises:
        RecordError: Placeholders and objects do not match, or numbers cannot be meant.
    """
    objects = keys.content.get("objects")
    text = "".join(message.text for message in messages)
    if not isinstance(objects, Mapping) or not _PLACEHOLDER.search(text):
        return list(messages), ()
    keys.read.add("objects")
    boxes, names, shown_in = (list_of(keys, objects, name) for name in ("bbox", "ref", "image_id"))
    if not all(isinstance(name, str) for name in names):
        raise keys.fault(f"the ref of its objects is {short(names)}", "wanted a list of texts")
    for marker, values in ((BBOX, boxes), (REF, names)):
        if text.count(marker) != len(values):
            raise keys.fault(
                f"its texts have {text.count(marker)} {marker} for {len(values)} of its objects",
                "each object needs one placeholder, in order",
                "region-count",
            )

    # Find the image and the numbers of each box; names stand beside the boxes in order.
    kind = objects.get("bbox_type")
    scales = {"norm1": "unit", "None": "pixels", "real": "pixels"}
    scale = reading.bbox_scale or scales.get(str(kind))
    if scale is None:
        raise keys.fault(
            f'its bbox_type is {short(kind)}, which is not "real" or "norm1"',
            "say bbox_scale",
            "region-scale",
        )
    shown_in = shown_in or [0] * len(boxes)
    if len(shown_in) != len(boxes):
        raise keys.fault(
            f"its objects have {len(shown_in)} image_id for {len(boxes)} bbox",
            "wanted the number of an image for each box",
            "region-count",
        )
    labels = names if len(names) == len(boxes) else [""] * len(boxes)
    regions = tuple(
        read_region(keys, reading, box, scale, images, number, label)
        for box, number, label in zip(boxes, shown_in, labels, strict=True)
    )

    # Put words and markers into the texts.
    left = iter(names)
    marked = [
        replace(
            message,
            text=_PLACEHOLDER.sub(
                lambda found: REGION if found.group() == BBOX else next(left), message.text
            ),
        )
        for message in messages
    ]
    return marked, regions


def list_of(keys: Keys, objects: Mapping[str, Any], name: str) -> list[Any]:
    """Return one of the lists of a record's `objects`; empty where it is not there.

    Args:
        keys: Keys of the record, for messages.
        objects: The lists by name.
        name: Name of the list.

    Raises:
        RecordError: It is something else.
    """
    value = objects.get(name)
    if value is not None and not is_list(value):
        raise keys.fault(
            f"the {name} of its objects is {short(value)}", "wanted a list", "region-count"
        )
    return list(value or ())


def read_region(
    keys: Keys,
    reading: ReadingRecipe,
    numbers: Any,
    scale: str,
    images: Sequence[ImageSource],
    number: int = 0,
    label: str = "",
) -> Region:
    """Return a box or point of a record.

    Args:
        keys: Keys of the record, for messages.
        reading: What the recipe says about the numbers.
        numbers: Four of a box in `reading.bbox_format`, or two of a point.
        scale: Unit of the numbers, as `ReadingRecipe.bbox_scale`.
        images: Images of the record.
        number: Which of them it is in.
        label: What it shows.

    Raises:
        RecordError: The numbers cannot be meant, or the image is not there.
    """
    if not is_list(numbers) or len(numbers) not in (2, 4) or not all(map(_is_number, numbers)):
        raise keys.fault(
            f"a region is {short(numbers)}",
            "wanted four numbers of a box, or two of a point",
            "region-scale",
        )
    if not isinstance(number, int) or not 0 <= number < len(images):
        raise keys.fault(
            f"a region is in image {number!r} of {len(images)} images",
            "count images from 0",
            "region-count",
        )
    given: Numbers = tuple(map(float, numbers))
    _check_scale(keys, given, scale)

    size, stored, orientation = _size(keys, images[number])
    if len(given) == 4:
        given = corners(given, reading.bbox_format or "xyxy")
    if reading.bbox_frame == "stored":
        pixels, _ = turn_upright(to_pixels(given, scale, stored), stored, orientation)
    else:
        pixels = to_pixels(given, scale, size)
    return as_region(pixels, size, number, label, keys.where, scale)


def _check_scale(keys: Keys, numbers: Numbers, scale: str) -> None:
    """Refuse numbers that are certainly of another scale."""
    largest = max(map(abs, numbers))
    if scale == "pixels" and largest <= 1:
        raise keys.fault(
            f"a region is {short(list(numbers))}, fractions where pixels are meant",
            "say bbox_scale=unit (point_scale for points), or fix the row",
            "region-scale",
        )
    if scale in ("unit", "square") and largest > 1.5:
        raise keys.fault(
            f"a region is {short(list(numbers))}, more than 1 where fractions are meant",
            "say bbox_scale=pixels or thousand (point_scale for points), or fix the row",
            "region-scale",
        )


def _size(keys: Keys, image: ImageSource) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Return the size of an image upright and as stored, and its orientation."""
    try:
        return read_size(image)
    except RecordError:
        raise
    except FileNotFoundError as error:
        raise keys.fault(str(error), "its regions need it", "missing-image") from error
    except ValueError as error:
        raise keys.fault(str(error), "its regions need it", "unreadable-image") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
