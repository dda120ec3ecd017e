"""GQA, testdev_balanced: questions about real pictures that were made from scene graphs.

A text without its trailing periods, in lower case, must equal the one gold answer. Nothing else is forgiven: "yes ", "Yes!" and
"the left" are wrong, "YES..." is right. Chi-square `distribution` says how far the answers of each question group are from the gold ones.

Source: official `eval.py` of GQA 1.2, in the copy of BAAI-DCAI/Bunny 08273acb `eval/gqa/eval_gqa.py` (validity, plausibility, consistency
and grounding need files that GQA 1.2 lacks); haotian-liu/LLaVA c121f043 `scripts/convert_gqa_for_eval.py`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Judgement, Metric, Question
from mipha.evaluation.files import field, find, image_file, official_root, read_json
from mipha.evaluation.prompts import SHORT

MAX_NEW_TOKENS = 128
SPLITS = ("testdev_balanced",)
SIZES = {"testdev_balanced": 12578}
SERVERS: dict[str, str] = {}
JUDGE = None
BASELINES: dict[str, Callable[[Sequence[Question]], dict[str, str]]] = {}
FILE = "testdev_balanced_questions.json"
SOURCE = f"get {FILE} (questions1.2.zip) and images/ (images.zip) from cs.stanford.edu/people/dorarad/gqa/download.html, both into one folder"
PROTOCOL = (
    "GQA testdev_balanced, LLaVA-1.5 prompt (question, then `Answer the question using a single word or phrase.`), greedy; the text "
    "without trailing periods, in lower case, must equal the gold answer; mean over balanced questions; 95 % interval: cluster bootstrap "
    "over images"
)
METRICS = (
    Metric("accuracy", "%", "all balanced questions"),
    Metric("binary", "%", "questions with two possible answers: every structural type but query"),
    Metric("open", "%", "questions of structural type query"),
    Metric("structural", "%", "questions of one structural type"),
    Metric(
        "semantic",
        "%",
        "questions of one semantic type: attr (attribute), cat (category), global (scene), obj (object), rel (relation)",
    ),
    Metric("steps", "%", "questions of so many reasoning steps"),
    Metric("words", "%", "questions of so many words"),
    Metric(
        "distribution",
        "points",
        "chi-square of given against gold answers, by question group, over 100; lower is better",
    ),
)
_GROUPS = ("structural", "semantic", "steps", "words")
_NO_STEP = ("exist", "query: name", "choose name")
"""Operations that the official scorer does not count as a step of reasoning: they only ask for the end."""


def questions(root: Path | None, split: str) -> list[Question]:
    """Every question in the order of the file.

    Args:
        root: Folder with the question file and `images/<imageId>.jpg`.
        split: `testdev_balanced`.

    Returns:
        Questions whose facts are `answer`, `image` (id), `balanced`, `structural`, `semantic`, `steps`, `words` and `group` (what
        `distribution` counts together, or None).

    Raises:
        FileNotFoundError: The file or an image is missing.
        ValueError: No folder, no such split, or a malformed file.
    """
    root = official_root("gqa", root, split, SPLITS, SOURCE)
    paths: dict[str, Path] = {}
    asked = []
    for question_id, text, facts in _records(root):
        image = facts["image"]
        paths[image] = paths.get(image) or image_file(root / "images" / f"{image}.jpg", SOURCE)
        asked.append(Question(question_id, text + SHORT, paths[image], facts))
    return asked


def annotations(path: Path) -> list[Question]:
    """The labelled questions of the official file, or of the folder that holds it."""
    return [Question(question_id, text, None, facts) for question_id, text, facts in _records(path)]


def read_answer(text: str) -> str:
    """The text as it is compared and uploaded: trailing periods off, then lower case; white space stays."""
    return text.rstrip(".").lower()


def score(questions: Sequence[Question], predictions: Mapping[str, str]) -> Judgement:
    """Exact match of every question; questions outside the balanced set count in no metric, as in the official scorer."""
    normalised = {question.id: read_answer(predictions[question.id]) for question in questions}
    right = {
        question.id: float(normalised[question.id] == question.facts["answer"])
        for question in questions
    }
    contributions = [
        (question.facts["image"], dict.fromkeys(_names(question.facts), right[question.id]))
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
    """Percent right of all, of binary and open questions, and of each group in the official order."""
    found = [name for name in ("binary", "open") if name in totals.names]
    for group in _GROUPS:
        members = [name for name in totals.names if name.startswith(f"{group}.")]
        found += (
            sorted(members, key=lambda name: (len(name), name))
            if group in ("steps", "words")
            else sorted(members)
        )
    return {name: 100 * totals.mean(name) for name in ("accuracy", *found)}


def submission(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """The predictions file of the official scorer."""
    rows = [
        {"questionId": question.id, "prediction": read_answer(predictions[question.id])}
        for question in questions
    ]
    return {"testdev_balanced_predictions.json": json.dumps(rows).encode()}


def doubts(questions: Sequence[Question], split: str) -> list[str]:
    """A sentence if not all questions are of the balanced set."""
    others = sum(not question.facts["balanced"] for question in questions)
    return (
        [f"{others:,} questions are not of the balanced set and count for nothing: get {FILE}"]
        if others
        else []
    )


def _records(root: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Id, question and facts of every record."""
    path = find(root, (FILE,), SOURCE)
    records = read_json(path)
    if not isinstance(records, dict):
        raise ValueError(f"{path} is not an object of questions by id: {SOURCE}")
    for question_id, record in records.items():
        where = f"{path} question {question_id}"
        text, answer = field(record, "question", where), field(record, "answer", where)
        if not isinstance(text, str) or not isinstance(answer, str):
            raise ValueError(
                f"{where}: question and answer are {text!r} and {answer!r}, not two texts: get the file again"
            )
        kinds = field(record, "types", where)
        yield (
            question_id,
            text,
            {
                "answer": answer,
                "image": field(record, "imageId", where),
                "balanced": bool(field(record, "isBalanced", where)),
                "structural": field(kinds, "structural", where),
                "semantic": field(kinds, "semantic", where),
                "steps": _num_steps(field(record, "semantic", where), where),
                "words": len(text.split()),
                "group": field(field(record, "groups", where), "global", where),
            },
        )


def _num_steps(program: Any, where: str) -> int:
    """Reasoning steps of a question's program, without the last one that only asks."""
    steps = [
        f"{field(step, 'operation', where)}: {field(step, 'argument', where)}" for step in program
    ]
    return sum(not any(words in step for words in _NO_STEP) for step in steps)


def _names(facts: Mapping[str, Any]) -> list[str]:
    """Metrics that a question counts for."""
    if not facts["balanced"]:
        return []
    kind = "open" if facts["structural"] == "query" else "binary"
    return ["accuracy", kind, *(f"{group}.{facts[group]}" for group in _GROUPS)]


def _distribution(questions: Sequence[Question], given: Mapping[str, str]) -> float:
    """Chi-square over the gold answers of each group, averaged over groups by their size, over 100; NaN without a group."""
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
