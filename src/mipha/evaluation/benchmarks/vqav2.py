"""VQAv2: open questions about COCO photographs, ten human answers each.

    val        labels are public
    test-dev   what papers print, 107,394 questions; the server takes an upload of all of test2015
               and scores this part
    test       all 447,793 questions of test2015

The number is the VQA scorer's of 2021 on the uploaded text, and the uploaded text went through the
m4c processor first. The two passes matter: "1/2" is uploaded as "1 2" and then loses against ten
people who wrote "1/2".

Source: GT-Vision-Lab/VQA a013f004 `vqaEval.py`; haotian-liu/LLaVA c121f043
    `scripts/v1_5/eval/vqav2.sh`, `scripts/convert_vqav2_for_submission.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import (
    SHORT,
    agreement,
    human_answers,
    m4c,
    mixed_up_annotators,
    plain,
    vqa_official,
)
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    OfficialRecord,
    find,
    image_file,
    read_official,
    read_record,
    refuse_repeated,
)
from mipha.files import read_json_lines

SOURCE = (
    "get questions, annotations and COCO images from https://visualqa.org/download.html and unpack "
    "them into one folder (v2_OpenEnded_mscoco_val2014_questions.json, "
    "v2_mscoco_val2014_annotations.json, val2014/, "
    "v2_OpenEnded_mscoco_test2015_questions.json, "
    "v2_OpenEnded_mscoco_test-dev2015_questions.json, test2015/)"
)
SERVER = "EvalAI challenge 830 (https://eval.ai/web/challenges/challenge-page/830)"
SIZES = {"val": 214354, "test-dev": 107394, "test": 447793}
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


class _QuestionFile(OfficialRecord):
    questions: list[Any]
    data_subtype: Any = None


class _AnnotationFile(OfficialRecord):
    annotations: list[Any]
    data_subtype: Any = None


class _Question(OfficialRecord):
    question_id: int
    image_id: int
    question: str


class _Annotation(OfficialRecord):
    question_id: int
    image_id: int
    answers: list[Any]
    answer_type: str
    question_type: str


class _LlavaLine(OfficialRecord):
    """A line of LLaVA's question file: the image's name, and the prompt as the text."""

    question_id: int
    image: str
    text: str


def read(root: Path, split: str) -> list[Question]:
    """Return every question of the split, in the order of the question file.

    Returns:
        Questions; their facts are those of `read_labels` with `val`, else `data_subtype`, the
        split that the file says it is (LLaVA's say nothing: None). The first of `test-dev` has
        `not_asked`: the other ids of test2015, which the upload must list too.

    Raises:
        ValueError: The files do not belong together.
    """
    path, image_set = find(root, QUESTION_FILES[split], SOURCE), IMAGE_SETS[split]
    subtype, asked = _read_questions(path)

    # Labels where they are public.
    if split == "val":
        labels = _read_annotations(find(root, ANNOTATION_FILES, SOURCE))
        _check_same(path, asked, labels)
    else:
        labels = {question_id: {"data_subtype": subtype} for question_id in asked}
    if split == "test-dev" and asked:
        labels[next(iter(asked))]["not_asked"] = _find_rest_of_test(root, asked)

    # Images.
    names = {image_id: f"COCO_{image_set}_{image_id:012d}.jpg" for image_id, _ in asked.values()}
    images = {
        image_id: image_file(root / image_set / name, SOURCE) for image_id, name in names.items()
    }
    return [
        Question(str(key), text + SHORT, images[image_id], labels[key])
        for key, (image_id, text) in asked.items()
    ]


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions, in the order of the annotation file.

    Args:
        path: The folder with questions and annotations, under their published names or as
            questions.json and annotations.json; or the annotation file alone, which then gives
            questions without text.

    Returns:
        Questions whose facts are `image_id`, `answers` (ten texts as people wrote them),
        `answer_type`, `question_type`, `data_subtype`, and `annotators` (see
        `mixed_up_annotators`).
    """
    labels = _read_annotations(find(path, ANNOTATION_FILES, SOURCE))
    if not path.is_dir():
        return [Question(str(key), "", None, facts) for key, facts in labels.items()]

    question_file = find(path, QUESTION_FILES["val"], SOURCE)
    _, asked = _read_questions(question_file)
    _check_same(question_file, asked, labels)
    return [Question(str(key), asked[key][1], None, facts) for key, facts in labels.items()]


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge by the accuracy of the texts as they would be uploaded."""
    per_question, normalised, uploaded, contributions = {}, {}, {}, []
    shared: dict[tuple[str, str, float], dict[str, float]] = {}

    for question in questions:
        facts = question.facts
        prediction = uploaded[question.id] = m4c(predictions[question.id])
        answers = [plain(answer) for answer in facts["answers"]]
        # The quirk that costs most: ten equal answers are compared as they are, so "Yes" does not
        # match ten "yes".
        if len(set(answers)) > 1:
            answers = [vqa_official(answer) for answer in answers]
            prediction = vqa_official(prediction)
        accuracy = agreement(prediction, answers, facts["annotators"])
        per_question[question.id], normalised[question.id] = accuracy, prediction

        # There are hundreds of kinds and accuracies: one object for each saves 100 MB.
        kinds = facts["answer_type"], facts["question_type"], accuracy
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
    """Return accuracy, then by answer type and by question type, in %."""
    others = sorted(set(totals.names) - {"accuracy"})
    return {name: 100 * totals.mean(name) for name in ("accuracy", *others)}


def make_upload(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """Return the upload for a private split; nothing for `val`.

    It has every id of test2015, with the empty string for those that were not asked.

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


def find_doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Return signs of another split's files, of unofficial answers, and of a refused upload."""
    found = []

    # The part that the file says it is.
    wanted = DATA_SUBTYPES[split]
    subtypes = {str(question.facts["data_subtype"]) for question in questions}
    for subtype in sorted(subtypes - {wanted, "None"}):
        found.append(
            f"the file's data_subtype is {subtype}, that of split {split} is {wanted}: "
            f"use the files of {wanted}"
        )

    # The human answers.
    labelled = [question.facts for question in questions if "answers" in question.facts]
    if wrong := sum(len(facts["answers"]) != 10 for facts in labelled):
        found.append(
            f"{wrong} questions do not have ten human answers: get the official annotation file"
        )
    if wrong := sum(facts["annotators"] is not None for facts in labelled):
        found.append(
            f"{wrong} questions have people without an answer_id of their own, whom the scorer "
            "mixes up: get the official file"
        )

    # The ids that the server wants.
    if split == "test-dev":
        num_rest = sum(len(question.facts.get("not_asked", ())) for question in questions)
        num = len(questions) + num_rest
        if num != SIZES["test"]:
            files = " or ".join(QUESTION_FILES["test"])
            found.append(
                f"the upload has {num} ids but the server wants all {SIZES['test']} of test2015: "
                f"put {files} into the folder"
            )
    return found


def _read_questions(path: Path) -> tuple[str | None, dict[int, tuple[int, str]]]:
    """Return data_subtype, and question id to (image id, question), of a question file.

    Args:
        path: An official file, or one of LLaVA's.
    """
    rows: Iterable[tuple[str, Any]]
    if path.suffix == ".jsonl":
        subtype, rows = None, _read_llava_lines(path)
    else:
        content = read_record(_QuestionFile, read_official(path), str(path))
        subtype = content.data_subtype
        rows = ((f"{path} questions[{n}]", row) for n, row in enumerate(content.questions))

    # Tuples, not records: there are 447,793 of them.
    asked: dict[int, tuple[int, str]] = {}
    place_of: dict[int, str] = {}
    for where, row in rows:
        record = read_record(_Question, row, where)
        refuse_repeated(place_of, record.question_id, where)
        asked[record.question_id] = record.image_id, record.question
    return subtype, asked


def _read_llava_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield LLaVA's lines as official questions."""
    for number, row in read_json_lines(path):
        where = f"{path} line {number}"
        line = read_record(_LlavaLine, row, where)
        named = re.fullmatch(r"COCO_test2015_(\d{12})\.jpg", line.image)
        if not named or not line.text.endswith(SHORT):
            raise ValueError(
                f"{where}: wanted an image COCO_test2015_<12 digits>.jpg and a text that ends with "
                f"{SHORT!r}"
            )

        yield (
            where,
            {
                "question_id": line.question_id,
                "image_id": int(named[1]),
                "question": line.text.removesuffix(SHORT),
            },
        )


def _read_annotations(path: Path) -> dict[int, dict[str, Any]]:
    """Return question id to facts, in the order of the annotation file."""
    content = read_record(_AnnotationFile, read_official(path), str(path))
    labels: dict[int, dict[str, Any]] = {}
    place_of: dict[int, str] = {}
    for number, row in enumerate(content.annotations):
        where = f"{path} annotations[{number}]"
        record = read_record(_Annotation, row, where)
        refuse_repeated(place_of, record.question_id, where)
        labels[record.question_id] = {
            "image_id": record.image_id,
            "answers": human_answers(record.answers, where),
            "answer_type": record.answer_type,
            "question_type": record.question_type,
            "data_subtype": content.data_subtype,
            "annotators": mixed_up_annotators(record.answers),
        }
    return labels


def _check_same(question_file: Path, asked: Mapping[int, Any], labels: Mapping[int, Any]) -> None:
    if different := asked.keys() ^ labels.keys():
        one = min(different)
        raise ValueError(
            f"{question_file} and the annotations beside it are not of one set, {len(different)} "
            f"ids are in one only: question_id {one} is not in the "
            f"{'annotations' if one in asked else 'questions'}; get both files of val2014"
        )


def _find_rest_of_test(root: Path, asked: Mapping[int, Any]) -> tuple[int, ...]:
    """Return the ids of test2015 that are not asked; none where there is no file of test2015."""
    path = next((root / name for name in QUESTION_FILES["test"] if (root / name).is_file()), None)
    if path is None:
        return ()
    _, everything = _read_questions(path)
    if unknown := [question_id for question_id in asked if question_id not in everything]:
        raise ValueError(
            f"{path} lacks question_id {unknown[0]} of test-dev2015, which is a part of test2015: "
            "get both files again"
        )
    return tuple(question_id for question_id in everything if question_id not in asked)


BENCHMARK = Benchmark(
    name="vqav2",
    metrics=(
        Metric(
            "accuracy",
            "%",
            "mean over questions of min(1, matches among the other nine people / 3), averaged over "
            "the ten left out",
        ),
        Metric("perAnswerType", "%", "accuracy on the questions of one answer type"),
        Metric("perQuestionType", "%", "accuracy on the questions that begin in one way"),
    ),
    splits={
        split: Split(size, None if split == "val" else SERVER) for split, size in SIZES.items()
    },
    protocol=(
        "VQA v2.0, question + short-answer prompt, greedy; the text through the m4c processor (as "
        "uploaded), then VQAEval of 2021: both sides normalised unless the ten human answers are "
        "all equal; mean over questions; 95 % interval: cluster bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    submission=make_upload,
    doubts=find_doubts,
)
