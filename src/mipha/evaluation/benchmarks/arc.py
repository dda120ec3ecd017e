"""ARC: science questions of schools without an image, to see what a language model has forgotten.

The model is not asked. Each option's text stands behind the question, and the likeliest is its
answer; `acc_norm` divides the log-likelihood by the length of the text. So a model that answers
questions about images and its language model before that training are measured alike.

    Question: Which is a metal?
    Answer: iron

Source: EleutherAI/lm-evaluation-harness 0671c9cc `lm_eval/tasks/arc/arc_easy.yaml`,
    `lm_eval/api/task.py` (acc, acc_norm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    find_shards,
    read_parquet,
    read_record,
    refuse_repeated,
)
from mipha.evaluation.likelihoods import read_likelihoods

CONFIGS = {"challenge": "ARC-Challenge", "easy": "ARC-Easy"}
SOURCE = (
    "get ARC-Challenge/test-*.parquet (or ARC-Easy/test-*.parquet) from "
    "huggingface.co/datasets/allenai/ai2_arc"
)


class _Choices(OfficialRecord):
    text: list[str] = Field(min_length=2)
    label: list[str]


class _Row(OfficialRecord):
    id: str
    question: str
    choices: _Choices
    answerKey: str


def read(root: Path, split: str) -> list[Question]:
    """Return every question in the order of the file.

    Args:
        root: Folder with ARC-Challenge/ and ARC-Easy/, or one .parquet file.
        split: `challenge` or `easy`.

    Returns:
        Questions whose facts are `continuations` (the options behind a space), `options`, `labels`
        (of the options) and `answer` (label of the right one).
    """
    config = CONFIGS[split]
    place_of: dict[str, str] = {}
    questions = []
    for path in find_shards(root, (f"{config}/test-*.parquet", f"{config}/test.parquet"), SOURCE):
        for where, cells in read_parquet(path, ("id", "question", "choices", "answerKey")):
            row = read_record(_Row, cells, where)
            refuse_repeated(place_of, row.id, where, "id")
            labels = row.choices.label
            if row.answerKey not in labels or len(labels) != len(row.choices.text):
                raise ValueError(
                    f"{where}: answerKey {row.answerKey!r} should be one of {', '.join(labels)}, "
                    f"the labels of its {len(row.choices.text)} options: {AGAIN}"
                )
            facts = {
                "continuations": tuple(f" {text}" for text in row.choices.text),
                "options": tuple(row.choices.text),
                "labels": tuple(labels),
                "answer": row.answerKey,
            }
            questions.append(Question(row.id, f"Question: {row.question}\nAnswer:", None, facts))
    return questions


def read_labels(path: Path) -> list[Question]:
    """Return the questions of the challenge set, or of a file."""
    return read(path, "challenge")


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge whether the likeliest option is the right one."""
    right: dict[str, float] = {}
    parsed: dict[str, str | None] = {}
    contributions = []
    for question in questions:
        facts = question.facts
        values = np.array(read_likelihoods(question, predictions))
        lengths = np.array([len(option) for option in facts["options"]])
        chosen = int(np.argmax(values / np.maximum(lengths, 1)))
        parsed[question.id] = facts["labels"][chosen]
        right[question.id] = float(parsed[question.id] == facts["answer"])
        likeliest = facts["labels"][int(np.argmax(values))]
        amounts = {
            "acc_norm": right[question.id],
            "acc": float(likeliest == facts["answer"]),
        }
        contributions.append((question.id, amounts))
    return Judgement(per_question=right, contributions=contributions, parsed=parsed)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right."""
    return {name: 100 * totals.mean(name) for name in ("acc_norm", "acc")}


BENCHMARK = Benchmark(
    name="arc",
    metrics=(
        Metric("acc_norm", "%", "questions whose right option is the likeliest for its length"),
        Metric("acc", "%", "questions whose right option is the likeliest"),
    ),
    splits={"challenge": Split(1172), "easy": Split(2376)},
    protocol=(
        "ARC test without examples and without a chat template: `Question: ...`, `Answer:`, and "
        "the log-likelihood of each option's text, by its number of characters (lm-evaluation-"
        "harness); mean over questions; 95 % interval: bootstrap over questions"
    ),
    source=SOURCE,
    max_new_tokens=0,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    by_likelihood=True,
)
