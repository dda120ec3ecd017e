"""easy-VQA: questions about colour and shape of a figure; answers first say what is seen.

Target: "it is a red circle, so no". With one-word answers a small model learns the usual answer of
each yes/no question and no more; it must name what it sees before it answers, and the benchmark
reads the last word.

Colour and shape are not published. They follow from an image's own questions and answers, by the
rule in `facts`.

Source: PyPI `easy-vqa` 1.0 (MIT), https://github.com/vzhou842/easy-VQA
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from mipha.data.dataset import DataSet
from mipha.data.datasets._records import check_split
from mipha.data.sample import IMAGE, Message, Sample
from mipha.errors import MissingPackage
from mipha.files import read_json

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SPLITS = ("train", "validation", "test")
NUM_VALIDATION_IMAGES = 400


class EasyVqaRecord(NamedTuple):
    """One question whose image is known.

    Args:
        file: The image file.
        folder: `train` or `test`, the published folder; the validation split's images are in
            `train`.
        image: Number of the image.
        number: Place among the questions of the image, from 0.
    """

    file: Path
    folder: str
    image: int
    number: int
    question: str
    answer: str
    colour: str
    shape: str


def load(root: Path | None, split: str) -> Sequence[EasyVqaRecord]:
    """Read the questions of a split, in the published order.

    Those about an image whose colour or shape stays unknown are left out (see `left_out`).

    Args:
        root: Folder with `train` and `test`, each with `questions.json` and `images`; None for
            that of the installed package.
        split: `train`, `validation` (400 of the published training images, kept out of `train`)
            or `test` (the published one).

    Raises:
        MissingPackage: The package is not installed.
        FileNotFoundError: A file is missing.
        ValueError: No such split, a malformed row, or answers that contradict each other.
    """
    folder, questions = questions_of(root, split)
    known = facts(questions, folder)
    return [
        EasyVqaRecord(file, folder, image, number, question, answer, *known[image])
        for image, rows in questions.items()
        if image in known
        for file in (image_path(root, folder, image),)
        for number, (question, answer) in enumerate(rows)
    ]


def to_sample(record: EasyVqaRecord) -> Sample:
    """Return one question and its explained answer."""
    return Sample(
        id=f"easy_vqa/{record.folder}/{record.image}/{record.number}",
        messages=(
            Message("user", f"{IMAGE}\n{record.question}"),
            Message("assistant", explain(record.colour, record.shape, record.answer)),
        ),
        images=(record.file,),
    )


def left_out(root: Path | None, split: str) -> str | None:
    """Return a sentence on what `load` leaves out of a split; None if nothing."""
    folder, questions = questions_of(root, split)
    known = facts(questions, folder)
    unknown = [len(rows) for image, rows in questions.items() if image not in known]
    if not unknown:
        return None
    num_questions = sum(len(rows) for rows in questions.values())
    return (
        f"easy_vqa {split}: {len(unknown)} of {len(questions)} images "
        f"({sum(unknown)} of {num_questions} questions) are left out, "
        "because their questions and answers do not tell both colour and shape"
    )


def describe(colour: str, shape: str) -> str:
    """Say what is seen: the caption, and the beginning of every explained answer."""
    return f"it is a {colour} {shape}"


def explain(colour: str, shape: str, answer: str) -> str:
    """Say what is seen, then the answer as the last word."""
    return f"{describe(colour, shape)}, so {answer}"


def questions_of(root: Path | None, split: str) -> tuple[str, dict[int, list[tuple[str, str]]]]:
    """Read the published questions of a split.

    Returns:
        The published folder of the split; and by image number its (question, answer) pairs, in the
        published order.

    Raises:
        MissingPackage: The package is not installed.
        FileNotFoundError: questions.json is missing.
        ValueError: No such split, or a row is not [question, answer, image number].
    """
    check_split("easy_vqa", split, SPLITS)
    folder = "test" if split == "test" else "train"
    file = (root or packaged_root()) / folder / "questions.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"easy_vqa: no file {file}; set the data's root to a folder with "
            f"{folder}/questions.json and {folder}/images"
        )
    rows = read_json(file)

    questions: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        if (
            not isinstance(row, list)
            or [type(cell) for cell in row] != [str, str, int]
            or row[1] not in ("yes", "no", *COLOURS, *SHAPES)
        ):
            raise ValueError(
                f"{file}, row {number} is {str(row)[:80]}; "
                "wanted [question, one of the 13 answers, image number]"
            )
        questions[row[2]].append((row[0], row[1]))

    if folder == "train":
        held_out = validation_images(questions)
        questions = {
            image: pairs
            for image, pairs in questions.items()
            if (image in held_out) == (split == "validation")
        }
    return folder, dict(questions)


def validation_images(images: Iterable[int]) -> frozenset[int]:
    """Choose the 400 training images of the validation split: the smallest sha256 of the number."""
    return frozenset(
        sorted(images, key=lambda image: hashlib.sha256(str(image).encode()).digest())[
            :NUM_VALIDATION_IMAGES
        ]
    )


def facts(
    questions: Mapping[int, Sequence[tuple[str, str]]], where: str
) -> dict[int, tuple[str, str]]:
    """Derive colour and shape of every image whose own questions and answers tell both.

    A colour or shape is told if it is the answer, if the question presumes it ("what color is the
    circle?"), if a yes/no question affirms it ("not" and "no" reverse the question), or if all
    others of its kind are denied.

    Raises:
        ValueError: A question names nothing known, or answers about an image contradict each other.
    """
    known = {}
    for image, pairs in questions.items():
        # Collect what the image's questions tell and deny.
        told, denied = set(), set()
        for question, answer in pairs:
            words = re.findall(r"[a-z]+", question.lower())
            named = [word for word in words if word in COLOURS or word in SHAPES]
            if answer not in ("yes", "no"):
                told.update(named, [answer])
            elif len(named) == 1:
                (told if (answer == "yes") != ("not" in words or "no" in words) else denied).add(
                    named[0]
                )
            else:
                found = " and ".join(named) or "no colour or shape"
                raise ValueError(
                    f"easy_vqa {where}, image {image}: the yes/no question {question!r} names "
                    f"{found}; wanted one of them"
                )

        # See what that leaves.
        possible = [_possible(kind, told, denied) for kind in (COLOURS, SHAPES)]
        if not all(possible):
            said = f"told {', '.join(sorted(told))}; denied {', '.join(sorted(denied))}"
            raise ValueError(
                f"easy_vqa {where}, image {image}: its answers contradict each other: {said}"
            )
        if all(len(values) == 1 for values in possible):
            known[image] = (possible[0][0], possible[1][0])
    return known


def _possible(kind: Sequence[str], told: set[str], denied: set[str]) -> list[str]:
    """Return the values that a colour or shape can still have."""
    affirmed = told & set(kind)
    return [value for value in kind if value not in denied and affirmed <= {value}]


def image_path(root: Path | None, folder: str, image: int) -> Path:
    """Return where an image is."""
    return (root or packaged_root()) / folder / "images" / f"{image}.png"


@cache
def packaged_root() -> Path:
    """Find the data folder inside the installed package, without importing it.

    Raises:
        MissingPackage: The package is not installed.
    """
    spec = find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage("easy-vqa", "the packaged easy_vqa data set", "quickstart")
    return Path(spec.submodule_search_locations[0]) / "data"


DATASET = DataSet("easy_vqa", load, to_sample, left_out=left_out)
