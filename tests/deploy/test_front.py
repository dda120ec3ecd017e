"""What another program is sent of a picture is what the model was trained to see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mipha.data.pixels import read_pixels
from mipha.data.sample import IMAGE, Message
from mipha.deploy.front import Front, front_of, front_of_gguf
from mipha.deploy.gguf.header import PROCESSOR
from mipha.geometry import Native, Square, Tiles, geometry_of
from mipha.models.build import load_parts_processor
from mipha.models.processing import NativeImageProcessor

SIZES = ((28, 28), (40, 30), (97, 41), (9, 200), (1, 1), (300, 170), (350, 350))


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def settings(processor: object, tmp_path: Path) -> dict:
    processor.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    return json.loads((tmp_path / "processor_config.json").read_text())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pads", [True, False])
def test_tiles_are_the_pixels_of_the_processor(
    tiny_parts: Callable, tmp_path: Path, size: tuple[int, int], pads: bool
) -> None:
    processor = load_parts_processor(tiny_parts().recipe(image="tiles"))
    processor.image_processor.do_pad = pads
    front, image = front_of(settings(processor, tmp_path)), picture(*size)
    sent = front.cut(image)
    assert {tile.size for tile in sent} == {(28, 28)}
    again = read_pixels(sent, processor)["pixel_values"]  # each tile is left as it is
    assert torch.equal(again, read_pixels([image], processor)["pixel_values"])


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_native_pictures_keep_the_size_that_they_are_sent_in(
    tiny_parts: Callable, tmp_path: Path, resample: Image.Resampling
) -> None:
    processor = load_parts_processor(tiny_parts().recipe(image="native"))
    processor.image_processor = NativeImageProcessor(
        processor.image_processor.to_dict() | {"resample": int(resample)}
    )
    processor._settings["image_processor"] = processor.image_processor.to_dict()
    front = front_of(settings(processor, tmp_path))
    for size in SIZES:
        (sent,) = front.cut(picture(*size))
        again = read_pixels([sent], processor)["pixel_values"]
        assert torch.equal(again, read_pixels([picture(*size)], processor)["pixel_values"])
        assert all(side % 28 == 0 for side in sent.size)
    (sent,) = front.cut(picture(350, 350))
    assert sent.size == (336, 336), "12.5 tokens a side are 12, and 13 in llama.cpp"


def test_words_stand_before_the_tiles_of_each_picture() -> None:
    front = Front(Tiles(28, 4, 4), (0.5,) * 3)
    turns = [
        Message("system", "Look."),
        Message("user", f"Is {IMAGE} like {IMAGE}\nor not?"),
        Message("assistant", "no"),
    ]
    asked, sent = front.prepare(turns, [picture(56, 28), picture(20, 20)])
    row = f"{IMAGE}\n" * 2
    assert asked[1].text == f"Is 1x2:\n{row}\n{IMAGE} like {IMAGE}\nor not?"
    assert (asked[0], asked[2]) == (turns[0], turns[2])
    assert len(sent) == 4
    # The tiles are shared out among the pictures of the whole conversation.
    _, alone = front.prepare(turns[1:2], [picture(56, 28), picture(56, 28)], num_images=4)
    assert len(alone) == 2


@pytest.mark.parametrize("geometry", [Square(28, 4), Native(512, 14, 2, 64, 256, 2, 4)])
def test_other_pictures_are_sent_as_they_are(geometry: Square | Native) -> None:
    front, image = Front(geometry, (0.5,) * 3), picture(900, 700)
    assert front.cut(image) == [image]


def test_a_strip_is_padded_as_in_training(tiny_parts: Callable, tmp_path: Path) -> None:
    processor = load_parts_processor(tiny_parts().recipe(image="tiles", shuffle=2))
    front = front_of(settings(processor, tmp_path))
    (sent,) = front.cut(picture(400, 5))
    assert sent.size == geometry_of(processor).bounded_size(400, 5) == (400, 20)
    assert sent.getpixel((0, 0)) == (102, 127, 153)  # 0.4, 0.5 and 0.6 of 255


def mmproj(path: Path, text: str) -> Path:
    """Return the beginning of a GGUF file with one text, by the format's specification."""
    content = b"GGUF" + bytes(20)
    content += len(PROCESSOR).to_bytes(8, "little") + PROCESSOR.encode() + bytes([8, 0, 0, 0])
    content += len(text.encode()).to_bytes(8, "little") + text.encode() + bytes(64)
    path.write_bytes(content)
    return path


def test_an_mmproj_says_how_its_pictures_are_cut(tiny_parts: Callable, tmp_path: Path) -> None:
    processor = load_parts_processor(tiny_parts().recipe(image="native"))
    content = settings(processor, tmp_path)
    assert front_of_gguf(mmproj(tmp_path / "a.gguf", json.dumps(content))) == front_of(content)
    assert front_of_gguf(None) is None
    (tmp_path / "other.gguf").write_bytes(b"GGUF" + bytes(200))
    assert front_of_gguf(tmp_path / "other.gguf") is None
    for wrong in ("{", "[]", '{"image_processor": {}}', '{"image_processor": 3}'):
        with pytest.raises(ValueError, match="does not say how its images are cut: export"):
            front_of_gguf(mmproj(tmp_path / "wrong.gguf", wrong))
