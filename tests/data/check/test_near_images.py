"""Pictures that look the same are found, however they were stored; others never are."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from mipha.data.check.linter import check_data
from mipha.data.check.near_images import NearImages, near_hashes
from mipha.data.dataset import data_recipe, load_data

FOLDER = Path(__file__).parents[1] / "field/contamination"


def _picture(seed: int) -> Image.Image:
    """Thirty ellipses of random colours on a gradient."""
    random = np.random.default_rng(seed)
    image = Image.linear_gradient("L").resize((320, 240)).convert("RGB")
    pen = ImageDraw.Draw(image)
    for _ in range(30):
        x, y, width, height = random.integers((0, 0, 20, 20), (320, 240, 120, 120))
        colour = tuple(random.integers(0, 256, 3).tolist())
        pen.ellipse((x - 40, y - 40, x - 40 + width, y - 40 + height), fill=colour)
    return image


def _as_jpeg(image: Image.Image, quality: int = 30) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "itself": lambda image: image,
    "jpeg": _as_jpeg,
    "half": lambda image: image.resize((160, 120)),
    "squashed": lambda image: image.resize((224, 224)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "padded": lambda image: ImageOps.pad(image, (336, 336), color="black"),
    "mirrored": ImageOps.mirror,
    "mirrored, padded and compressed": lambda image: _as_jpeg(
        ImageOps.pad(ImageOps.mirror(image), (320, 320), color="black"), 90
    ),
}


@pytest.fixture(scope="module")
def known() -> NearImages:
    return NearImages([near_hashes(_picture(seed)) for seed in range(40)])


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_picture_is_found(change: str, known: NearImages) -> None:
    found = [known.nearest(near_hashes(CHANGES[change](_picture(seed)))) for seed in range(40)]
    right = sum(one is not None and one[0] == seed for seed, one in enumerate(found))
    assert right >= 37, f"{change}: {right} of 40"


def test_other_pictures_are_not_found(known: NearImages) -> None:
    assert not any(known.nearest(near_hashes(_picture(seed))) for seed in range(40, 240))


def test_plain_pictures_look_like_nothing() -> None:
    white = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(white).rectangle((100, 100, 130, 120), outline="black")
    assert near_hashes(Image.new("RGB", (320, 240))) == ()
    assert near_hashes(_picture(0).resize((64, 64))) == () != near_hashes(_picture(0))
    assert NearImages([]).nearest(near_hashes(_picture(0))) is None
    known = NearImages([near_hashes(white)])
    assert known.nearest(near_hashes(Image.new("RGB", (320, 240), "white"))) is None


def test_another_aspect_is_another_picture(known: NearImages) -> None:
    assert known.nearest(near_hashes(_picture(0).resize((320, 120)))) is None


def test_a_check_names_rows_and_the_evaluation_image() -> None:
    expected = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
    data, against = (
        load_data(data_recipe(str(FOLDER / expected[key]))) for key in ("root", "against")
    )
    findings = check_data(data, against=against, workers=1).findings
    near = [found for found in findings if found.kind == "near-image"]
    assert [found.row for found in near] == expected["near_image"]
    assert "an image looks like image 'eval/0.png' of row 0 of eval.jsonl (" in near[0].what
    leaked = [found.row for found in findings if found.kind == "leaked-image"]
    assert leaked == expected["exact_pixels"]
