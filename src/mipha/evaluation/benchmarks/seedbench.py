"""SEED-Bench 1, image part: four choices, a letter; the text must be that letter and nothing else.

"A.", "(A)", "a" and "A. text" are wrong. The file asks about videos too. A model of single images
is not asked those, but a predictions file that answers them is scored on them: `read_labels` gives
them as well, marked `optional`, and `video` and `total` appear.

Source: haotian-liu/LLaVA c121f043 `scripts/convert_seed_for_submission.py` (it stops with a
    KeyError on a type without one right answer; that type is 0 % here); AILab-CVC/SEED-Bench
    991e849b `DATASET.md`. The `eval.py` there ranks choices by likelihood: no published number of
    this protocol is made with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    QuestionId,
    find,
    image_file,
    read_official,
    read_record,
    refuse_repeated,
)
from mipha.evaluation.multiple_choice import LETTER, list_options

FILE = "SEED-Bench.json"
IMAGES = "SEED-Bench-image"
SOURCE = (
    f"get {FILE} and {IMAGES}.zip from huggingface.co/datasets/AILab-CVC/SEED-Bench, "
    "unpacked into one folder"
)
_LETTERS = "ABCD"


class _File(OfficialRecord):
    question_type: dict[str, int]
    questions: list[Any]


class _Record(OfficialRecord):
    question_id: str | int
    question: str
    choice_a: Any
    choice_b: Any
    choice_c: Any
    choice_d: Any
    answer: Literal["A", "B", "C", "D"]
    data_type: Literal["image", "video"]
    data_id: QuestionId
    question_type_id: int


def read(root: Path, split: str) -> list[Question]:
    """Return every image question in the order of the file.

    Args:
        root: Folder with the question file and `SEED-Bench-image/<data_id>`.
        split: `image`.

    Returns:
        Questions whose facts are `answer` (letter), `image` (data_id), `kind` (image or video),
        `type` (official name), `official_id` (the id as the file has it) and `optional` (whether
        predictions may do without it).
    """
    asked = []
    for record, facts in _read_records(root):
        if record.data_type == "image":
            choices = (record.choice_a, record.choice_b, record.choice_c, record.choice_d)
            prompt = record.question + list_options(choices) + LETTER
            image = image_file(root / IMAGES / record.data_id, SOURCE)
            asked.append(Question(str(record.question_id), prompt, image, facts))
    return asked


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions: about images, and (optional) about videos."""
    return [
        Question(str(record.question_id), record.question, None, facts)
        for record, facts in _read_records(path)
    ]


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge whether the text is the letter; a text that is none of the four is unreadable."""
    given = {question.id: predictions[question.id] for question in questions}
    right = {
        question.id: float(given[question.id] == question.facts["answer"]) for question in questions
    }

    contributions = []
    for question in questions:
        names = (question.facts["kind"], "total", f"type.{question.facts['type']}")
        contributions.append((question.facts["image"], dict.fromkeys(names, right[question.id])))
    parsed = {
        name: text if len(text) == 1 and text in _LETTERS else None for name, text in given.items()
    }
    return Judgement(
        per_question=right, contributions=contributions, parsed=parsed, submission=given
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right of image questions and of each type.

    Video questions and both together are there where videos were answered.
    """
    both = ("video", "total") if "video" in totals.names else ()
    types = sorted(name for name in totals.names if name.startswith("type."))
    return {name: 100 * totals.mean(name) for name in ("image", *both, *types)}


def make_upload(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """Return the leaderboard's file, a line per question."""
    rows = (
        {"question_id": question.facts["official_id"], "prediction": predictions[question.id]}
        for question in questions
    )
    return {"seedbench_predictions.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


def _read_records(root: Path) -> Iterator[tuple[_Record, dict[str, Any]]]:
    """Yield record and facts of every question about an image or a video."""
    path = find(root, (FILE,), SOURCE)
    content = read_record(_File, read_official(path), str(path))
    names = {number: name for name, number in content.question_type.items()}
    place_of: dict[str, str] = {}

    for number, row in enumerate(content.questions):
        where = f"{path} question number {number} (from 0)"
        record = read_record(_Record, row, where)
        refuse_repeated(place_of, str(record.question_id), where)
        if record.question_type_id not in names:
            raise ValueError(
                f"{where} has the question_type_id {record.question_type_id!r}, "
                f"which question_type does not name: {AGAIN}"
            )
        yield (
            record,
            {
                "answer": record.answer,
                "image": record.data_id,
                "kind": record.data_type,
                "type": names[record.question_type_id],
                "official_id": record.question_id,
                "optional": record.data_type == "video",
            },
        )


BENCHMARK = Benchmark(
    name="seedbench",
    metrics=(
        Metric("image", "%", "image questions"),
        Metric("video", "%", "video questions, where they were answered"),
        Metric("total", "%", "image and video questions, where both were answered"),
        Metric("type", "%", "questions of one type, by its official name"),
    ),
    splits={"image": Split(14233)},
    protocol=(
        "SEED-Bench 1, image questions (types 1 to 9), LLaVA-1.5 prompt (question, four lettered "
        "choices, then `Answer with the option's letter from the given choices directly.`), "
        "greedy; the text must equal the letter; mean over questions; 95 % interval: cluster "
        "bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    submission=make_upload,
)
