"""What the `datasets` library itself saved (`saved_by_datasets/make.py`), read without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mipha.data.datasets import arrow
from mipha.data.images import open_image
from mipha.data.sample import Sample

pytest.importorskip("pyarrow")
SAVED = Path(__file__).parent / "saved_by_datasets"
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def _samples(root: Path, split: str = "train") -> list[Sample]:
    return [arrow.DATASET.to_sample(row) for row in arrow.load(root, split)]


def test_splits_with_an_image_a_row() -> None:
    first, text, last = _samples(SAVED / "splits")
    assert [message.text for message in first.messages] == ["<image>\nWhich colour?", "red"]
    assert ([message.text for message in text.messages], text.images) == (["Hello?", "Hi."], ())
    for sample in (first, last):
        assert open_image(sample.images[0]).getpixel((0, 0)) == COLOURS[sample.messages[1].text]
    assert first.id == "arrow/train/data-00000-of-00001/0"
    assert [sample.messages[1].text for sample in _samples(SAVED / "splits", "test")] == ["blue"]
    with pytest.raises(ValueError, match="no split 'validation': use train or test"):
        arrow.load(SAVED / "splits", "validation")


def test_lists_of_images() -> None:
    both, text, one = _samples(SAVED / "messages")
    assert [message.text for message in both.messages] == [
        "<image>\n<image>\nCompare.",
        "Red, blue.",
    ]
    assert [open_image(image).getpixel((0, 0)) for image in both.images] == [
        COLOURS["red"],
        COLOURS["blue"],
    ]
    assert str(both.images[1]).endswith("row 0, image 1")
    assert (text.images, one.messages[0].text, len(one.images)) == ((), "<image>\nWhich colour?", 1)
    assert len(_samples(SAVED / "messages" / "data-00000-of-00001.arrow")) == 3


def test_images_are_told_apart_without_being_read() -> None:
    samples = _samples(SAVED / "splits")
    assert len({image for sample in samples for image in sample.images}) == 2
    assert samples == _samples(SAVED / "splits")


def test_folders_that_are_no_such_thing(tmp_path: Path) -> None:
    for state, sentence in (
        ({}, "names no data files of this folder"),
        ({"_data_files": [{"filename": "../x.arrow"}]}, "names no data files of this folder"),
        ({"_data_files": ["x"]}, "names no data files of this folder"),
        ({"_indices_files": [{"filename": "i.arrow"}]}, "flatten_indices"),
        ([], "holds a JSON list, not an object: save the data set again"),
    ):
        (tmp_path / "state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match=sentence):
            arrow.load(tmp_path, "train")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        arrow.load(tmp_path, "train")
    (tmp_path / "state.json").unlink()
    with pytest.raises(ValueError, match=r"has no state\.json"):
        arrow.load(tmp_path, "train")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["../elsewhere"]}')
    with pytest.raises(ValueError, match="names no splits of this folder"):
        arrow.load(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        arrow.load(tmp_path / "gone", "train")
    with pytest.raises(ValueError, match="has no packaged copy"):
        arrow.load(None, "train")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    shutil.copytree(SAVED / "messages", tmp_path / "copy")
    file = tmp_path / "copy" / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    for number, content in enumerate((whole[:500], b"not an arrow file", b"")):
        damaged = file.with_name(f"{number}.arrow")
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{number}\.arrow cannot be read as Arrow"):
            arrow.load(damaged, "train")
