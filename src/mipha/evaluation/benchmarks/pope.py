"""POPE on COCO: is there a thing in the image? Mean F1 over three ways to choose absent things.

The words between single spaces count, of the text before the first period, without commas: "No",
"no" or "not" among them is no, everything else is yes. So "NO", "No!", "no\\nit is", "None",
"cannot" and an empty text are yes.

Source: haotian-liu/LLaVA c121f043 `llava/eval/eval_pope.py` (it pairs answers and labels by order;
    here they are joined by id, which is the same for a file in order); files of AoiDragon/POPE
    e3e3926 `output/coco`, the version that LLaVA pins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals, ratio
from mipha.evaluation.answer_files import read_answer_records
from mipha.evaluation.answers import SHORT
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import OfficialRecord, find, image_file, read_record, refuse_repeated
from mipha.files import read_json_lines

SUBSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""Subset to what is added to its official ids, which start anew in each.

Source: LLaVA's `llava_pope_test.jsonl`.
"""
_OFFSETS = [offset for offset in SUBSETS.values() if offset]
SOURCE = (
    "get coco_pope_adversarial.json, coco_pope_random.json and coco_pope_popular.json from "
    "github.com/AoiDragon/POPE at commit e3e3926, output/coco, and COCO's val2014 images, all into "
    "one folder"
)
_COUNTS = ("TP", "FP", "TN", "FN")


class _Line(OfficialRecord):
    question_id: int = Field(ge=0, lt=10_000_000)
    image: str
    text: str
    label: Literal["yes", "no"]


def read(root: Path, split: str) -> list[Question]:
    """Return every question: adversarial, random, popular, each in the order of its file.

    Args:
        root: Folder with the three files (or with `coco/` that holds them) and `val2014/`.
        split: `test`.

    Returns:
        Questions whose facts are `answer` (yes or no), `image` (name) and `subset`.
    """
    return [
        Question(
            question_id, text + SHORT, image_file(root / "val2014" / facts["image"], SOURCE), facts
        )
        for question_id, text, facts in _read_lines(root)
    ]


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions of the folder with the three files."""
    return [
        Question(question_id, text, None, facts) for question_id, text, facts in _read_lines(path)
    ]


def read_answer(text: str) -> str:
    """Return yes or no: nothing is unreadable."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def read_answer_folder(
    folder: Path, questions: Sequence[Question]
) -> Iterator[tuple[str, str, str]]:
    """Yield place, id and text of every answer in a folder with a file for each subset.

    The subset stands in the file's name, so the ids may be POPE's own, which start anew in each.

    Raises:
        ValueError: A subset has no file, or several.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jsonl"))
    for subset, offset in SUBSETS.items():
        own = [path for path in paths if subset in path.name]
        if len(own) != 1:
            raise ValueError(
                f"{folder} has {len(own)} files with {subset} in their names, not one: give a "
                f"folder with a predictions file for each of {', '.join(SUBSETS)}"
            )
        for where, question_id, text in read_answer_records(own[0]):
            is_own_id = question_id.isdecimal() and int(question_id) < min(_OFFSETS)
            yield where, str(int(question_id) + offset) if is_own_id else question_id, text


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge whether yes or no is right, and which of TP, FP, TN and FN each question is."""
    parsed = {question.id: read_answer(predictions[question.id]) for question in questions}
    right = {
        question.id: float(parsed[question.id] == question.facts["answer"])
        for question in questions
    }

    outcome = {("yes", 1.0): "TP", ("yes", 0.0): "FP", ("no", 1.0): "TN", ("no", 0.0): "FN"}
    contributions = []
    for question in questions:
        found, subset = outcome[parsed[question.id], right[question.id]], question.facts["subset"]
        amounts = {f"{subset}.{count}": float(count == found) for count in _COUNTS}
        contributions.append((question.facts["image"], amounts))
    return Judgement(per_question=right, contributions=contributions, parsed=parsed)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return mean F1 and each subset's numbers in percent.

    A number is undefined where the official scorer divides by zero.
    """
    subsets = {subset: _measure_subset(totals, subset) for subset in SUBSETS}
    mean = sum(numbers["f1"] for numbers in subsets.values()) / len(subsets)
    return {"f1": np.asarray(mean)} | {
        f"{subset}.{name}": value
        for subset, numbers in subsets.items()
        for name, value in numbers.items()
    }


def find_doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Return a sentence if the random subset is not the one of the published numbers."""
    if sum(question.facts["subset"] == "random" for question in questions) != 3000:
        return []
    return [
        "coco_pope_random.json has 3,000 questions, but published numbers are of its 2,910-line "
        "version, so the F1 is not comparable: get it from github.com/AoiDragon/POPE at commit "
        "e3e3926, output/coco"
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


def _read_lines(root: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield id, question and facts of every line of the three files."""
    if root.is_file():
        names = ", ".join(f"coco_pope_{subset}.json" for subset in SUBSETS)
        raise ValueError(f"{root} is one file: give the folder with {names}")

    for subset, offset in SUBSETS.items():
        name = f"coco_pope_{subset}.json"
        path = find(root, (name, f"coco/{name}"), SOURCE)
        place_of: dict[int, str] = {}
        for number, row in read_json_lines(path):
            where = f"{path} line {number}"
            line = read_record(_Line, row, where)
            refuse_repeated(place_of, line.question_id, where)
            facts = {"answer": line.label, "image": line.image, "subset": subset}
            yield str(line.question_id + offset), line.text, facts


BENCHMARK = Benchmark(
    name="pope",
    metrics=(
        Metric("f1", "%", "mean of the three subsets' F1"),
        *(
            Metric(
                f"{subset}.{count}",
                "questions",
                f"{count} of the {subset} subset, yes being positive",
            )
            for subset in SUBSETS
            for count in _COUNTS
        ),
        *(
            Metric(
                subset,
                "%",
                f"{subset} subset: f1, accuracy, precision, recall, and yes_ratio "
                "(share of answers that are yes)",
            )
            for subset in SUBSETS
        ),
    ),
    splits={"test": Split(8910)},
    protocol=(
        "POPE on COCO val2014, LLaVA-1.5 prompt (question, then `Answer the question using a "
        "single word or phrase.`), greedy; the word No, no or not before the first period is no, "
        "all else is yes; mean of the F1 of adversarial, random and popular, yes being positive; "
        "95 % interval: cluster bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    doubts=find_doubts,
    id_advice=(
        "POPE's files start their ids anew, so add 10,000,000 to those of random and 20,000,000 to "
        "those of popular, or give a folder with a predictions file for each subset, named after it"
    ),
    read_answer_folder=read_answer_folder,
)
