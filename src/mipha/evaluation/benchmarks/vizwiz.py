"""VizWiz-VQA: questions that blind people asked about their own photographs, ten human answers each.

Three numbers, from what is compared with what:

    vizwiz_api            the headline: the official API on the text as it is uploaded, that is after the m4c processor
    m4c_both_sides        m4c on the text and on the human answers, as most numbers on the public `val` are made; higher
    vizwiz_api_verbatim   the official API on the text itself, for uploads that skip m4c

The published numbers are the server's on LLaVA's upload, and LLaVA's converter puts every answer through m4c before the API
normalises it again, so `vizwiz_api` of `val` is what that pipeline would have got. The API takes human answers as they are: one
that normalising would change ("t-shirt", "the dog") can never be matched. After m4c "dont" is "don't", which the API's curly
table leaves alone; without it it becomes "don’t", which no person typed.

LLaVA's question file has each question after `str.capitalize`: "What is this? And what color is it?" is asked as "What is this?
and what color is it?". Questions from the official files are asked the same way.

Source: VizWiz API `vqaEval.py` (copy in ranishah0402/VizWiz-VQA-ds598 7f189ba4); haotian-liu/LLaVA c121f043
    `scripts/v1_5/eval/vizwiz.sh`, `scripts/convert_vizwiz_for_submission.py`, and the question file `llava_test.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import agreement, human_answers, m4c, vizwiz_api
from mipha.evaluation.benchmark import Judgement, Metric, Question
from mipha.evaluation.files import (
    field,
    find,
    image_file,
    official_root,
    read_json,
    read_json_lines,
)
from mipha.evaluation.prompts import SHORT

METRICS = (
    Metric(
        "vizwiz_api",
        "%",
        "the official API on the text as uploaded (after m4c); human answers as they are",
    ),
    Metric(
        "m4c_both_sides", "%", "m4c on the text and on the human answers; not what the server does"
    ),
    Metric("vizwiz_api_verbatim", "%", "the official API on the text without m4c first"),
    Metric("perAnswerType", "%", "vizwiz_api on the questions of one answer type"),
)
SPLITS = ("val", "test")
SIZES = {"val": 4319, "test": 8000}
SERVERS = {"test": "EvalAI challenge 2185 (https://eval.ai/web/challenges/challenge-page/2185)"}
PROTOCOL = (
    "VizWiz-VQA, question + hint to say Unanswerable + short-answer prompt, greedy; the text through the m4c processor (as uploaded), then "
    "the official VizWiz API, which normalises the text but no human answer; mean over questions; 95 % interval: bootstrap over images"
)
SOURCE = (
    "get images and annotations from https://vizwiz.org/tasks-and-datasets/vqa and unpack them into one folder "
    "(val.json and val/, test.json and test/; LLaVA's llava_test.jsonl does for test.json)"
)
MAX_NEW_TOKENS = 128
BASELINES: Mapping[str, Callable[[Sequence[Question]], dict[str, str]]] = {}
JUDGE = None

FILES = {
    "val": ("val.json", "Annotations/val.json"),
    "test": ("llava_test.jsonl", "test.json", "Annotations/test.json"),
}
PROMPT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT


def questions(root: Path | None, split: str) -> list[Question]:
    """Every question of the split in the official order; the id is the image's file name.

    Returns:
        Questions; with `val` their facts are those of `annotations`.

    Raises:
        FileNotFoundError: A file or an image is missing.
        ValueError: No root, no such split, or a malformed file.
    """
    root = official_root("vizwiz", root, split, SPLITS, SOURCE)
    found = []
    for where, record in _records(find(root, FILES[split], SOURCE)):
        name, text = record["image"], record["question"].capitalize()
        facts = _label(record, where) if split == "val" else {}
        found.append(Question(name, text + PROMPT, image_file(root / split / name, SOURCE), facts))
    return found


def annotations(path: Path) -> list[Question]:
    """The labelled questions of val.json, in its order.

    Returns:
        Questions whose facts are `answers` (ten texts as people wrote them) and `answer_type`.
    """
    rows = _records(find(path, FILES["val"], SOURCE))
    return [
        Question(record["image"], record["question"], None, _label(record, where))
        for where, record in rows
    ]


def score(questions: Sequence[Question], predictions: Mapping[str, str]) -> Judgement:
    """Agreement with the ten people in the three ways; a question's score is that of `vizwiz_api`."""
    per_question, normalised, uploaded, contributions = {}, {}, {}, []
    for question in questions:
        text, answers = predictions[question.id], question.facts["answers"]
        uploaded[question.id] = m4c(text)
        normalised[question.id] = vizwiz_api(m4c(text))
        per_question[question.id] = official = agreement(normalised[question.id], answers)
        amounts = {
            "vizwiz_api": official,
            "m4c_both_sides": agreement(m4c(text), [m4c(answer) for answer in answers]),
            "vizwiz_api_verbatim": agreement(vizwiz_api(text), answers),
            f"perAnswerType.{question.facts['answer_type']}": official,
        }
        contributions.append((question.id, amounts))
    return Judgement(per_question, contributions, normalised=normalised, submission=uploaded)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """The three numbers, then by answer type, in %."""
    return {"vizwiz_api": 100 * totals.mean("vizwiz_api")} | {
        name: 100 * totals.mean(name) for name in totals.names
    }


def submission(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """The upload for `test`; nothing for `val`.

    Source: haotian-liu/LLaVA c121f043 `scripts/convert_vizwiz_for_submission.py`.
    """
    if not questions or "answers" in questions[0].facts:
        return {}
    rows = [
        {"image": question.id, "answer": m4c(predictions[question.id])} for question in questions
    ]
    return {"vizwiz_test.json": json.dumps(rows).encode()}


def doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Images of another split, other than ten answers."""
    found = []
    if others := [
        question.id for question in questions if not question.id.startswith(f"VizWiz_{split}_")
    ]:
        found.append(
            f"{len(others)} images are not of split {split}, such as {others[0]}: use the file of split {split}"
        )
    if wrong := sum(
        len(question.facts["answers"]) != 10
        for question in questions
        if "answers" in question.facts
    ):
        found.append(
            f"{wrong} questions do not have ten human answers: get the official annotation file"
        )
    return found


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record with the texts `image` and `question`) of an official file, or of LLaVA's question file."""
    seen = set()
    for where, record in (
        _llava_records(path) if path.suffix == ".jsonl" else _official_records(path)
    ):
        name, text = field(record, "image", where), field(record, "question", where)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f"{where} has the image {name!r} and the question {text!r}; wanted two texts: get the file again"
            )
        if name in seen:
            raise ValueError(f"{where}: image {name} stands in the file twice: get the file again")
        seen.add(name)
        yield where, record


def _official_records(path: Path) -> Iterator[tuple[str, Any]]:
    data = read_json(path)
    if not isinstance(data, list):
        raise ValueError(f"{path} is not a list of questions: get the official file again")
    return ((f"{path} [{number}]", record) for number, record in enumerate(data))


def _llava_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in read_json_lines(path):
        where = f"{path} line {number}"
        text = str(field(line, "text", where))
        if not text.endswith(PROMPT):
            raise ValueError(
                f"{where}: its text does not end with {PROMPT!r}: get LLaVA's question file again"
            )
        yield where, {"image": field(line, "image", where), "question": text.removesuffix(PROMPT)}


def _label(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "answers": human_answers(record, where),
        "answer_type": field(record, "answer_type", where),
    }
