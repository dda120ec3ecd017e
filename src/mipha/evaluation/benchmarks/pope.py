"""POPE on COCO: is there a thing in the image? Adversarial, random and popular things that are not there; mean of the three F1.

Of the text before the first period, without commas, the words between single spaces count: "No", "no" or "not" among them is no,
everything else is yes. So "NO", "No!", "no\\nit is", "None", "cannot" and an empty text are yes.

Source: haotian-liu/LLaVA c121f043 `llava/eval/eval_pope.py` (its pairing of answers and labels by order is a join by id here, which is the
same for a file in order); files of AoiDragon/POPE e3e3926 `output/coco`, the version that LLaVA pins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals, ratio
from mipha.evaluation.benchmark import Judgement, Metric, Question
from mipha.evaluation.files import field, find, image_file, official_root, read_json_lines
from mipha.evaluation.prompts import SHORT

MAX_NEW_TOKENS = 128
SPLITS = ("test",)
SIZES = {"test": 8910}
SERVERS: dict[str, str] = {}
JUDGE = None
BASELINES: dict[str, Callable[[Sequence[Question]], dict[str, str]]] = {}
SUBSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""Subset to what is added to its official ids, which start anew in each. Source: LLaVA's `llava_pope_test.jsonl`."""
SOURCE = (
    "get coco_pope_adversarial.json, coco_pope_random.json and coco_pope_popular.json from github.com/AoiDragon/POPE at commit e3e3926, "
    "output/coco, and COCO's val2014 images, all into one folder"
)
PROTOCOL = (
    "POPE on COCO val2014, LLaVA-1.5 prompt (question, then `Answer the question using a single word or phrase.`), greedy; the word No, no "
    "or not before the first period is no, all else is yes; mean of the F1 of adversarial, random and popular, yes being positive; "
    "95 % interval: cluster bootstrap over images"
)
_COUNTS = ("TP", "FP", "TN", "FN")
METRICS = (
    Metric("f1", "%", "mean of the three subsets' F1"),
    *(
        Metric(
            f"{subset}.{count}", "questions", f"{count} of the {subset} subset, yes being positive"
        )
        for subset in SUBSETS
        for count in _COUNTS
    ),
    *(
        Metric(
            subset,
            "%",
            f"{subset} subset: f1, accuracy, precision, recall, and yes_ratio (share of answers that are yes)",
        )
        for subset in SUBSETS
    ),
)


def questions(root: Path | None, split: str) -> list[Question]:
    """Every question: adversarial, random, popular, each in the order of its file.

    Args:
        root: Folder with the three files (or with `coco/` that holds them) and `val2014/`.
        split: `test`.

    Returns:
        Questions whose facts are `answer` (yes or no), `image` (name) and `subset`.

    Raises:
        FileNotFoundError: A file or an image is missing.
        ValueError: No folder, no such split, or a malformed line.
    """
    root = official_root("pope", root, split, SPLITS, SOURCE)
    paths: dict[str, Path] = {}
    asked = []
    for question_id, text, facts in _records(root):
        image = facts["image"]
        paths[image] = paths.get(image) or image_file(root / "val2014" / image, SOURCE)
        asked.append(Question(question_id, text + SHORT, paths[image], facts))
    return asked


def annotations(path: Path) -> list[Question]:
    """The labelled questions of the folder with the three files."""
    return [Question(question_id, text, None, facts) for question_id, text, facts in _records(path)]


def read_answer(text: str) -> str:
    """Yes or no: there is nothing that cannot be read."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(questions: Sequence[Question], predictions: Mapping[str, str]) -> Judgement:
    """Whether yes or no was right, and which of TP, FP, TN and FN each question is."""
    parsed = {question.id: read_answer(predictions[question.id]) for question in questions}
    right = {
        question.id: float(parsed[question.id] == question.facts["answer"])
        for question in questions
    }
    outcome = {("yes", 1.0): "TP", ("yes", 0.0): "FP", ("no", 1.0): "TN", ("no", 0.0): "FN"}
    contributions = []
    for question in questions:
        found, subset = outcome[parsed[question.id], right[question.id]], question.facts["subset"]
        contributions.append(
            (
                question.facts["image"],
                {f"{subset}.{count}": float(count == found) for count in _COUNTS},
            )
        )
    return Judgement(per_question=right, contributions=contributions, parsed=parsed)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Mean F1 and each subset's numbers in percent; undefined where the official scorer divides by zero."""
    subsets = {subset: _measure_subset(totals, subset) for subset in SUBSETS}
    mean = sum(numbers["f1"] for numbers in subsets.values()) / len(subsets)
    return {"f1": np.asarray(mean)} | {
        f"{subset}.{name}": value
        for subset, numbers in subsets.items()
        for name, value in numbers.items()
    }


def submission(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """Nothing: the labels are public."""
    return {}


def doubts(questions: Sequence[Question], split: str) -> list[str]:
    """A sentence if the random subset is not the one of the published numbers."""
    if sum(question.facts["subset"] == "random" for question in questions) != 3000:
        return []
    return [
        "coco_pope_random.json has 3,000 questions, but published numbers are of its 2,910-line version, so the F1 is not comparable: "
        "get it from github.com/AoiDragon/POPE at commit e3e3926, output/coco"
    ]


def _measure_subset(totals: Totals, subset: str) -> dict[str, np.ndarray]:
    counts = {count: totals.sum(f"{subset}.{count}") for count in _COUNTS}
    tp, fp, tn, fn = counts.values()
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    numbers = {
        "f1": ratio(2 * precision * recall, precision + recall),
        "accuracy": ratio(tp + tn, tp + tn + fp + fn),
        "precision": precision,
        "recall": recall,
        "yes_ratio": ratio(tp + fp, tp + tn + fp + fn),
    }
    return {name: 100 * value for name, value in numbers.items()} | counts


def _records(root: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Id, question and facts of every line of the three files."""
    if root.is_file():
        raise ValueError(
            f"{root} is one file: give the folder with {', '.join(f'coco_pope_{subset}.json' for subset in SUBSETS)}"
        )
    for subset, offset in SUBSETS.items():
        name = f"coco_pope_{subset}.json"
        path = find(root, (name, f"coco/{name}"), SOURCE)
        seen: dict[int, int] = {}
        for number, row in read_json_lines(path):
            where = f"{path} line {number}"
            question_id, image, text, label = (
                field(row, key, where) for key in ("question_id", "image", "text", "label")
            )
            if type(question_id) is not int or not 0 <= question_id < 10_000_000:
                raise ValueError(
                    f"{where} has the question_id {question_id!r}, not a number below 10,000,000: get the file again"
                )
            if question_id in seen:
                raise ValueError(
                    f"{where} has the question_id {question_id} of line {seen[question_id]}: keep one of the two"
                )
            seen[question_id] = number
            if not isinstance(image, str) or not isinstance(text, str):
                raise ValueError(
                    f"{where} has the image {image!r} and the text {text!r}, not two texts: mend that line"
                )
            if label not in ("yes", "no"):
                raise ValueError(f"{where} has the label {label!r}, not yes or no: mend that line")
            yield (
                str(question_id + offset),
                text,
                {"answer": label, "image": image, "subset": subset},
            )
