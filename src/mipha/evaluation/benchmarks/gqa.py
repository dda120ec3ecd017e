"""GQA, testdev_balanced: questions about real images that were made from scene graphs.

A text without its trailing periods, in lower case, must equal the one gold answer. Nothing else is
forgiven: "yes ", "Yes!" and "the left" are wrong, "YES..." is right. Chi-square `distribution` says
how far the answers of each question group are from the gold ones.

Source: official `eval.py` of GQA 1.2, in the copy of BAAI-DCAI/Bunny 08273acb
    `eval/gqa/eval_gqa.py` (validity, plausibility, consistency and grounding need files that GQA
    1.2 lacks); haotian-liu/LLaVA c121f043 `scripts/convert_gqa_for_eval.py`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import SHORT
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import OfficialRecord, find, image_file, read_official, read_record

FILE = "testdev_balanced_questions.json"
SOURCE = (
    f"get {FILE} (questions1.2.zip) and images/ (images.zip) from "
    "cs.stanford.edu/people/dorarad/gqa/download.html, both into one folder"
)
_GROUPS = ("structural", "semantic", "steps", "words")
_NO_STEP = ("exist", "query: name", "choose name")
"""Operations that the official scorer does not count as a reasoning step: they end a program."""


class _Step(OfficialRecord):
    operation: str
    argument: str


class _Types(OfficialRecord):
    structural: str
    semantic: str


class _Groups(OfficialRecord):
    whole: str | None = Field(alias="global")


class _Record(OfficialRecord):
    question: str
    answer: str
    image: str = Field(alias="imageId")
    balanced: bool = Field(alias="isBalanced")
    types: _Types
    semantic: list[_Step]
    groups: _Groups


def read(root: Path, split: str) -> list[Question]:
    """Return every question in the order of the file.

    Args:
        root: Folder with the question file and `images/<imageId>.jpg`.
        split: `testdev_balanced`.

    Returns:
        Questions whose facts are `answer`, `image` (id), `balanced`, `structural`, `semantic`,
        `steps`, `words` and `group` (what `distribution` counts together, or None).
    """
    paths: dict[str, Path] = {}
    asked = []
    for question_id, text, facts in _read_records(root):
        image = facts["image"]
        paths[image] = paths.get(image) or image_file(root / "images" / f"{image}.jpg", SOURCE)
        asked.append(Question(question_id, text + SHORT, paths[image], facts))
    return asked


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions of the official file, or of the folder that holds it."""
    return [
        Question(question_id, text, None, facts) for question_id, text, facts in _read_records(path)
    ]


def read_answer(text: str) -> str:
    """Return the text as it is compared and uploaded: no trailing periods, then lower case."""
    return text.rstrip(".").lower()


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge by exact match.

    Questions outside the balanced set count in no metric, as in the official scorer.
    """
    normalised = {question.id: read_answer(predictions[question.id]) for question in questions}
    right = {
        question.id: float(normalised[question.id] == question.facts["answer"])
        for question in questions
    }

    contributions = [
        (question.facts["image"], dict.fromkeys(_metrics_of(question.facts), right[question.id]))
        for question in questions
    ]
    return Judgement(
        per_question=right,
        contributions=contributions,
        normalised=normalised,
        submission=normalised,
        extra={"distribution": _distribution(questions, normalised)},
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right of all, of binary and open questions, and of each group.

    Groups stand in the official order.
    """
    found = [name for name in ("binary", "open") if name in totals.names]
    for group in _GROUPS:
        members = [name for name in totals.names if name.startswith(f"{group}.")]
        if group in ("steps", "words"):
            found += sorted(members, key=lambda name: (len(name), name))
        else:
            found += sorted(members)
    return {name: 100 * totals.mean(name) for name in ("accuracy", *found)}


def make_upload(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """Return the predictions file of the official scorer."""
    rows = [
        {"questionId": question.id, "prediction": read_answer(predictions[question.id])}
        for question in questions
    ]
    return {"testdev_balanced_predictions.json": json.dumps(rows).encode()}


def find_doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Return a sentence if not all questions are of the balanced set."""
    others = sum(not question.facts["balanced"] for question in questions)
    if not others:
        return []
    return [f"{others:,} questions are not of the balanced set and count for nothing: get {FILE}"]


def _read_records(root: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield id, question and facts of every record."""
    path = find(root, (FILE,), SOURCE)
    records = read_official(path)
    if not isinstance(records, dict):
        raise ValueError(f"{path} is not an object of questions by id: {SOURCE}")

    for question_id, content in records.items():
        record = read_record(_Record, content, f"{path} question {question_id}")
        yield (
            question_id,
            record.question,
            {
                "answer": record.answer,
                "image": record.image,
                "balanced": record.balanced,
                "structural": record.types.structural,
                "semantic": record.types.semantic,
                "steps": _count_steps(record.semantic),
                "words": len(record.question.split()),
                "group": record.groups.whole,
            },
        )


def _count_steps(program: Sequence[_Step]) -> int:
    """Return the reasoning steps of a question's program, without the last one that only asks."""
    steps = [f"{step.operation}: {step.argument}" for step in program]
    return sum(not any(words in step for words in _NO_STEP) for step in steps)


def _metrics_of(facts: Mapping[str, Any]) -> list[str]:
    """Return the metrics that a question counts for."""
    if not facts["balanced"]:
        return []
    kind = "open" if facts["structural"] == "query" else "binary"
    return ["accuracy", kind, *(f"{group}.{facts[group]}" for group in _GROUPS)]


def _distribution(questions: Sequence[Question], given: Mapping[str, str]) -> float:
    """Return the chi-square of given against gold answers; NaN without a group.

    Groups are averaged by their size, and the mean is divided by 100.
    """
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        group = question.facts["group"]
        if question.facts["balanced"] and group is not None:
            gold[group][question.facts["answer"]] += 1
            predicted[group][given[question.id]] += 1

    weighted = sum(
        counts.total()
        * sum((predicted[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in gold.items()
    )
    total = sum(counts.total() for counts in gold.values())
    return weighted / total / 100 if total else float("nan")


BENCHMARK = Benchmark(
    name="gqa",
    metrics=(
        Metric("accuracy", "%", "all balanced questions"),
        Metric(
            "binary", "%", "questions with two possible answers: every structural type but query"
        ),
        Metric("open", "%", "questions of structural type query"),
        Metric("structural", "%", "questions of one structural type"),
        Metric(
            "semantic",
            "%",
            "questions of one semantic type: attr (attribute), cat (category), global (scene), "
            "obj (object), rel (relation)",
        ),
        Metric("steps", "%", "questions of so many reasoning steps"),
        Metric("words", "%", "questions of so many words"),
        Metric(
            "distribution",
            "points",
            "chi-square of given against gold answers, by question group, over 100; "
            "lower is better",
        ),
    ),
    splits={"testdev_balanced": Split(12578)},
    protocol=(
        "GQA testdev_balanced, LLaVA-1.5 prompt (question, then `Answer the question using a "
        "single word or phrase.`), greedy; the text without trailing periods, in lower case, must "
        "equal the gold answer; mean over balanced questions; 95 % interval: cluster bootstrap "
        "over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    submission=make_upload,
    doubts=find_doubts,
)
