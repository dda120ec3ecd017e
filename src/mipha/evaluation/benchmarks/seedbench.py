"""SEED-Bench 1, image part: four choices, a letter; the text must be that letter and nothing else.

"A.", "(A)", "a" and "A. text" are wrong. The file asks about videos too. A model of single images is not asked those, but a predictions
file that answers them is scored on them: `annotations` gives them as well, marked `optional`, and `video` and `total` appear.

Source: haotian-liu/LLaVA c121f043 `scripts/convert_seed_for_submission.py` (it stops with a KeyError on a type without one right answer;
that type is 0 % here); AILab-CVC/SEED-Bench 991e849b `DATASET.md`. The `eval.py` there ranks choices by likelihood: no published number of
this protocol is made with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Judgement, Metric, Question
from mipha.evaluation.files import field, find, image_file, official_root, read_json
from mipha.evaluation.prompts import LETTER, options

MAX_NEW_TOKENS = 128
SPLITS = ("image",)
SIZES = {"image": 14233}
SERVERS: dict[str, str] = {}
JUDGE = None
BASELINES: dict[str, Callable[[Sequence[Question]], dict[str, str]]] = {}
FILE = "SEED-Bench.json"
IMAGES = "SEED-Bench-image"
SOURCE = f"get {FILE} and {IMAGES}.zip from huggingface.co/datasets/AILab-CVC/SEED-Bench, unpacked into one folder"
PROTOCOL = (
    "SEED-Bench 1, image questions (types 1 to 9), LLaVA-1.5 prompt (question, four lettered choices, then `Answer with the option's "
    "letter from the given choices directly.`), greedy; the text must equal the letter; mean over questions; 95 % interval: cluster "
    "bootstrap over images"
)
METRICS = (
    Metric("image", "%", "image questions"),
    Metric("video", "%", "video questions, where they were answered"),
    Metric("total", "%", "image and video questions, where both were answered"),
    Metric("type", "%", "questions of one type, by its official name"),
)
_LETTERS = "ABCD"


def questions(root: Path | None, split: str) -> list[Question]:
    """Every image question in the order of the file.

    Args:
        root: Folder with the question file and `SEED-Bench-image/<data_id>`.
        split: `image`.

    Returns:
        Questions whose facts are `answer` (letter), `image` (data_id), `kind` (image or video), `type` (official name), `official_id`
        (the id as the file has it) and `optional` (whether predictions may do without it).

    Raises:
        FileNotFoundError: The file or an image is missing.
        ValueError: No folder, no such split, or a malformed file.
    """
    root = official_root("seedbench", root, split, SPLITS, SOURCE)
    asked = []
    for record, facts, where in _records(root):
        if facts["kind"] == "image":
            choices = [field(record, f"choice_{letter}", where) for letter in _LETTERS.lower()]
            image = image_file(root / IMAGES / facts["image"], SOURCE)
            asked.append(
                Question(
                    str(facts["official_id"]),
                    record["question"] + options(choices) + LETTER,
                    image,
                    facts,
                )
            )
    return asked


def annotations(path: Path) -> list[Question]:
    """The labelled questions of the official file, or of the folder that holds it: about images, and (optional) about videos."""
    return [
        Question(str(facts["official_id"]), record["question"], None, facts)
        for record, facts, _ in _records(path)
    ]


def score(questions: Sequence[Question], predictions: Mapping[str, str]) -> Judgement:
    """Whether the text is the letter; a text that is none of the four letters was not read."""
    given = {question.id: predictions[question.id] for question in questions}
    right = {
        question.id: float(given[question.id] == question.facts["answer"]) for question in questions
    }
    contributions = [
        (
            question.facts["image"],
            dict.fromkeys(
                (question.facts["kind"], "total", f"type.{question.facts['type']}"),
                right[question.id],
            ),
        )
        for question in questions
    ]
    parsed = {
        name: text if len(text) == 1 and text in _LETTERS else None for name, text in given.items()
    }
    return Judgement(
        per_question=right, contributions=contributions, parsed=parsed, submission=given
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Percent right of image questions, of video questions and both together where videos were answered, and of each type."""
    both = ("video", "total") if "video" in totals.names else ()
    types = sorted(name for name in totals.names if name.startswith("type."))
    return {name: 100 * totals.mean(name) for name in ("image", *both, *types)}


def submission(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """The leaderboard's file, a line a question."""
    rows = (
        {"question_id": question.facts["official_id"], "prediction": predictions[question.id]}
        for question in questions
    )
    return {"seedbench_predictions.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


def doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Nothing beyond the number of questions is known to differ between copies."""
    return []


def _records(root: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Record, facts and place of every question about an image or a video."""
    path = find(root, (FILE,), SOURCE)
    content = read_json(path)
    types, records = (field(content, key, str(path)) for key in ("question_type", "questions"))
    if not isinstance(types, dict) or not isinstance(records, list):
        raise ValueError(
            f"{path} has no table `question_type` or no list `questions`: this is not the official file"
        )
    names = {number: name for name, number in types.items()}
    seen: dict[str, int] = {}
    for number, record in enumerate(records):
        where = f"{path} question number {number} (from 0)"
        question_id, text, answer = (
            field(record, key, where) for key in ("question_id", "question", "answer")
        )
        kind, data_id, type_id = (
            field(record, key, where) for key in ("data_type", "data_id", "question_type_id")
        )
        if str(question_id) in seen:
            raise ValueError(
                f"{where} has the question_id {question_id} of question number {seen[str(question_id)]}: keep one of the two"
            )
        seen[str(question_id)] = number
        if (
            not isinstance(text, str)
            or not isinstance(answer, str)
            or len(answer) != 1
            or answer not in _LETTERS
        ):
            raise ValueError(
                f"{where} has the answer {answer!r} to {text!r}, not one of {', '.join(_LETTERS)} to a text: get the file again"
            )
        if kind not in ("image", "video"):
            raise ValueError(
                f"{where} has the data_type {kind!r}, not image or video: get {FILE} of SEED-Bench 1"
            )
        if type_id not in names:
            raise ValueError(
                f"{where} has the question_type_id {type_id!r}, which question_type does not name: get the file again"
            )
        facts = {
            "answer": answer,
            "image": data_id,
            "kind": kind,
            "type": names[type_id],
            "official_id": question_id,
        }
        yield record, facts | {"optional": kind == "video"}, where
