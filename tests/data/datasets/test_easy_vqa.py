"""easy-VQA: what is known of an image, and that every explained answer is the published one."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from mipha.data.datasets import easy_vqa
from mipha.errors import MissingPackage

needs_package = pytest.mark.skipif(
    find_spec("easy_vqa") is None, reason="easy-vqa is not installed: make install"
)


def _truth(question: str, colour: str, shape: str) -> str:
    """The answer by the wording alone: nine forms of question, read by prefix."""
    if question.startswith(("what color", "what is the color")):
        return colour
    if question.startswith("what "):
        return shape
    figure = next(
        word for word in question.rstrip("?").split() if word in easy_vqa.COLOURS + easy_vqa.SHAPES
    )
    turned = question.startswith(("is there not ", "is no ", "does the image not "))
    return "yes" if (figure in (colour, shape)) is not turned else "no"


@needs_package
def test_the_counts_are_those_of_the_published_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)  # another test may have imported it
    counts = {}
    for split in easy_vqa.SPLITS:
        _, questions = easy_vqa.questions_of(None, split)
        records = easy_vqa.load(None, split)
        counts[split] = (
            len(questions),
            sum(map(len, questions.values())),
            len({record.image for record in records}),
            len(records),
        )
    assert counts == {  # images, questions; known images, their questions
        "train": (3600, 34727, 3217, 31961),
        "validation": (400, 3848, 361, 3580),
        "test": (1000, 9673, 888, 8879),
    }
    assert "easy_vqa" not in sys.modules, "the data is found without importing its package"


@needs_package
@pytest.mark.parametrize("split", easy_vqa.SPLITS)
def test_every_published_answer_follows_from_the_explanation(split: str) -> None:
    records = easy_vqa.load(None, split)
    wrong = [
        record
        for record in records
        if _truth(record.question, record.colour, record.shape) != record.answer
    ]
    assert records and not wrong, wrong[:3]


@needs_package
def test_the_derived_colour_is_the_one_painted() -> None:
    """One RGB value for each colour name, over all known images of the validation split: the names
    were never read from pixels.
    """
    painted = defaultdict(Counter)
    for record in {record.image: record for record in easy_vqa.load(None, "validation")}.values():
        with Image.open(easy_vqa.image_path(None, record.folder, record.image)) as image:
            colours = image.convert("RGB").getcolors(maxcolors=2**24)
        _, (_, figure) = sorted(colours, reverse=True)[:2]  # the background, then the figure
        painted[record.colour][figure] += 1
    assert sorted(painted) == sorted(easy_vqa.COLOURS)
    assert {name: len(values) for name, values in painted.items()} == dict.fromkeys(painted, 1)
    assert next(iter(painted["teal"])) == (0, 128, 128)


@needs_package
def test_no_image_is_in_two_splits() -> None:
    files = {}
    for split in easy_vqa.SPLITS:
        folder, questions = easy_vqa.questions_of(None, split)
        paths = [easy_vqa.image_path(None, folder, image) for image in questions]
        files[split] = {hashlib.sha256(path.read_bytes()).digest() for path in paths}
        assert len(files[split]) == len(paths)
    assert not files["train"] & files["validation"]
    assert not files["train"] & files["test"]
    assert not files["validation"] & files["test"]


@needs_package
def test_the_validation_split_never_moves() -> None:
    numbers = sorted(easy_vqa.validation_images(range(4000)))
    assert hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16] == "a222199b4befc597"
    assert set(numbers) == set(easy_vqa.questions_of(None, "validation")[1])


@needs_package
def test_a_sample_reads_as_it_is_trained_on() -> None:
    sample = easy_vqa.to_sample(easy_vqa.load(None, "train")[5])
    assert sample.id == "easy_vqa/train/0/5"
    assert [message.text for message in sample.messages] == [
        "<image>\ndoes the image not contain a gray shape?",
        "it is a blue rectangle, so yes",
    ]
    assert isinstance(sample.images[0], Path) and sample.images[0].is_file()
    ids = [
        easy_vqa.to_sample(record).id
        for split in easy_vqa.SPLITS
        for record in easy_vqa.load(None, split)
    ]
    assert len(set(ids)) == len(ids)


@needs_package
def test_what_is_left_out_is_said() -> None:
    sentence = easy_vqa.left_out(None, "train")
    assert sentence is not None and "383 of 3600 images (2766 of 34727 questions)" in sentence


def _write(root: Path, rows: object, folder: str = "test") -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "questions.json").write_text(json.dumps(rows))
    return root


@pytest.mark.parametrize(
    ("rows", "known"),
    [
        ([["what color is the circle?", "red"]], ("red", "circle")),
        (
            [["is a red shape present?", "yes"], ["what shape is present?", "circle"]],
            ("red", "circle"),
        ),
        ([["is no red shape present?", "no"], ["is there not a circle?", "no"]], ("red", "circle")),
        ([["is no red shape present?", "yes"], ["is there a circle?", "yes"]], None),
        (
            [
                ["what color is the shape?", "red"],
                ["is there a circle?", "no"],
                ["does the image not contain a triangle?", "yes"],
            ],
            ("red", "rectangle"),
        ),
        ([["what color is the shape?", "red"], ["is there a circle?", "no"]], None),
        (
            [
                ["is there a circle?", "yes"],
                *(
                    [f"is a {colour} shape present?", "no"]
                    for colour in easy_vqa.COLOURS
                    if colour != "teal"
                ),
            ],
            ("teal", "circle"),
        ),
    ],
)
def test_what_follows_from_questions_and_answers(rows, known, tmp_path: Path) -> None:
    root = _write(tmp_path, [[*row, 7] for row in rows])
    assert {(record.colour, record.shape) for record in easy_vqa.load(root, "test")} == (
        {known} if known else set()
    )
    assert (easy_vqa.left_out(root, "test") is None) == (known is not None)


@pytest.mark.parametrize(
    "rows",
    [
        [["what color is the shape?", "red"], ["is a red shape present?", "no"]],
        [["what color is the shape?", "red"], ["is a blue shape present?", "yes"]],
        [
            ["is there a circle?", "no"],
            ["is there a triangle?", "no"],
            ["is there a rectangle?", "no"],
        ],
    ],
)
def test_a_contradiction_is_an_error(rows, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image 7: its answers contradict"):
        easy_vqa.load(_write(tmp_path, [[*row, 7] for row in rows]), "test")


@pytest.mark.parametrize(
    "row",
    [
        ["is there a circle?", "yes"],
        ["is there a circle?", "maybe", 1],
        ["is there a circle?", "yes", "1"],
        ["is there a circle?", "yes", True],
        ["is there a circle?", "yes", "../../etc/passwd"],
        "is there a circle?",
        None,
    ],
)
def test_a_malformed_row_is_named(row, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"questions\.json, row 1 is .*wanted \[question"):
        easy_vqa.load(_write(tmp_path, [["is there a circle?", "yes", 1], row]), "test")


def test_a_question_about_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no colour or shape"):
        easy_vqa.load(_write(tmp_path, [["is there a dog?", "yes", 1]]), "test")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no split 'dev': use train or validation or test"):
        easy_vqa.load(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match=r"train/questions\.json"):
        easy_vqa.load(tmp_path, "train")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "questions.json").write_text("[[")
    with pytest.raises(ValueError, match=r"questions\.json line 1 is not valid JSON"):
        easy_vqa.load(tmp_path, "test")


def test_a_package_that_is_not_installed_is_answered_with_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    easy_vqa.packaged_root.cache_clear()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(MissingPackage, match=r"easy-vqa.*mipha-vlm\[quickstart\]"):
        easy_vqa.load(None, "train")
