"""ScienceQA, test: multiple choice from school lessons; headline: questions with an image.

A letter counts if the text is one of A to E, or starts with `X. `, or holds `The answer is X` and
one more character exactly once. So "A.", "(A)", "a" and "The answer is A" at the very end are
unreadable, and "The answer is AB." is A.

Source: haotian-liu/LLaVA c121f043 `llava/eval/eval_science_qa.py`,
    `llava/eval/model_vqa_science.py` with `--single-pred-prompt`, and its prompts
    `llava_test_CQM-A.json`; files of lupantech/ScienceQA 2cbf8318.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    find,
    image_file,
    read_official,
    read_record,
)
from mipha.evaluation.multiple_choice import LETTER, list_options

NUM_QUESTIONS = 4241
NUM_WITH_IMAGE = 2017
PROMPTS = "llava_test_CQM-A.json"
SOURCE = (
    "get problems.json, pid_splits.json (github.com/lupantech/ScienceQA, data/scienceqa) and "
    "images/test/<id>/image.png (its tools/download.sh), all into one folder"
)
_LETTERS = "ABCDE"
"""The official scorer knows five options; no question has more."""


class _Problem(OfficialRecord):
    question: str
    choices: list[str] = Field(min_length=2, max_length=len(_LETTERS))
    answer: int
    image: str | None
    hint: str

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> _Problem:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"has the answer {self.answer}, not the index of one of its "
                f"{len(self.choices)} choices"
            )
        return self


class _Splits(OfficialRecord):
    test: list[str]


class _Turn(OfficialRecord):
    value: str


class _Prompt(OfficialRecord):
    id: str
    conversations: list[_Turn] = Field(min_length=1)


def read(root: Path, split: str) -> list[Question]:
    """Return every test question in the order of `pid_splits.json`, those without an image too.

    Args:
        root: Folder with `problems.json`, `pid_splits.json` and `images/test/<id>/image.png`.
            Prompts come from LLaVA's `llava_test_CQM-A.json` if that lies there as well.
        split: `test`.

    Returns:
        Questions whose facts are `answer` (letter) and `has_image`.
    """
    prompts = _read_prompts(root / PROMPTS) if (root / PROMPTS).is_file() else None
    asked = []
    for question_id, problem, facts in _read_problems(root):
        if prompts is None:
            hint = f"Context: {problem.hint}\n" if problem.hint else ""
            prompt = hint + problem.question + list_options(problem.choices)
        elif question_id in prompts:
            prompt = prompts[question_id]
        else:
            raise ValueError(f"{root / PROMPTS} has no {question_id!r}: {AGAIN}")

        image = None
        if problem.image is not None:
            image = image_file(root / "images" / split / question_id / problem.image, SOURCE)
        asked.append(Question(question_id, prompt.strip() + LETTER, image, facts))
    return asked


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions of a folder with `problems.json` and `pid_splits.json`."""
    return [
        Question(question_id, problem.question, None, facts)
        for question_id, problem, facts in _read_problems(path)
    ]


def read_letter(text: str) -> str | None:
    """Return the letter that a text gives, verbatim; None where the official scorer says FAILED.

    A letter that the question does not offer is returned as well; it is wrong.
    """
    if len(text) == 1 and text in _LETTERS:
        return text
    if len(text) >= 3 and text[0] in _LETTERS and text[1:3] == ". ":
        return text[0]

    # The last dot of the official pattern is not escaped: it is any character but a newline.
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge whether the letter read is that of the right choice."""
    parsed = {question.id: read_letter(predictions[question.id]) for question in questions}
    right = {
        question.id: float(parsed[question.id] == question.facts["answer"])
        for question in questions
    }
    names = {True: ("img_accuracy", "accuracy"), False: ("accuracy",)}
    contributions = [
        (question.id, dict.fromkeys(names[question.facts["has_image"]], right[question.id]))
        for question in questions
    ]
    return Judgement(per_question=right, contributions=contributions, parsed=parsed)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right with an image and of all, then the official scorer's two counts."""
    return {
        "img_accuracy": 100 * totals.mean("img_accuracy"),
        "accuracy": 100 * totals.mean("accuracy"),
        "correct": totals.sum("accuracy"),
        "total": totals.count("accuracy"),
    }


def find_doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Return a sentence if the whole split has not the published number of images."""
    with_image = sum(question.facts["has_image"] for question in questions)
    if len(questions) != NUM_QUESTIONS or with_image == NUM_WITH_IMAGE:
        return []
    return [
        f"{with_image:,} questions have an image, not the {NUM_WITH_IMAGE:,} of the published "
        "numbers: get problems.json again"
    ]


def _read_problems(root: Path) -> Iterator[tuple[str, _Problem, dict[str, Any]]]:
    """Yield id, problem and facts of every test question."""
    if root.is_file():
        raise ValueError(
            f"{root} is one file: give the folder with problems.json and pid_splits.json"
        )
    problems_path = find(root, ("problems.json",), SOURCE)
    splits_path = find(root, ("pid_splits.json",), SOURCE)
    problems = read_official(problems_path)

    for question_id in read_record(_Splits, read_official(splits_path), str(splits_path)).test:
        if question_id not in problems:
            raise ValueError(
                f"{problems_path} has no problem {question_id}, which {splits_path} names: "
                "get both files again"
            )
        where = f"{problems_path} problem {question_id}"
        problem = read_record(_Problem, problems[question_id], where)
        facts = {"answer": _LETTERS[problem.answer], "has_image": problem.image is not None}
        yield question_id, problem, facts


def _read_prompts(path: Path) -> dict[str, str]:
    """Return question id to LLaVA's human turn without the image marker."""
    prompts = {}
    for number, content in enumerate(read_official(path)):
        record = read_record(_Prompt, content, f"{path} record {number}")
        prompts[record.id] = record.conversations[0].value.replace("<image>", "").strip()
    return prompts


BENCHMARK = Benchmark(
    name="scienceqa",
    metrics=(
        Metric("img_accuracy", "%", "IMG-Accuracy: questions with an image"),
        Metric("accuracy", "%", "all questions"),
        Metric("correct", "questions", "right answers"),
        Metric("total", "questions", "questions"),
    ),
    splits={"test": Split(NUM_QUESTIONS)},
    protocol=(
        "ScienceQA test, LLaVA-1.5 prompt (`Context: hint` if any, question, lettered options, "
        "then `Answer with the option's letter from the given choices directly.`), greedy; text is "
        "a letter A to E, or starts with `X. `, or has `The answer is X` once; mean over the "
        "questions with an image; 95 % interval: bootstrap over questions, each of which has its "
        "own image"
    ),
    source=SOURCE,
    max_new_tokens=1024,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    doubts=find_doubts,
)
