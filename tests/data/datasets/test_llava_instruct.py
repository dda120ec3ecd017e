"""LLaVA's instruction file: several rounds, rows without an image, and LLaVA's own rules for the
turns.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.data.datasets import llava_instruct
from mipha.data.sample import Sample

FILENAME = "llava_v1_5_mix665k.json"


def _sample(root: Path, *turns: tuple[str, str], **row: object) -> Sample:
    file = root / FILENAME
    file.write_text(
        json.dumps(
            [
                {
                    "id": "7",
                    **row,
                    "conversations": [{"from": who, "value": text} for who, text in turns],
                }
            ]
        )
    )
    return llava_instruct.DATASET.to_sample(llava_instruct.DATASET.load(root, "train")[0])


def _texts(sample: Sample) -> list[str]:
    return [message.text for message in sample.messages]


def test_several_rounds_about_one_image(tmp_path: Path) -> None:
    turns = [
        ("human", "What is it?\n<image>"),
        ("gpt", "A bus. "),
        ("human", " Which colour?"),
        ("gpt", "White."),
    ]
    sample = _sample(tmp_path, *turns, image="coco/train2017/000000033471.jpg")
    assert sample.id == "llava_instruct/0/7"
    assert _texts(sample) == [
        "<image>\nWhat is it?",
        "A bus. ",
        " Which colour?",
        "White.",
    ]  # other turns stay as published
    assert sample.images == (tmp_path / "coco/train2017/000000033471.jpg",)


def test_a_row_without_an_image(tmp_path: Path) -> None:
    sample = _sample(tmp_path, ("human", "Hello"), ("gpt", "Hi"))
    assert (sample.images, _texts(sample)) == ((), ["Hello", "Hi"])


def test_the_marker_moves_to_the_front_of_the_turn_that_holds_it(tmp_path: Path) -> None:
    turns = [
        ("human", "Hello"),
        ("gpt", "Hi"),
        ("human", "What is <image> here?"),
        ("gpt", "A cat."),
    ]
    assert _texts(_sample(tmp_path, *turns, image="a.jpg"))[2] == "<image>\nWhat is  here?"
    assert (
        _texts(
            _sample(tmp_path, ("human", "<image>\n<image>\nLook"), ("gpt", "Yes"), image="a.jpg")
        )[0]
        == "<image>\nLook"
    )
    assert (
        _texts(_sample(tmp_path, ("human", "<image>"), ("gpt", "A cat."), image="a.jpg"))[0]
        == "<image>"
    )


def test_turns_that_nobody_asked_or_answers_are_left_out(tmp_path: Path) -> None:
    assert _texts(
        _sample(tmp_path, ("gpt", "Welcome"), ("human", "Hello"), ("gpt", "Hi"), ("human", "Bye"))
    ) == ["Hello", "Hi"]
    with pytest.raises(ValueError, match="row 0: no human turn is answered"):
        _sample(tmp_path, ("gpt", "Welcome"))


def test_two_turns_cannot_hold_one_image(tmp_path: Path) -> None:
    turns = [("human", "<image> a"), ("gpt", "b"), ("human", "<image> c"), ("gpt", "d")]
    with pytest.raises(
        ValueError, match=r"llava_v1_5_mix665k\.json, row 0.*2 <image> markers for 1 images"
    ):
        _sample(tmp_path, *turns, image="a.jpg")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="llava_instruct has no split 'val'"):
        llava_instruct.DATASET.load(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match=r"llava_v1_5_mix665k\.json"):
        llava_instruct.DATASET.load(tmp_path, "train")
    with pytest.raises(ValueError, match=r"row 0: the image path '\.\./a\.jpg' leads out"):
        _sample(tmp_path, ("human", "<image>"), ("gpt", "b"), image="../a.jpg")
