"""Expressions and their boxes, and names and their points: RefCOCO's columns and PixMo-Points'.

    {"image": ..., "captions": ["the left cat", "a cat"], "bbox": [10, 20, 50, 80]}
    {"image": ..., "label": "cats", "points": [{"x": 50.0, "y": 25.0}]}

Each expression is a turn, and the box its answer. The columns do not say what their numbers are,
and published sets differ under the same names: `bbox_format` or `point_scale` must be in the
recipe. Detections (`objects` with `bbox` and `category`) are one turn that names all boxes.

Sources: lmms-eval's RefCOCO (xywh) and jxu124's (xyxy); the card of PixMo-Points, whose numbers
Molmo2 reads as 0 to 100
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mipha.data.dataset import DataSet
from mipha.data.datasets._images import is_list, short
from mipha.data.datasets._keys import Keys
from mipha.data.datasets._records import LINE_SUFFIXES, Row, Rows, put_images_first, record_rows
from mipha.data.datasets._regions import READS, list_of, read_region
from mipha.data.sample import REGION, Message, Sample

EXPRESSIONS = ("captions", "sentences", "expressions", "answer", "caption", "expression", "text")
"""Columns of what a box shows."""

NONE = "There are none."
"""Answer where nothing is to be pointed at. Source: Molmo2."""

DETECT = "Detect all objects."


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the records of a split; arguments and errors as in `messages`."""
    return record_rows("grounding", root, split, LINE_SUFFIXES, image_root)


def to_sample(row: Row) -> Sample:
    """Read one record.

    Raises:
        RecordError: It is none of the forms, the recipe does not say what its numbers are, or they
            cannot be meant.
    """
    content = row.content
    if not isinstance(content, Mapping) or not is_grounding(content):
        raise row.fault(
            "it has no expressions with a box, and no label with points",
            'wanted {"image": ..., "captions": [...], "bbox": [...]} '
            'or {"image": ..., "label": ..., "points": [...]}',
        )
    keys = row.keys()
    images = keys.take_images()
    if len(images) != 1:
        raise row.fault(f"it has {len(images)} images", "wanted one", "image-count")
    read = _read_points if content.get("points") is not None else _read_box
    if _has_detections(content):
        read = _read_objects
    turns, numbers, scale, labels = read(row, keys)
    turns = keys.with_marks(turns)
    sources = row.sources(images)
    regions = tuple(
        read_region(keys, row.reading, one, scale, sources, 0, label)
        for one, label in zip(numbers, labels, strict=True)
    )
    return row.sample(put_images_first(turns, 1), images, keys, regions)


def is_grounding(content: Mapping[str, Any]) -> bool:
    """Return whether a record has expressions and a box, a label and points, or detections."""
    if content.get("points") is not None:
        return isinstance(content.get("label"), str) and _pairs(content["points"]) is not None
    if _has_detections(content):
        return not any(
            content.get(name) is not None for name in ("messages", "conversations", "query")
        )
    box = content.get("bbox")
    name = _expressions_of(content)
    if not is_list(box) or len(box) != 4 or name is None:
        return False
    return content.get("question") is None or is_list(content[name])


def _has_detections(content: Mapping[str, Any]) -> bool:
    objects = content.get("objects")
    return isinstance(objects, Mapping) and "bbox" in objects and "category" in objects


def _expressions_of(content: Mapping[str, Any]) -> str | None:
    return next((name for name in EXPRESSIONS if content.get(name)), None)


_Read = tuple[list[Message], list[Any], str, list[str]]
"""Turns; numbers of each region; their scale; and what each shows."""


def _read_box(row: Row, keys: Keys) -> _Read:
    name = _expressions_of(row.content)
    assert name is not None
    keys.read.update((name, "bbox", *(("question",) if is_list(row.content[name]) else ())))
    _check_format(row, "bbox")
    said = row.content[name]
    texts = list(said) if is_list(said) else [said]
    if not texts or any(not isinstance(text, str) or not text.strip() for text in texts):
        raise row.fault(f"its {name} are {short(said)}", "wanted texts that are not empty")
    turns = [
        message
        for text in texts
        for message in (Message("user", text), Message("assistant", REGION))
    ]
    boxes = [list(row.content["bbox"])] * len(texts)
    return turns, boxes, row.reading.bbox_scale or "pixels", texts


def _read_points(row: Row, keys: Keys) -> _Read:
    scale = row.reading.point_scale
    if scale is None:
        raise row.fault(
            "its points may be pixels or of 0 to 100, which the data do not say",
            "say point_scale, such as point_scale=100 or point_scale=pixels",
            "region-scale",
        )
    label = row.content["label"]
    pairs, count = _pairs(row.content["points"]) or [], row.content.get("count")
    if isinstance(count, int) and count != len(pairs):
        raise row.fault(
            f"its count is {count}, and it has {len(pairs)} points",
            "give a point for each, or fix the count",
            "region-count",
        )
    keys.read.update(("label", "points", "count", "collection_method"))
    turns = [
        Message("user", f"Point to {label}."),
        Message("assistant", REGION * len(pairs) or NONE),
    ]
    return turns, pairs, scale, [label] * len(pairs)


def _read_objects(row: Row, keys: Keys) -> _Read:
    _check_format(row, "objects.bbox")
    keys.read.add("objects")
    objects = row.content["objects"]
    boxes, names = (list_of(keys, objects, name) for name in ("bbox", "category"))
    if len(boxes) != len(names) or any(not isinstance(name, str) for name in names):
        raise row.fault(
            f"its categories are {short(names)} for {len(boxes)} boxes",
            "wanted the name of each in words",
            "region-count",
        )
    said = "\n".join(f"{name} {REGION}" for name in names) or NONE
    turns = [Message("user", DETECT), Message("assistant", said)]
    return turns, boxes, row.reading.bbox_scale or "pixels", names


def _check_format(row: Row, column: str) -> None:
    if row.reading.bbox_format is None:
        raise row.fault(
            f"its {column} may be two corners, or corner and size, which the data do not say",
            "say bbox_format=xyxy or bbox_format=xywh",
            "region-scale",
        )


def _pairs(points: Any) -> list[list[Any]] | None:
    """Return x and y of each point: of a list of objects, or an object of lists."""
    if isinstance(points, Mapping) and is_list(points.get("x")) and is_list(points.get("y")):
        return [list(pair) for pair in zip_longest(points["x"], points["y"])]
    if is_list(points) and all(
        isinstance(one, Mapping) and {"x", "y"} <= set(one) for one in points
    ):
        return [[one["x"], one["y"]] for one in points]
    return None


DATASET = DataSet(
    "grounding", load, to_sample, takes_image_root=True, reads=(*READS, "point_scale")
)
