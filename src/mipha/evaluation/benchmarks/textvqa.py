"""TextVQA 0.5.1 val: questions about text in photographs, ten human answers each, asked with the tokens that an OCR system read.

The published numbers of LLaVA-1.5 and Mipha are with the OCR line in the prompt (115 of 5,000 are empty), which other evaluators
leave out. LLaVA's question file has each question after `str.capitalize`, the annotations have it in lower case; made from the OCR
file, prompts are the same.

The official program finds a question by its image and its lower-case text; the ids here are the official `question_id`, which
comes to the same as long as no image has one question twice.

Source: haotian-liu/LLaVA c121f043 `scripts/v1_5/eval/textvqa.sh`, `llava/eval/eval_textvqa.py`, `llava/eval/m4c_evaluator.py`, and the
    question file `llava_textvqa_val_v051_ocr.jsonl`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import agreement, m4c
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
        "accuracy",
        "%",
        "mean over questions of min(1, matches among the other nine people / 3), averaged over the ten left out",
    ),
)
SPLITS = ("val",)
SIZES = {"val": 5000}
SERVERS: Mapping[str, str] = {}
PROTOCOL = (
    "TextVQA 0.5.1 val, question + Rosetta OCR tokens + short-answer prompt, greedy; m4c soft accuracy (text and human answers through the "
    "m4c processor); mean over questions; 95 % interval: cluster bootstrap over images"
)
SOURCE = (
    "get TextVQA_0.5.1_val.json, TextVQA_Rosetta_OCR_v0.2_val.json and the images (train_images/) from https://textvqa.org/dataset, "
    "or in place of the OCR file LLaVA's llava_textvqa_val_v051_ocr.jsonl, and put them into one folder"
)
MAX_NEW_TOKENS = 128
BASELINES: Mapping[str, Callable[[Sequence[Question]], dict[str, str]]] = {}
JUDGE = None

ANNOTATION_FILE = "TextVQA_0.5.1_val.json"
OCR_FILES = ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_Rosetta_OCR_v0.2_val.json")
OCR_LINE = "\nReference OCR token: "


def questions(root: Path | None, split: str) -> list[Question]:
    """Every question in the order of the annotation file, with the OCR tokens in the prompt.

    Returns:
        Questions with the facts of `annotations`.

    Raises:
        FileNotFoundError: A file or an image is missing.
        ValueError: No root, no such split, a malformed file, or a question or an image without OCR line.
    """
    root = official_root("textvqa", root, split, SPLITS, SOURCE)
    labelled = _read_labels(find(root, [ANNOTATION_FILE], SOURCE))
    ocr_file = find(root, OCR_FILES, SOURCE)
    prompts = (
        _llava_prompts(ocr_file)
        if ocr_file.suffix == ".jsonl"
        else _rosetta_prompts(ocr_file, labelled)
    )
    images = dict.fromkeys(question.facts["image_id"] for question in labelled)
    images = {
        image_id: image_file(root / "train_images" / f"{image_id}.jpg", SOURCE)
        for image_id in images
    }
    found = []
    for question in labelled:
        key = _key(question.facts["image_id"], question.text)
        if key not in prompts:
            raise ValueError(
                f"{ocr_file} lacks the question {question.text!r} (question_id {question.id}, image {key[0]}): get the file again"
            )
        found.append(Question(question.id, prompts[key], images[key[0]], question.facts))
    return found


def annotations(path: Path) -> list[Question]:
    """The labelled questions, in the order of the annotation file.

    Returns:
        Questions whose facts are `image_id`, `answers` (ten texts as people wrote them), `question`, and `edition` (which data set and
        part the file says it is; None where it says nothing).
    """
    return _read_labels(find(path, [ANNOTATION_FILE], SOURCE))


def score(questions: Sequence[Question], predictions: Mapping[str, str]) -> Judgement:
    """Soft accuracy of the texts; both sides are normalised, always."""
    per_question, normalised, contributions = {}, {}, []
    for question in questions:
        normalised[question.id] = prediction = m4c(predictions[question.id])
        per_question[question.id] = accuracy = agreement(
            prediction, [m4c(answer) for answer in question.facts["answers"]]
        )
        contributions.append((question.facts["image_id"], {"accuracy": accuracy}))
    return Judgement(per_question, contributions, normalised=normalised)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Accuracy in %."""
    return {"accuracy": 100 * totals.mean("accuracy")}


def submission(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """Nothing: the labels are public."""
    return {}


def doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Another version or part, questions that the official program cannot find or takes for one another."""
    found = []
    for edition in dict.fromkeys(question.facts["edition"] for question in questions):
        if edition not in (None, "0.5.1 val"):
            found.append(
                f"the annotation file says it is {edition}, wanted 0.5.1 val: get {ANNOTATION_FILE}"
            )
    if several := [question.id for question in questions if "\n" in question.facts["question"]]:
        found.append(
            f"{len(several)} questions have more than one line, such as {several[0]}: the official program stops at them"
        )
    keys = Counter(
        _key(question.facts["image_id"], question.facts["question"]) for question in questions
    )
    if twice := [key for key, num in keys.items() if num > 1]:
        found.append(
            f"{len(twice)} questions stand twice at one image, such as {twice[0]}: the official program scores both by the last"
        )
    return found


def _read_labels(path: Path) -> list[Question]:
    data = read_json(path)
    rows = _records(path, data)
    edition = (
        f"{data['dataset_version']} {data['dataset_type']}"
        if "dataset_version" in data and "dataset_type" in data
        else None
    )
    labelled: dict[int, Question] = {}
    for where, record in rows:
        question_id, image_id, text, answers = (
            field(record, key, where) for key in ("question_id", "image_id", "question", "answers")
        )
        if not (
            isinstance(question_id, int) and isinstance(image_id, str) and isinstance(text, str)
        ):
            raise ValueError(
                f"{where} is {record}; wanted a number as question_id, a text as image_id and as question: get the file again"
            )
        if question_id in labelled:
            raise ValueError(
                f"{where}: question_id {question_id} stands in the file twice: get the file again"
            )
        if (
            not isinstance(answers, list)
            or len(answers) != 10
            or not all(isinstance(answer, str) for answer in answers)
        ):
            raise ValueError(
                f"{where} (question_id {question_id}) does not have ten human answers, each a text: get the official file again"
            )
        facts = {
            "image_id": image_id,
            "answers": tuple(answers),
            "question": text,
            "edition": edition,
        }
        labelled[question_id] = Question(str(question_id), text, None, facts)
    return list(labelled.values())


def _llava_prompts(path: Path) -> dict[tuple[str, str], str]:
    """Key -> prompt: LLaVA's file has whole prompts, and the image id as question_id."""
    prompts = {}
    for number, line in read_json_lines(path):
        where = f"{path} line {number}"
        text = str(field(line, "text", where))
        question, found, _ = text.partition(OCR_LINE)
        if not found or not text.endswith(SHORT):
            raise ValueError(
                f"{where}: its text is not a question, a line {OCR_LINE.strip()!r} and {SHORT.strip()!r}: get the file again"
            )
        prompts[_key(str(field(line, "question_id", where)), question)] = text
    return prompts


def _rosetta_prompts(path: Path, labelled: Sequence[Question]) -> dict[tuple[str, str], str]:
    """Key -> prompt, made from the tokens of the question's image."""
    tokens = {}
    for where, record in _records(path, read_json(path)):
        of_image = field(record, "ocr_tokens", where)
        if not isinstance(of_image, list) or not all(isinstance(token, str) for token in of_image):
            raise ValueError(f"{where}: its ocr_tokens are not a list of texts: get the file again")
        tokens[field(record, "image_id", where)] = ", ".join(of_image)
    with_tokens = [question for question in labelled if question.facts["image_id"] in tokens]
    return {
        _key(question.facts["image_id"], question.text): (
            question.text.capitalize() + OCR_LINE + tokens[question.facts["image_id"]] + SHORT
        )
        for question in with_tokens
    }


def _records(path: Path, data: Any) -> list[tuple[str, Any]]:
    records = field(data, "data", str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path}: its 'data' is not a list: get the official file again")
    return [(f"{path} data[{number}]", record) for number, record in enumerate(records)]


def _key(image_id: str, question: str) -> tuple[str, str]:
    return image_id, question.lower()
