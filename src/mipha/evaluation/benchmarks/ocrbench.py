"""OCRBench: 1,000 questions about text in images; the score is how many answers hold the right one.

A right answer need only stand somewhere in the text, so talk is never punished: "I do not know" is
right for "no". Formulas are compared without spaces and with their case.

Source: Yuliang-Liu/MultimodalOCR 794c36d6 `OCRBench/example.py` (scoring), `OCRBench/scripts/
    LLaVA1_5.py` (prompt), `OCRBench/OCRBench/OCRBench.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import SHORT
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    TableImages,
    find_image,
    read_answers,
    read_json_or_table,
    read_record,
)

FORMULAS = "HME100k"
"""Data set of the formulas, which are all questions of one type and no others."""
FORMULA_TYPE = "Handwritten Mathematical Expression Recognition"
RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
"""Types that `text_recognition` sums."""
TYPES = (
    *RECOGNITION,
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    FORMULA_TYPE,
)
JSON = ("OCRBench.json", "OCRBench/OCRBench.json")
TSV = "OCRBench.tsv"
TABLES = ("data/test-*.parquet", "test-*.parquet", "test.parquet", TSV)
IMAGES = "OCRBench_Images"
SOURCE = (
    f"get OCRBench.json and {IMAGES}/ from github.com/Yuliang-Liu/MultimodalOCR, or the test "
    f".parquet files of huggingface.co/datasets/echo840/OCRBench, or VLMEvalKit's {TSV}"
)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Record(OfficialRecord):
    dataset: str
    question: str
    answers: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    type: str


def read(root: Path, split: str) -> list[Question]:
    """Return every question in the order of the file.

    Args:
        root: Folder with OCRBench.json and the images, or with .parquet files or a .tsv file, or
            one file.
        split: `test`.

    Returns:
        Questions with the number of their row as id, because the file's own ids repeat, or their
        index in a .tsv file. Facts are
        `answers`, `type`, `dataset` and `image` (path or hash of the image).
    """
    return _read_questions(root, with_images=True)


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions; the images need not be there."""
    return _read_questions(path, with_images=False)


def is_right(text: str, answers: Sequence[str], dataset: str) -> bool:
    """Return whether one of the answers stands in the text."""
    if dataset == FORMULAS:
        found = _one_line(text).replace(" ", "")
        return any(_one_line(answer).replace(" ", "") in found for answer in answers)
    found = _one_line(text.lower())
    return any(_one_line(answer.lower()) in found for answer in answers)


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Give a point to each answer that holds the right one."""
    right = {}
    contributions = []
    for question in questions:
        facts = question.facts
        point = float(is_right(predictions[question.id], facts["answers"], facts["dataset"]))
        right[question.id] = point
        contributions.append((facts["image"], dict.fromkeys(("final_score", facts["type"]), point)))
    return Judgement(per_question=right, contributions=contributions)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return points: of all, of text recognition, and of each type that is there."""
    points = {name: totals.sum(name) for name in TYPES if name in totals.names}
    recognition = sum(points.get(name, 0.0) for name in RECOGNITION)
    final = totals.sum("final_score")
    return {
        "final_score": final,
        "final_score_norm": final / 10,
        "text_recognition": np.asarray(recognition),
        **points,
    }


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ")


def _read_questions(root: Path, with_images: bool) -> list[Question]:
    images = TableImages(with_images)
    questions: list[Question] = []
    for where, row, folder in _read_rows(root):
        record = read_record(_Record, row, where)
        if record.type not in TYPES:
            raise ValueError(
                f"{where}: type {record.type!r} is none of {', '.join(TYPES)}: {AGAIN}"
            )

        # The image: a file beside the .json file, or inside the table.
        question_id = row.get("question_id", str(len(questions)))
        image: Path | bytes | None
        if folder is None:
            name, image = images.read(row.get("image"), where, question_id)
        else:
            name = str(row.get("image_path") or "")
            places = (f"{IMAGES}/{name}", name, f"../{IMAGES}/{name}")
            image = find_image(folder, places, SOURCE) if with_images else None
        facts = {
            "answers": tuple(record.answers),
            "type": record.type,
            "dataset": record.dataset,
            "image": name,
        }
        questions.append(Question(question_id, record.question + SHORT, image, facts))
    return questions


def _read_rows(root: Path) -> Iterator[tuple[str, dict[str, Any], Path | None]]:
    """Yield place and row of every question under the names of the .json file, and its folder."""
    for where, row, folder in read_json_or_table(root, JSON, TABLES, SOURCE):
        if "index" in row and "question_type" not in row:  # VLMEvalKit names no data set
            row |= {"answers": read_answers(row.get("answer", "")), "type": row.get("category")}
            dataset = FORMULAS if row["type"] == FORMULA_TYPE else ""
            row |= {"dataset": dataset, "question_id": row["index"]}
        elif folder is None:
            row |= {"answers": row.get("answer"), "type": row.get("question_type")}
        else:
            row |= {"dataset": row.get("dataset_name")}
        yield where, row, folder


BENCHMARK = Benchmark(
    name="ocrbench",
    metrics=(
        Metric("final_score", "points", "right answers, of 1,000 in the whole file"),
        Metric("final_score_norm", "points", "the final score / 10, as VLMEvalKit prints it"),
        Metric("text_recognition", "points", "right answers of the six types that recognise text"),
        *(Metric(name, "points", f"right answers of the type {name}") for name in TYPES),
    ),
    splits={"test": Split(1000)},
    protocol=(
        "OCRBench, question, then `Answer the question using a single word or phrase.` (the "
        "official prompt for LLaVA), greedy; a right answer must stand in the text, case and line "
        "ends aside, of a formula spaces aside; points are right answers; 95 % interval: cluster "
        "bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    id_advice="OCRBench's own ids repeat, so an id is the number of the row, from 0, "
    "or the index of the .tsv file",
)
