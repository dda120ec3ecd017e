"""VQAv2: open questions about COCO photographs, ten human answers each.

    val        labels are public
    test-dev   what papers print, 107,394 questions; the server takes an upload of all of test2015 and scores this part
    test       all 447,793 questions of test2015

The number is the VQA scorer's of 2021 on the uploaded text, and what is uploaded went through the m4c processor first. The two
passes matter: "1/2" is uploaded as "1 2" and then loses against ten people who wrote "1/2".

Source: GT-Vision-Lab/VQA a013f004 `vqaEval.py`; haotian-liu/LLaVA c121f043 `scripts/v1_5/eval/vqav2.sh`,
    `scripts/convert_vqav2_for_submission.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import (
    agreement,
    human_answers,
    m4c,
    mixed_up_annotators,
    plain,
    vqa_official,
)
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
    Metric("perAnswerType", "%", "accuracy on the questions of one answer type"),
    Metric("perQuestionType", "%", "accuracy on the questions that begin in one way"),
)
SPLITS = ("val", "test-dev", "test")
SIZES = {"val": 214354, "test-dev": 107394, "test": 447793}
SERVERS = dict.fromkeys(
    ("test-dev", "test"), "EvalAI challenge 830 (https://eval.ai/web/challenges/challenge-page/830)"
)
PROTOCOL = (
    "VQA v2.0, question + short-answer prompt, greedy; the text through the m4c processor (as uploaded), then VQAEval of 2021: both sides "
    "normalised unless the ten human answers are all equal; mean over questions; 95 % interval: cluster bootstrap over images"
)
SOURCE = (
    "get questions, annotations and COCO images from https://visualqa.org/download.html and unpack them into one folder "
    "(v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/, "
    "v2_OpenEnded_mscoco_test2015_questions.json, v2_OpenEnded_mscoco_test-dev2015_questions.json, test2015/)"
)
MAX_NEW_TOKENS = 128
BASELINES: Mapping[str, Callable[[Sequence[Question]], dict[str, str]]] = {}
JUDGE = None

QUESTION_FILES = {
    "val": ("v2_OpenEnded_mscoco_val2014_questions.json", "questions.json"),
    "test-dev": (
        "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        "llava_vqav2_mscoco_test-dev2015.jsonl",
    ),
    "test": ("v2_OpenEnded_mscoco_test2015_questions.json", "llava_vqav2_mscoco_test2015.jsonl"),
}
ANNOTATION_FILES = ("v2_mscoco_val2014_annotations.json", "annotations.json")
IMAGE_SETS = {"val": "val2014", "test-dev": "test2015", "test": "test2015"}
DATA_SUBTYPES = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}


def questions(root: Path | None, split: str) -> list[Question]:
    """Every question of the split, in the order of the question file.

    Returns:
        Questions; their facts are those of `annotations` with `val`, else `data_subtype`, the split that the file says it is (LLaVA's
        say nothing: None). The first of `test-dev` has `not_asked`: the other ids of test2015, which the upload must list too.

    Raises:
        FileNotFoundError: A file or an image is missing.
        ValueError: No root, no such split, a malformed file, or files that do not belong together.
    """
    root = official_root("vqav2", root, split, SPLITS, SOURCE)
    path, image_set = find(root, QUESTION_FILES[split], SOURCE), IMAGE_SETS[split]
    subtype, asked = _read_questions(path)
    if split == "val":
        labels = _read_labels(find(root, ANNOTATION_FILES, SOURCE))
        _check_same(path, asked, labels)
    else:
        labels = {question_id: {"data_subtype": subtype} for question_id in asked}
    if split == "test-dev" and asked:
        labels[next(iter(asked))]["not_asked"] = _rest_of_test(root, asked)
    names = {image_id: f"COCO_{image_set}_{image_id:012d}.jpg" for image_id, _ in asked.values()}
    images = {
        image_id: image_file(root / image_set / name, SOURCE) for image_id, name in names.items()
    }
    return [
        Question(str(key), text + SHORT, images[image_id], labels[key])
        for key, (image_id, text) in asked.items()
    ]


def annotations(path: Path) -> list[Question]:
    """The labelled questions, in the order of the annotation file.

    Args:
        path: The folder with questions and annotations, under their published names or as questions.json and annotations.json; or the
            annotation file alone, which then gives questions without text.

    Returns:
        Questions whose facts are `image_id`, `answers` (ten texts as people wrote them), `answer_type`, `question_type`,
        `data_subtype`, and `annotators` (see `mixed_up_annotators`).
    """
    labels = _read_labels(find(path, ANNOTATION_FILES, SOURCE))
    texts = dict.fromkeys(labels, "")
    if path.is_dir():
        question_file = find(path, QUESTION_FILES["val"], SOURCE)
        asked = _read_questions(question_file)[1]
        _check_same(question_file, asked, labels)
        texts = {key: text for key, (_, text) in asked.items()}
    return [Question(str(key), texts[key], None, facts) for key, facts in labels.items()]


def score(questions: Sequence[Question], predictions: Mapping[str, str]) -> Judgement:
    """Accuracy of the texts as they would be uploaded."""
    per_question, normalised, uploaded, contributions = {}, {}, {}, []
    shared: dict[tuple[str, str, float], dict[str, float]] = {}
    for question in questions:
        facts = question.facts
        prediction = uploaded[question.id] = m4c(predictions[question.id])
        answers = [plain(answer) for answer in facts["answers"]]
        # The quirk that costs most: ten equal answers are compared as they are, so "Yes" does not match ten "yes".
        if len(set(answers)) > 1:
            answers = [vqa_official(answer) for answer in answers]
            prediction = vqa_official(prediction)
        accuracy = agreement(prediction, answers, facts["annotators"])
        per_question[question.id], normalised[question.id] = accuracy, prediction
        kinds = facts["answer_type"], facts["question_type"], accuracy
        # One object for each of some hundred cases instead of one a question saves 100 MB.
        amounts = shared.setdefault(
            kinds,
            {
                "accuracy": accuracy,
                f"perAnswerType.{kinds[0]}": accuracy,
                f"perQuestionType.{kinds[1]}": accuracy,
            },
        )
        contributions.append((facts["image_id"], amounts))
    return Judgement(per_question, contributions, normalised=normalised, submission=uploaded)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Accuracy, then by answer type and by question type, in %."""
    return {
        name: 100 * totals.mean(name)
        for name in ("accuracy", *sorted(set(totals.names) - {"accuracy"}))
    }


def submission(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """The upload: every id of test2015, the empty string for those that were not asked; nothing for `val`.

    Source: haotian-liu/LLaVA c121f043 `scripts/convert_vqav2_for_submission.py`.
    """
    if not questions or "answers" in questions[0].facts:
        return {}
    rows = [
        {"question_id": int(question.id), "answer": m4c(predictions[question.id])}
        for question in questions
    ]
    rows += [
        {"question_id": question_id, "answer": ""}
        for question in questions
        for question_id in question.facts.get("not_asked", ())
    ]
    return {"vqav2_test2015.json": json.dumps(rows).encode()}


def doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Files of another split, other than ten answers, people that cannot be told apart, an upload that the server would refuse."""
    found = []
    wanted = DATA_SUBTYPES[split]
    for subtype in sorted(
        {str(question.facts["data_subtype"]) for question in questions} - {wanted, "None"}
    ):
        found.append(
            f"the file's data_subtype is {subtype}, that of split {split} is {wanted}: use the files of {wanted}"
        )
    labelled = [question.facts for question in questions if "answers" in question.facts]
    if wrong := sum(len(facts["answers"]) != 10 for facts in labelled):
        found.append(
            f"{wrong} questions do not have ten human answers: get the official annotation file"
        )
    if wrong := sum(facts["annotators"] is not None for facts in labelled):
        found.append(
            f"{wrong} questions have people without an answer_id of their own, whom the scorer mixes up: get the official file"
        )
    if split == "test-dev":
        num = len(questions) + sum(
            len(question.facts.get("not_asked", ())) for question in questions
        )
        if num != SIZES["test"]:
            files = " or ".join(QUESTION_FILES["test"])
            found.append(
                f"the upload has {num} ids but the server wants all {SIZES['test']} of test2015: put {files} into the folder"
            )
    return found


def _read_questions(path: Path) -> tuple[str | None, dict[int, tuple[int, str]]]:
    """(data_subtype, question id -> (image id, question)) of an official file, or of one of LLaVA's."""
    subtype, rows = (
        (None, _llava_records(path)) if path.suffix == ".jsonl" else _records(path, "questions")
    )
    asked: dict[int, tuple[int, str]] = {}
    for where, record in rows:
        question_id, image_id, text = (
            field(record, key, where) for key in ("question_id", "image_id", "question")
        )
        if not (
            isinstance(question_id, int) and isinstance(image_id, int) and isinstance(text, str)
        ):
            raise ValueError(
                f"{where} is {record}; wanted numbers as question_id and image_id, and a text: get the file again"
            )
        if question_id in asked:
            raise ValueError(
                f"{where}: question_id {question_id} stands in the file twice: get the file again"
            )
        asked[question_id] = image_id, text
    return subtype, asked


def _llava_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record as in an official question file): LLaVA's lines have the image's name, and the prompt in place of the question."""
    for number, line in read_json_lines(path):
        where = f"{path} line {number}"
        name, text = str(field(line, "image", where)), str(field(line, "text", where))
        named = re.fullmatch(r"COCO_test2015_(\d{12})\.jpg", name)
        if not named or not text.endswith(SHORT):
            raise ValueError(
                f"{where}: wanted an image COCO_test2015_<12 digits>.jpg and a text that ends with {SHORT!r}"
            )
        yield (
            where,
            {
                "question_id": field(line, "question_id", where),
                "image_id": int(named[1]),
                "question": text.removesuffix(SHORT),
            },
        )


def _read_labels(path: Path) -> dict[int, dict[str, Any]]:
    """Question id -> facts, in the order of the annotation file."""
    subtype, rows = _records(path, "annotations")
    labels: dict[int, dict[str, Any]] = {}
    for where, record in rows:
        question_id = field(record, "question_id", where)
        if not isinstance(question_id, int) or question_id in labels:
            wrong = (
                "stands in the file twice" if isinstance(question_id, int) else "is not a number"
            )
            raise ValueError(f"{where}: question_id {question_id!r} {wrong}: get the file again")
        labels[question_id] = {
            "image_id": field(record, "image_id", where),
            "answers": human_answers(record, where),
            "answer_type": field(record, "answer_type", where),
            "question_type": field(record, "question_type", where),
            "data_subtype": subtype,
            "annotators": mixed_up_annotators(record["answers"]),
        }
    return labels


def _records(path: Path, key: str) -> tuple[str | None, Iterator[tuple[str, Any]]]:
    """(data_subtype, (where, record) of each) of an official file."""
    data = read_json(path)
    records = field(data, key, str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path}: its {key!r} is not a list: get the official file again")
    return data.get("data_subtype"), (
        (f"{path} {key}[{number}]", record) for number, record in enumerate(records)
    )


def _check_same(question_file: Path, asked: Mapping[int, Any], labels: Mapping[int, Any]) -> None:
    if different := asked.keys() ^ labels.keys():
        one = min(different)
        raise ValueError(
            f"{question_file} and the annotations beside it are not of one set, {len(different)} ids are in one only: question_id {one} "
            f"is not in the {'annotations' if one in asked else 'questions'}; get both files of val2014"
        )


def _rest_of_test(root: Path, asked: Mapping[int, Any]) -> tuple[int, ...]:
    """Ids of test2015 that are not asked; none where there is no file of test2015."""
    path = next((root / name for name in QUESTION_FILES["test"] if (root / name).is_file()), None)
    if path is None:
        return ()
    everything = _read_questions(path)[1]
    if unknown := [question_id for question_id in asked if question_id not in everything]:
        raise ValueError(
            f"{path} lacks question_id {unknown[0]} of test-dev2015, which is a part of test2015: get both files again"
        )
    return tuple(question_id for question_id in everything if question_id not in asked)
