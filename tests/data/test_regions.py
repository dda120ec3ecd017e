"""Geometry of boxes and points, against goldens and against painted pixels."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from mipha.data.faults import RecordError
from mipha.data.images import read_size
from mipha.data.regions import (
    Numbers,
    Size,
    as_region,
    corners,
    crop,
    pad_to_square,
    reduce,
    resize,
    to_pixels,
    turn_upright,
)

GOLDEN = {
    case["case"]: case
    for case in json.loads((Path(__file__).parent / "field/geometry.json").read_text())["boxes"]
}


def _clip(numbers: Numbers, size: Size) -> tuple[Numbers, Size]:
    numbers, size = resize(numbers, size, (448, 336))
    return crop(numbers, (56, 0, 392, 336))[:2]


def _tile(numbers: Numbers, size: Size) -> tuple[Numbers, Size]:
    numbers, _ = pad_to_square(*resize(numbers, size, (768, 576)))
    return crop(numbers, (384, 0, 768, 384))[:2]


OPERATIONS: dict[int, Callable[[Numbers, Size], tuple[Numbers, Size]]] = {
    1: lambda box, size: (corners(box, "xywh"), size),
    2: lambda box, size: turn_upright(box, size, 6),
    3: lambda box, size: turn_upright(box, size, 2),
    4: lambda box, size: turn_upright(box, size, 5),
    5: pad_to_square,
    6: pad_to_square,
    7: lambda box, size: resize(*pad_to_square(box, size), (384, 384)),
    8: lambda box, size: resize(box, size, (384, 384)),
    9: _clip,
    10: _tile,
    11: lambda box, size: reduce(box, size, 2),
    12: lambda box, size: resize(box, size, (644, 420)),
}


@pytest.mark.parametrize("number", GOLDEN)
def test_goldens(number: int) -> None:
    case = GOLDEN[number]
    numbers, size = OPERATIONS[number](tuple(case["box_in"]), tuple(case["size_in"]))
    assert numbers == pytest.approx(case["box_out"], abs=0.01)
    assert size == tuple(case["size_out"])


def test_a_cut_box_says_what_is_left() -> None:
    numbers, _ = resize((20, 50, 300, 200), (640, 480), (448, 336))
    assert crop(numbers, (56, 0, 392, 336))[2] == pytest.approx(0.7857, abs=1e-4)
    numbers, _ = pad_to_square(*resize((420, 100, 700, 350), (800, 600), (768, 576)))
    assert crop(numbers, (384, 0, 768, 384))[2] == pytest.approx(0.8)
    assert crop((0, 0, 10, 10), (20, 20, 40, 40))[2] == 0
    assert crop((30, 30), (20, 20, 40, 40)) == ((10, 10), (20, 20), 1)
    assert crop((10, 30), (20, 20, 40, 40))[2] == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_is_what_pillow_does_to_a_painted_box(orientation: int) -> None:
    image = Image.new("L", (64, 48))
    ImageDraw.Draw(image).rectangle((10, 5, 29, 19), fill=255)  # pixels, both ends painted
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    with Image.open(buffer) as stored:
        upright = ImageOps.exif_transpose(stored)
    rows, columns = np.nonzero(np.asarray(upright))
    painted = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert turn_upright((10, 5, 30, 20), (64, 48), orientation) == (painted, upright.size)
    assert read_size(buffer.getvalue()) == (upright.size, (64, 48), orientation)


@pytest.mark.parametrize(
    ("given", "form"),
    [((10, 20, 30, 60), "xyxy"), ((10, 20, 20, 40), "xywh"), ((20, 40, 20, 40), "cxcywh")],
)
def test_formats(given: Numbers, form: str) -> None:
    assert corners(given, form) == (10, 20, 30, 60)


def test_scales_say_the_same_place() -> None:
    size = (200, 100)
    for scale, point in (
        ("pixels", (50, 25)),
        ("unit", (0.25, 0.25)),
        ("hundred", (25, 25)),
        ("thousand", (250, 250)),
        ("square", (0.25, 0.375)),
    ):
        assert to_pixels(point, scale, size) == pytest.approx((50, 25)), scale


def test_a_region_is_fractions_of_the_image() -> None:
    region = as_region((-0.9, 25, 200.4, 100), (200, 100), 0, "cat", "row 1")
    assert (region.numbers, region.label) == ((0, 0.25, 1, 1), "cat")


@pytest.mark.parametrize(
    ("numbers", "kind", "sentence"),
    [
        ((0, 0, 202, 50), "region-outside", "row 1: the region .* 200 x 100 pixels reaches"),
        ((0, 0, 90, 190), "region-outside", "inside with x and y exchanged"),
        ((50, 50, 40, 60), "region-empty", "has no area"),
        ((50, 50, 60, 50), "region-empty", "has no area"),
        ((float("nan"), 1), "region-outside", "is not finite"),
    ],
)
def test_what_cannot_be_meant_is_named(numbers: Numbers, kind: str, sentence: str) -> None:
    with pytest.raises(RecordError, match=sentence) as raised:
        as_region(numbers, (200, 100), 0, "", "row 1")
    assert raised.value.kind == kind
