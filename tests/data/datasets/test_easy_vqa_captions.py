"""Captions of easy-VQA: one for each known image, saying what the explained answers say first."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mipha.data.datasets import easy_vqa, easy_vqa_captions

needs_package = pytest.mark.skipif(
    find_spec("easy_vqa") is None, reason="easy-vqa is not installed: make install"
)


@needs_package
@pytest.mark.parametrize(("split", "images"), [("train", 3217), ("validation", 361), ("test", 888)])
def test_one_caption_for_each_known_image(
    split: str, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)  # another test may have imported it
    records = easy_vqa_captions.load(None, split)
    assert len(records) == len({record.image for record in records}) == images
    assert {record.image for record in records} == {
        record.image for record in easy_vqa.load(None, split)
    }
    assert "easy_vqa" not in sys.modules


@needs_package
def test_the_caption_is_the_beginning_of_the_explained_answer() -> None:
    captions = {
        record.image: easy_vqa_captions.to_sample(record)
        for record in easy_vqa_captions.load(None, "validation")
    }
    for record in easy_vqa.load(None, "validation"):
        answer = easy_vqa.to_sample(record)
        assert answer.messages[1].text.startswith(captions[record.image].messages[1].text + ",")
        assert answer.images == captions[record.image].images
    first = easy_vqa_captions.to_sample(easy_vqa_captions.load(None, "train")[0])
    assert first.id == "easy_vqa_captions/train/0"
    assert [message.text for message in first.messages] == [
        "<image>\ndescribe the image",
        "it is a blue rectangle",
    ]


@needs_package
def test_what_is_left_out_is_said() -> None:
    assert "39 of 400 images" in (easy_vqa_captions.left_out(None, "validation") or "")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no split 'dev'"):
        easy_vqa_captions.load(None, "dev")
    with pytest.raises(FileNotFoundError, match=r"test/questions\.json"):
        easy_vqa_captions.load(tmp_path, "test")
