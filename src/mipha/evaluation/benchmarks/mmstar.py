"""MMStar: 1,500 questions that need the image, each with four options inside its text.

The official rules look at the first characters only, and no word boundary follows the letter:

    a   (a   option a   the answer is a      right for A, whatever follows: "Actually it is B" too
    **A**   "A"   Answer: A   It is A        wrong

Source: MMStar-Benchmark/MMStar 88f243ab `eval/vlmeval/evaluate/mmstar.py:MMStar_eval` (it divides
    by the constants 1,500 and 250; here by the number of questions, which is the same for the whole
    file); prompt: EvolvingLMMs-Lab/lmms-eval 75571cfe `tasks/mmstar`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    OfficialRecord,
    TableImages,
    find,
    read_parquet,
    read_record,
    read_table,
    refuse_repeated,
)

FILES = ("mmstar.parquet", "MMStar.tsv")
SOURCE = f"get {' or '.join(FILES)} from huggingface.co/datasets/Lin-Chen/MMStar"
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly"
"""End of the prompt; unlike LLaVA's it has no full stop."""

_COLUMNS = ("index", "question", "answer", "category", "l2_category")
_BEGINNINGS = ("(", "option ", "the answer is ")
"""What may stand before the letter; none of them begins with a letter of an option."""


class _Row(OfficialRecord):
    index: int = Field(ge=0)
    question: str
    answer: Literal["A", "B", "C", "D"]
    category: str = Field(min_length=1)
    l2_category: str = Field(min_length=1)


def read(root: Path, split: str) -> list[Question]:
    """Return every question in the order of the file.

    Args:
        root: The .parquet or the .tsv file, or its folder; the .parquet comes first.
        split: `val`.

    Returns:
        Questions whose facts are `answer` (letter), `category` (one of six), `l2_category` (one of
        eighteen axes) and `image` (hash of the image, or the id where there is none).
    """
    return _read_rows(root, with_images=True)


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions; the images need not be there."""
    return _read_rows(path, with_images=False)


def read_answer(text: str) -> str | None:
    """Return the letter that an answer begins with; None where the rules find none of the four."""
    text = text.lower().strip().replace("\n", " ")
    beginning = next((words for words in _BEGINNINGS if text.startswith(words)), "")
    letter = text[len(beginning) : len(beginning) + 1].upper()
    return letter if letter in tuple("ABCD") else None


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge whether the letter is the right one; an unreadable answer is wrong."""
    parsed = {question.id: read_answer(predictions[question.id]) for question in questions}
    right = {
        question.id: float(parsed[question.id] == question.facts["answer"])
        for question in questions
    }

    contributions = []
    for question in questions:
        facts = question.facts
        names = (
            "overall",
            f"category.{facts['category']}",
            f"l2_category.{facts['l2_category']}",
        )
        contributions.append((facts["image"], dict.fromkeys(names, right[question.id])))
    return Judgement(per_question=right, contributions=contributions, parsed=parsed)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right: of all, as the mean of the axes, by category and by axis."""
    categories = sorted(name for name in totals.names if name.startswith("category."))
    axes = sorted(name for name in totals.names if name.startswith("l2_category."))
    percent = {name: 100 * totals.mean(name) for name in ("overall", *categories, *axes)}
    axes_mean = np.asarray(sum(percent[name] for name in axes) / len(axes))
    return {"overall": percent.pop("overall"), "axes_mean": axes_mean} | percent


def _read_rows(root: Path, with_images: bool) -> list[Question]:
    """Return every question of either file.

    Raises:
        FileNotFoundError: There is no such file.
        MissingPackage: The file is a .parquet, and pyarrow is not installed.
        ValueError: The file is malformed, or the one of VLMEvalKit.
    """
    path = find(root, FILES, SOURCE)
    read_file = read_table if path.suffix == ".tsv" else read_parquet
    images = TableImages(with_images)
    place_of: dict[int, str] = {}

    questions = []
    for where, cells in read_file(path, _COLUMNS):
        # VLMEvalKit's file has the same name, but its questions have lost their options.
        if "A" in cells:
            raise ValueError(
                f"{path} has its options in columns of their own, so it is VLMEvalKit's file: "
                f"{SOURCE}"
            )
        row = read_record(_Row, _plain_values(cells), where)
        refuse_repeated(place_of, row.index, where, "index")
        name, image = images.read(cells.get("image"), where, str(row.index))
        facts = {
            "answer": row.answer,
            "category": row.category,
            "l2_category": row.l2_category,
            "image": name,
        }
        prompt = row.question.strip() + INSTRUCTION
        questions.append(Question(str(row.index), prompt, image, facts))
    return questions


def _plain_values(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells with the index as a number, which in a .tsv file is a text."""
    index = cells["index"]
    is_number = isinstance(index, str) and index.isdecimal()
    return {**cells, "index": int(index) if is_number else index}


BENCHMARK = Benchmark(
    name="mmstar",
    metrics=(
        Metric("overall", "%", "questions answered right"),
        Metric("axes_mean", "%", "mean of the accuracies in the 18 axes, as lmms-eval gives it"),
        Metric("category", "%", "questions of one of the six categories"),
        Metric("l2_category", "%", "questions of one of the 18 axes"),
    ),
    splits={"val": Split(1500)},
    protocol=(
        "MMStar val, question with its options as published, then `Answer with the option's letter "
        "from the given choices directly` (lmms-eval's prompt), greedy; the letter must stand "
        "first, or after `(`, `option ` or `the answer is ` (official rules); mean over questions; "
        "95 % interval: cluster bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
)
