"""VizWiz-VQA: questions of blind people about their own photographs, ten human answers each.

Three numbers differ in the texts that are compared:

    vizwiz_api            the headline: the official API on the text as it is uploaded, after m4c
    m4c_both_sides        m4c on the text and on the human answers, as most numbers on the public
                          `val` are made; higher
    vizwiz_api_verbatim   the official API on the text itself, for uploads that skip m4c

The published numbers are the server's on LLaVA's upload. LLaVA's converter puts every answer
through m4c before the API normalises it again, so `vizwiz_api` of `val` is the number of that
pipeline. The API takes human answers as they are: one that normalising would change ("t-shirt",
"the dog") can never be matched. After m4c "dont" is "don't", which the API's curly table leaves
alone; without m4c it becomes "don’t", which no person typed.

LLaVA's question file has each question after `str.capitalize`: "What is this? And what color is
it?" is asked as "What is this? and what color is it?". Questions from the official files are asked
the same way.

Source: VizWiz API `vqaEval.py` (copy in ranishah0402/VizWiz-VQA-ds598 7f189ba4);
    haotian-liu/LLaVA c121f043 `scripts/v1_5/eval/vizwiz.sh`,
    `scripts/convert_vizwiz_for_submission.py`, and the question file `llava_test.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import SHORT, agreement, human_answers, m4c, vizwiz_api
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    find,
    image_file,
    read_official,
    read_record,
    refuse_repeated,
)
from mipha.files import read_json_lines

SOURCE = (
    "get images and annotations from https://vizwiz.org/tasks-and-datasets/vqa and unpack them "
    "into one folder (val.json and val/, test.json and test/; LLaVA's llava_test.jsonl does for "
    "test.json)"
)
FILES = {
    "val": ("val.json", "Annotations/val.json"),
    "test": ("llava_test.jsonl", "test.json", "Annotations/test.json"),
}
PROMPT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT


class _Record(OfficialRecord):
    image: str
    question: str


class _Label(OfficialRecord):
    answers: list[Any]
    answer_type: str


class _LlavaLine(OfficialRecord):
    image: str
    text: str


def read(root: Path, split: str) -> list[Question]:
    """Return every question of the split in the official order; the id is the image's file name.

    Returns:
        Questions; with `val` their facts are those of `read_labels`.
    """
    asked = []
    for where, record, row in _read_records(find(root, FILES[split], SOURCE)):
        facts = _read_label(row, where) if split == "val" else {}
        image = image_file(root / split / record.image, SOURCE)
        prompt = record.question.capitalize() + PROMPT
        asked.append(Question(record.image, prompt, image, facts))
    return asked


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions of val.json, in its order.

    Returns:
        Questions whose facts are `answers` (ten texts as people wrote them) and `answer_type`.
    """
    return [
        Question(record.image, record.question, None, _read_label(row, where))
        for where, record, row in _read_records(find(path, FILES["val"], SOURCE))
    ]


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge by agreement with the ten people in three ways; per question, by `vizwiz_api`."""
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
    """Return the three numbers, then by answer type, in %."""
    return {name: 100 * totals.mean(name) for name in ("vizwiz_api", *totals.names)}


def make_upload(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """Return the upload for `test`; nothing for `val`.

    Source: haotian-liu/LLaVA c121f043 `scripts/convert_vizwiz_for_submission.py`.
    """
    if not questions or "answers" in questions[0].facts:
        return {}
    rows = [
        {"image": question.id, "answer": m4c(predictions[question.id])} for question in questions
    ]
    return {"vizwiz_test.json": json.dumps(rows).encode()}


def find_doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Return signs of images of another split, and of other than ten answers."""
    found = []
    prefix = f"VizWiz_{split}_"
    if others := [question.id for question in questions if not question.id.startswith(prefix)]:
        found.append(
            f"{len(others)} images are not of split {split}, such as {others[0]}: "
            f"use the file of split {split}"
        )
    labelled = [question for question in questions if "answers" in question.facts]
    if wrong := sum(len(question.facts["answers"]) != 10 for question in labelled):
        found.append(
            f"{wrong} questions do not have ten human answers: get the official annotation file"
        )
    return found


def _read_records(path: Path) -> Iterator[tuple[str, _Record, Any]]:
    """Yield place, record and plain values of each question of an official file or of LLaVA's."""
    rows = _read_llava_lines(path) if path.suffix == ".jsonl" else _read_rows(path)
    place_of: dict[str, str] = {}
    for where, row in rows:
        record = read_record(_Record, row, where)
        refuse_repeated(place_of, record.image, where, "image")
        yield where, record, row


def _read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    content = read_official(path)
    if not isinstance(content, list):
        raise ValueError(f"{path} is not a list of questions: {AGAIN}")
    return ((f"{path} [{number}]", row) for number, row in enumerate(content))


def _read_llava_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield LLaVA's lines as official ones, with the question instead of the prompt."""
    for number, row in read_json_lines(path):
        where = f"{path} line {number}"
        line = read_record(_LlavaLine, row, where)
        if not line.text.endswith(PROMPT):
            raise ValueError(f"{where}: its text does not end with {PROMPT!r}: {AGAIN}")
        yield where, {"image": line.image, "question": line.text.removesuffix(PROMPT)}


def _read_label(row: Any, where: str) -> dict[str, Any]:
    label = read_record(_Label, row, where)
    return {"answers": human_answers(label.answers, where), "answer_type": label.answer_type}


BENCHMARK = Benchmark(
    name="vizwiz",
    metrics=(
        Metric(
            "vizwiz_api",
            "%",
            "the official API on the text as uploaded (after m4c); human answers as they are",
        ),
        Metric(
            "m4c_both_sides",
            "%",
            "m4c on the text and on the human answers; not what the server does",
        ),
        Metric("vizwiz_api_verbatim", "%", "the official API on the text without m4c first"),
        Metric("perAnswerType", "%", "vizwiz_api on the questions of one answer type"),
    ),
    splits={
        "val": Split(4319),
        "test": Split(
            8000, "EvalAI challenge 2185 (https://eval.ai/web/challenges/challenge-page/2185)"
        ),
    },
    protocol=(
        "VizWiz-VQA, question + hint to say Unanswerable + short-answer prompt, greedy; the text "
        "through the m4c processor (as uploaded), then the official VizWiz API, which normalises "
        "the text but no human answer; mean over questions; 95 % interval: bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    submission=make_upload,
    doubts=find_doubts,
    id_advice="VizWiz's ids are the names of the images",
)
