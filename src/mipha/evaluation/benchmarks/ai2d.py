"""AI2D: 3,088 questions about diagrams of science lessons, each with lettered options.

The authors published no scorer for free answers. The rules here are those of lmms-eval: a letter
with a full stop at the start counts for the whole text, then marks and case are ignored.

    A   a   (A)   A.   **A**   A. the leaf       right for A
    (A) the leaf   The answer is A.   the leaf   wrong

`vlmevalkit` is the accuracy by VLMEvalKit's rules, behind the OpenVLM leaderboard. Published files
exist with and without white boxes over the labels ("mask"); without them, scores are several points
higher.

Source: EvolvingLMMs-Lab/lmms-eval 75571cfe `tasks/ai2d/{ai2d.yaml,utils.py}`,
    `filters/extraction.py`, `api/metrics.py:exact_match`; open-compass/VLMEvalKit e8e78f05
    `vlmeval/utils/matching_util.py`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    TableImages,
    find_shards,
    read_record,
    read_rows,
)
from mipha.evaluation.multiple_choice import LETTER, LETTERS, list_options, read_option

TSV = ("AI2D_TEST.tsv", "AI2D_TEST_NO_MASK.tsv")
"""VLMEvalKit's files: the same questions under ids of their own."""
FILES = ("data/test-*.parquet", "test-*.parquet", "test.parquet", *TSV)
SOURCE = (
    "get data/test-*.parquet from huggingface.co/datasets/lmms-lab/ai2d (with mask, the usual "
    f"one) or lmms-lab/ai2d-no-mask, or VLMEvalKit's {TSV[0]} or {TSV[1]}"
)

_LETTER_AND_STOP = re.compile(r"^\s*([A-Z])\.")
_NO_MARKS = str.maketrans("", "", string.punctuation)


class _Row(OfficialRecord):
    question: str
    options: list[str] = Field(min_length=2, max_length=len(LETTERS))
    answer: str


def read(root: Path, split: str) -> list[Question]:
    """Return every question in the order of the files.

    Args:
        root: Folder with the .parquet files or a .tsv file, or the only one of them.
        split: `test`.

    Returns:
        Questions with the number of their row as id, or their index in a .tsv file. Facts are
        `answer` (letter), `choices` (letter to text) and `image` (hash of the image, or the id
        where there is none).
    """
    return _read_rows(root, with_images=True)


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions; the images need not be there."""
    return _read_rows(path, with_images=False)


def normalise(text: str) -> str:
    """Return an answer as it is compared."""
    found = _LETTER_AND_STOP.match(text)
    return (found[1] if found else text).strip().lower().translate(_NO_MARKS)


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge whether the text is the letter, by both programs' rules."""
    compared = {question.id: normalise(predictions[question.id]) for question in questions}
    right = {
        question.id: float(compared[question.id] == question.facts["answer"].lower())
        for question in questions
    }

    contributions = []
    for question in questions:
        letter = read_option(predictions[question.id], question.facts["choices"])
        amounts = {
            "overall": right[question.id],
            "vlmevalkit": float(letter == question.facts["answer"]),
        }
        contributions.append((question.facts["image"], amounts))
    return Judgement(per_question=right, contributions=contributions, normalised=compared)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right."""
    return {name: 100 * totals.mean(name) for name in ("overall", "vlmevalkit")}


def _read_rows(root: Path, with_images: bool) -> list[Question]:
    images = TableImages(with_images)
    questions: list[Question] = []
    for path in find_shards(root, FILES, SOURCE):
        for where, cells in read_rows(path, ("question", "answer")):
            if path.suffix == ".tsv":
                cells = _rename(cells)
            row = read_record(_Row, cells, where)
            if row.answer not in map(str, range(len(row.options))):
                raise ValueError(
                    f"{where}: answer {row.answer!r} should be the number of one of its "
                    f"{len(row.options)} options, from '0', in a .tsv file its letter: {AGAIN}"
                )

            question_id = cells.get("question_id", str(len(questions)))
            name, image = images.read(cells.get("image"), where, question_id)
            facts = {
                "answer": LETTERS[int(row.answer)],
                "choices": dict(zip(LETTERS, row.options, strict=False)),
                "image": name,
            }
            prompt = row.question + list_options(row.options) + LETTER
            questions.append(Question(question_id, prompt, image, facts))
    return questions


def _rename(cells: Mapping[str, str]) -> dict[str, Any]:
    """Return the cells of a .tsv file under the names of the .parquet files."""
    options = [cells[letter] for letter in LETTERS if letter in cells]
    while options and not options[-1]:
        options.pop()
    numbers = {letter: str(number) for number, letter in enumerate(LETTERS[: len(options)])}
    answer = cells["answer"]
    named = {"options": options, "answer": numbers.get(answer, answer)}
    return {**cells, **named, "question_id": cells["index"]}


BENCHMARK = Benchmark(
    name="ai2d",
    metrics=(
        Metric("overall", "%", "questions answered right, by lmms-eval's rules"),
        Metric("vlmevalkit", "%", "questions answered right, by VLMEvalKit's rules without judge"),
    ),
    splits={"test": Split(3088)},
    protocol=(
        "AI2D test, lmms-eval's prompt (question, lettered options, then `Answer with the option's "
        "letter from the given choices directly.`), greedy; the text must be the letter, marks and "
        "case aside, or begin with the letter and a full stop; mean over questions; 95 % interval: "
        "cluster bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=16,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    rules="lmms-eval",
    id_advice="AI2D's ids are the numbers of the rows, from 0, or the index of the .tsv file",
)
