"""ScienceQA, test: multiple choice from school lessons; the paper's number is over the questions that have an image.

A letter counts if the text is one of A to E, or starts with `X. `, or holds `The answer is X` and one more character exactly once.
So "A.", "(A)", "a" and "The answer is A" at the very end are unreadable, and "The answer is AB." is A.

Source: haotian-liu/LLaVA c121f043 `llava/eval/eval_science_qa.py`, `llava/eval/model_vqa_science.py` with `--single-pred-prompt`, and its
prompts `llava_test_CQM-A.json`; files of lupantech/ScienceQA 2cbf8318.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Judgement, Metric, Question
from mipha.evaluation.files import field, find, image_file, official_root, read_json
from mipha.evaluation.prompts import LETTER, options

MAX_NEW_TOKENS = 1024
SPLITS = ("test",)
SIZES = {"test": 4241}
SERVERS: dict[str, str] = {}
JUDGE = None
BASELINES: dict[str, Callable[[Sequence[Question]], dict[str, str]]] = {}
NUM_WITH_IMAGE = 2017
PROMPTS = "llava_test_CQM-A.json"
SOURCE = (
    "get problems.json, pid_splits.json (github.com/lupantech/ScienceQA, data/scienceqa) and images/test/<id>/image.png "
    "(its tools/download.sh), all into one folder"
)
PROTOCOL = (
    "ScienceQA test, LLaVA-1.5 prompt (`Context: hint` if any, question, lettered options, then `Answer with the option's letter from the "
    "given choices directly.`), greedy; text is a letter A to E, or starts with `X. `, or has `The answer is X` once; mean over the "
    "questions with an image; 95 % interval: bootstrap over questions, each of which has its own image"
)
METRICS = (
    Metric("img_accuracy", "%", "IMG-Accuracy: questions with an image"),
    Metric("accuracy", "%", "all questions"),
    Metric("correct", "questions", "right answers"),
    Metric("total", "questions", "questions"),
)
_LETTERS = "ABCDE"
"""The official scorer knows five options; no question has more."""


def questions(root: Path | None, split: str) -> list[Question]:
    """Every test question in the order of `pid_splits.json`, those without an image too.

    Args:
        root: Folder with `problems.json`, `pid_splits.json` and `images/test/<id>/image.png`; prompts are taken from LLaVA's
            `llava_test_CQM-A.json` if that lies there as well.
        split: `test`.

    Returns:
        Questions whose facts are `answer` (letter) and `has_image`.

    Raises:
        FileNotFoundError: A file or an image is missing.
        ValueError: No folder, no such split, or a malformed file.
    """
    root = official_root("scienceqa", root, split, SPLITS, SOURCE)
    prompts = _prompts(root / PROMPTS) if (root / PROMPTS).is_file() else None
    asked = []
    for question_id, problem, facts, where in _records(root):
        if prompts is None:
            hint = field(problem, "hint", where)
            prompt = (
                (f"Context: {hint}\n" if hint else "")
                + problem["question"]
                + options(problem["choices"])
            )
        else:
            prompt = field(prompts, question_id, str(root / PROMPTS))
        image = (
            image_file(root / "images" / split / question_id / problem["image"], SOURCE)
            if facts["has_image"]
            else None
        )
        asked.append(Question(question_id, prompt.strip() + LETTER, image, facts))
    return asked


def annotations(path: Path) -> list[Question]:
    """The labelled test questions of a folder with `problems.json` and `pid_splits.json`."""
    return [
        Question(question_id, problem["question"], None, facts)
        for question_id, problem, facts, _ in _records(path)
    ]


def read_letter(text: str) -> str | None:
    """The letter that a text gives, verbatim; None where the official scorer notes FAILED.

    A letter that the question does not offer is still what was read; it is wrong.
    """
    if len(text) == 1 and text in _LETTERS:
        return text
    if len(text) >= 3 and text[0] in _LETTERS and text[1:3] == ". ":
        return text[0]
    # The last dot of the official pattern is not escaped: it is any character but a newline.
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def score(questions: Sequence[Question], predictions: Mapping[str, str]) -> Judgement:
    """Whether the letter read is that of the right choice."""
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
    """Percent right of the questions with an image and of all, then the two counts that the official scorer prints."""
    return {
        "img_accuracy": 100 * totals.mean("img_accuracy"),
        "accuracy": 100 * totals.mean("accuracy"),
        "correct": totals.sum("accuracy"),
        "total": totals.count("accuracy"),
    }


def submission(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """Nothing: the labels are public."""
    return {}


def doubts(questions: Sequence[Question], split: str) -> list[str]:
    """A sentence if the whole test split has another number of images than the published one."""
    with_image = sum(question.facts["has_image"] for question in questions)
    if len(questions) != SIZES[split] or with_image == NUM_WITH_IMAGE:
        return []
    return [
        f"{with_image:,} questions have an image, not the {NUM_WITH_IMAGE:,} of the published numbers: get problems.json again"
    ]


def _records(root: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], str]]:
    """Id, problem, facts and place of every test question."""
    if root.is_file():
        raise ValueError(
            f"{root} is one file: give the folder with problems.json and pid_splits.json"
        )
    problems_path, splits_path = (
        find(root, (name,), SOURCE) for name in ("problems.json", "pid_splits.json")
    )
    problems = read_json(problems_path)
    for question_id in field(read_json(splits_path), "test", str(splits_path)):
        if question_id not in problems:
            raise ValueError(
                f"{problems_path} has no problem {question_id}, which {splits_path} names: get both files again"
            )
        problem, where = problems[question_id], f"{problems_path} problem {question_id}"
        text, choices, answer, image = (
            field(problem, key, where) for key in ("question", "choices", "answer", "image")
        )
        if (
            not isinstance(text, str)
            or not isinstance(choices, list)
            or not 2 <= len(choices) <= len(_LETTERS)
        ):
            raise ValueError(
                f"{where} has the question {text!r} and the choices {choices!r}, not a text and 2 to 5 choices: get the file again"
            )
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(
                f"{where} has the answer {answer!r}, not the index of one of its {len(choices)} choices: get the file again"
            )
        yield (
            question_id,
            problem,
            {"answer": _LETTERS[answer], "has_image": image is not None},
            where,
        )


def _prompts(path: Path) -> dict[str, str]:
    """Question id to LLaVA's human turn without the image marker."""
    prompts = {}
    for number, record in enumerate(read_json(path)):
        where = f"{path} record {number}"
        turns = field(record, "conversations", where)
        prompts[field(record, "id", where)] = (
            field(turns[0] if turns else None, "value", where).replace("<image>", "").strip()
        )
    return prompts
