"""TextVQA 0.5.1 val: questions about text in photographs, asked with tokens that OCR read.

The published numbers of LLaVA-1.5 and Mipha are with the OCR line in the prompt (115 of 5,000 are
empty), which other evaluators leave out. LLaVA's question file has each question after
`str.capitalize`, the annotations have it in lower case; made from the OCR file, prompts are the
same.

The official program finds a question by its image and its lower-case text. The ids here are the
official `question_id`; the result is the same as long as no image has one question twice.

Source: haotian-liu/LLaVA c121f043 `scripts/v1_5/eval/textvqa.sh`, `llava/eval/eval_textvqa.py`,
    `llava/eval/m4c_evaluator.py`, and the question file `llava_textvqa_val_v051_ocr.jsonl`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import SHORT, agreement, m4c
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    QuestionId,
    find,
    image_file,
    read_official,
    read_record,
    refuse_repeated,
)
from mipha.files import read_json_lines

SOURCE = (
    "get TextVQA_0.5.1_val.json, TextVQA_Rosetta_OCR_v0.2_val.json and the images (train_images/) "
    "from https://textvqa.org/dataset, or instead of the OCR file LLaVA's "
    "llava_textvqa_val_v051_ocr.jsonl, and put them into one folder"
)
ANNOTATION_FILE = "TextVQA_0.5.1_val.json"
OCR_FILES = ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_Rosetta_OCR_v0.2_val.json")
OCR_LINE = "\nReference OCR token: "


class _File(OfficialRecord):
    data: list[Any]
    dataset_version: Any = None
    dataset_type: Any = None


class _Record(OfficialRecord):
    question_id: int
    image_id: str
    question: str
    answers: list[str] = Field(min_length=10, max_length=10)


class _Tokens(OfficialRecord):
    image_id: str
    ocr_tokens: list[str]


class _LlavaLine(OfficialRecord):
    """A line of LLaVA's question file, which has the image id as question_id."""

    question_id: QuestionId
    text: str


def read(root: Path, split: str) -> list[Question]:
    """Return every question in the order of the annotation file, with OCR tokens in the prompt.

    Returns:
        Questions with the facts of `read_labels`.

    Raises:
        ValueError: A question or an image has no OCR line.
    """
    labelled = read_labels(root)
    ocr_file = find(root, OCR_FILES, SOURCE)
    if ocr_file.suffix == ".jsonl":
        prompts = _read_llava_prompts(ocr_file)
    else:
        prompts = _make_prompts(ocr_file, labelled)
    image_ids = dict.fromkeys(question.facts["image_id"] for question in labelled)
    images = {
        image_id: image_file(root / "train_images" / f"{image_id}.jpg", SOURCE)
        for image_id in image_ids
    }

    asked = []
    for question in labelled:
        image_id = question.facts["image_id"]
        key = _key(image_id, question.text)
        if key not in prompts:
            raise ValueError(
                f"{ocr_file} lacks the question {question.text!r} (question_id {question.id}, "
                f"image {image_id}): {AGAIN}"
            )
        asked.append(Question(question.id, prompts[key], images[image_id], question.facts))
    return asked


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions, in the order of the annotation file.

    Returns:
        Questions whose facts are `image_id`, `answers` (ten texts as people wrote them),
        `question`, and `edition` (data set and part that the file says it is; None where it says
        nothing).
    """
    path = find(path, [ANNOTATION_FILE], SOURCE)
    content = read_record(_File, read_official(path), str(path))
    edition = None
    if content.dataset_version is not None and content.dataset_type is not None:
        edition = f"{content.dataset_version} {content.dataset_type}"

    place_of: dict[int, str] = {}
    labelled: dict[int, Question] = {}
    for number, row in enumerate(content.data):
        where = f"{path} data[{number}]"
        record = read_record(_Record, row, where)
        refuse_repeated(place_of, record.question_id, where)
        facts = {
            "image_id": record.image_id,
            "answers": tuple(record.answers),
            "question": record.question,
            "edition": edition,
        }
        question = Question(str(record.question_id), record.question, None, facts)
        labelled[record.question_id] = question
    return list(labelled.values())


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge by soft accuracy of the texts; both sides are always normalised."""
    per_question, normalised, contributions = {}, {}, []
    for question in questions:
        normalised[question.id] = prediction = m4c(predictions[question.id])
        answers = [m4c(answer) for answer in question.facts["answers"]]
        per_question[question.id] = accuracy = agreement(prediction, answers)
        contributions.append((question.facts["image_id"], {"accuracy": accuracy}))
    return Judgement(per_question, contributions, normalised=normalised)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return accuracy in %."""
    return {"accuracy": 100 * totals.mean("accuracy")}


def find_doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Return signs of another version or part, and questions that the official program loses."""
    found = []
    for edition in dict.fromkeys(question.facts["edition"] for question in questions):
        if edition not in (None, "0.5.1 val"):
            found.append(
                f"the annotation file says it is {edition}, wanted 0.5.1 val: get {ANNOTATION_FILE}"
            )

    if several := [question.id for question in questions if "\n" in question.facts["question"]]:
        found.append(
            f"{len(several)} questions have more than one line, such as {several[0]}: "
            "the official program stops at them"
        )

    keys = Counter(
        _key(question.facts["image_id"], question.facts["question"]) for question in questions
    )
    if twice := [key for key, num in keys.items() if num > 1]:
        found.append(
            f"{len(twice)} questions stand twice at one image, such as {twice[0]}: "
            "the official program scores both by the last"
        )
    return found


def _read_llava_prompts(path: Path) -> dict[tuple[str, str], str]:
    """Return key to prompt from LLaVA's file, which has whole prompts."""
    prompts = {}
    for number, row in read_json_lines(path):
        where = f"{path} line {number}"
        line = read_record(_LlavaLine, row, where)
        question, found, _ = line.text.partition(OCR_LINE)
        if not found or not line.text.endswith(SHORT):
            raise ValueError(
                f"{where}: its text is not a question, a line {OCR_LINE.strip()!r} and "
                f"{SHORT.strip()!r}: {AGAIN}"
            )
        prompts[_key(line.question_id, question)] = line.text
    return prompts


def _make_prompts(path: Path, labelled: Sequence[Question]) -> dict[tuple[str, str], str]:
    """Return key to prompt, made from the OCR tokens of the question's image."""
    tokens = {}
    content = read_record(_File, read_official(path), str(path))
    for number, row in enumerate(content.data):
        record = read_record(_Tokens, row, f"{path} data[{number}]")
        tokens[record.image_id] = ", ".join(record.ocr_tokens)

    prompts = {}
    for question in labelled:
        image_id = question.facts["image_id"]
        if image_id in tokens:
            prompt = question.text.capitalize() + OCR_LINE + tokens[image_id] + SHORT
            prompts[_key(image_id, question.text)] = prompt
    return prompts


def _key(image_id: str, question: str) -> tuple[str, str]:
    return image_id, question.lower()


BENCHMARK = Benchmark(
    name="textvqa",
    metrics=(
        Metric(
            "accuracy",
            "%",
            "mean over questions of min(1, matches among the other nine people / 3), averaged over "
            "the ten left out",
        ),
    ),
    splits={"val": Split(5000)},
    protocol=(
        "TextVQA 0.5.1 val, question + Rosetta OCR tokens + short-answer prompt, greedy; m4c soft "
        "accuracy (text and human answers through the m4c processor); mean over questions; 95 % "
        "interval: cluster bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    doubts=find_doubts,
)
