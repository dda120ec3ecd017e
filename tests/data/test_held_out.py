"""Which side of the train/validation split a sample is on: its images decide, alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mipha.data.held_out import side_of
from mipha.data.images import FileSlice, ImageSource
from mipha.data.sample import Message, Sample


def _sample(*images: ImageSource, question: str = "what?", answer: str = "that") -> Sample:
    return Sample(
        "s",
        (Message("user", "<image>" * len(images) + question), Message("assistant", answer)),
        images,
    )


def test_the_same_bytes_are_on_the_same_side_wherever_they_are(tmp_path: Path) -> None:
    sides = set()
    for number in range(20):
        content = bytes([number]) * 50
        file, tar = tmp_path / f"{number}.png", tmp_path / f"{number}.tar"
        file.write_bytes(content)
        tar.write_bytes(b"head" + content + b"tail")
        images = (content, file, FileSlice(tar, 4, 50, "picture"))
        (side,) = {side_of(_sample(image, question=str(image)), 0.5) for image in images}
        sides.add(side)
    assert sides == {"train", "validation"}


def test_the_share_is_kept() -> None:
    sides = [side_of(_sample(number.to_bytes(4, "big")), 0.2) for number in range(4000)]
    assert sides.count("validation") == pytest.approx(800, abs=4 * (4000 * 0.2 * 0.8) ** 0.5)


def test_a_sample_with_images_of_both_sides_is_on_neither() -> None:
    train, validation = (
        next(
            image for number in range(99) if side_of(_sample(image := bytes([number])), 0.5) == side
        )
        for side in ("train", "validation")
    )
    assert side_of(_sample(train, validation), 0.5) is None
    assert side_of(_sample(train, train), 0.5) == "train"


def test_text_alone_goes_by_the_question() -> None:
    sides = {question: side_of(_sample(question=question), 0.5) for question in "abcdefghijklmnop"}
    assert set(sides.values()) == {"train", "validation"}
    assert all(
        side_of(_sample(question=question, answer="other"), 0.5) == side
        for question, side in sides.items()
    )


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        side_of(_sample(tmp_path / "gone.png"), 0.5)
