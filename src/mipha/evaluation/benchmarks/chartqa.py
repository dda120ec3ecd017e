"""ChartQA: questions that people wrote about charts, and as many made from their captions.

An answer that is a number may be off by 5 %. `swapped` is the variant of InternVL's and Qwen-VL's
scripts, and of VLMEvalKit before September 2025: the 5 % are those of the prediction, so for 100
the range is 95.24 to 105.26, and the prediction is stripped.

Source: google-research/pix2struct 945f27e9 `pix2struct/metrics.py`; OpenGVLab/InternVL 2410d1db
    `internvl_chat/eval/vqa/evaluate_vqa.py` (swapped); open-compass/VLMEvalKit e8e78f05
    `vlmeval/dataset/image_vqa.py` (prompt); vis-nlp/ChartQA (files).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import SHORT
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    OfficialRecord,
    TableImages,
    find,
    find_shards,
    image_file,
    read_answers,
    read_list,
    read_record,
    read_rows,
)
from mipha.evaluation.relaxed import is_relaxed_match

HALVES = ("human", "augmented")
TSV = "ChartQA_TEST.tsv"
TABLES = ("data/test-*.parquet", "test-*.parquet", "test.parquet", TSV)
SOURCE = (
    "get `ChartQA Dataset/test` (test_human.json, test_augmented.json, png/) from "
    "github.com/vis-nlp/ChartQA, or the test .parquet files of "
    f"huggingface.co/datasets/lmms-lab/ChartQA or HuggingFaceM4/ChartQA, or VLMEvalKit's {TSV}"
)


class _Record(OfficialRecord):
    imgname: str = Field(min_length=1)
    query: str
    label: str


class _Row(OfficialRecord):
    half: Literal["human", "augmented"]
    question: str
    answers: list[str] = Field(min_length=1)


def read(root: Path, split: str) -> list[Question]:
    """Return every question: human, then augmented, each in the order of its file.

    Args:
        root: Folder with the two .json files and png/, or with .parquet files or a .tsv file, or
            the only one of the latter.
        split: `test`.

    Returns:
        Questions with the ids `human/<row>` and `augmented/<row>`, whose facts are `answers`,
        `half` and `image` (name or hash of the image).
    """
    return _read_questions(root, with_images=True)


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions; the images need not be there."""
    return _read_questions(path, with_images=False)


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge whether the text is near enough to an answer; the text is taken verbatim."""
    right = {}
    contributions = []
    for question in questions:
        text, answers = predictions[question.id], question.facts["answers"]
        right[question.id] = float(any(is_relaxed_match(text, answer) for answer in answers))
        # The two are exchanged, as in the scripts of this variant.
        swapped = any(is_relaxed_match(answer, text.strip()) for answer in answers)
        amounts = {
            "relaxed_accuracy": right[question.id],
            question.facts["half"]: right[question.id],
            "swapped": float(swapped),
        }
        contributions.append((question.facts["image"], amounts))

    num_stops = sum(predictions[question.id].endswith(".") for question in questions)
    notes = ()
    if num_stops:
        notes = (
            f"{num_stops:,} of {len(questions):,} answers end in a full stop, and a word with one "
            "is wrong",
        )
    return Judgement(per_question=right, contributions=contributions, notes=notes)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right: of all, of each half, as the mean of the halves, and swapped."""
    halves = {name: 100 * totals.mean(name) for name in HALVES if name in totals.names}
    mean = np.asarray(sum(halves.values()) / len(halves))
    return {
        "relaxed_accuracy": 100 * totals.mean("relaxed_accuracy"),
        **halves,
        "average_of_splits": mean,
        "swapped": 100 * totals.mean("swapped"),
    }


def _read_questions(root: Path, with_images: bool) -> list[Question]:
    # The official files are two, and each gives its half.
    if root.suffix == ".json":
        raise ValueError(
            f"{root} is one file of two: give the folder with test_{{human,augmented}}.json"
        )
    for folder in (root, root / "test", root / "ChartQA Dataset" / "test"):
        if any((folder / f"test_{half}.json").is_file() for half in HALVES):
            return _read_json(folder, with_images)
    return _read_tables(root, with_images)


def _read_json(folder: Path, with_images: bool) -> list[Question]:
    questions = []
    for half in HALVES:
        path = find(folder, (f"test_{half}.json",), SOURCE)
        for number, (where, row) in enumerate(read_list(path)):
            record = read_record(_Record, row, where)
            image = None
            if with_images:
                image = image_file(folder / "png" / record.imgname, SOURCE)
            facts = {"answers": [record.label], "half": half, "image": record.imgname}
            questions.append(Question(f"{half}/{number}", record.query + SHORT, image, facts))
    return questions


def _read_tables(root: Path, with_images: bool) -> list[Question]:
    images = TableImages(with_images)
    num_of: Counter[str] = Counter()
    questions = []
    for where, cells in _read_cells(root):
        row = read_record(_Row, _rename(cells), where)
        question_id = f"{row.half}/{num_of[row.half]}"
        num_of[row.half] += 1
        name, image = images.read(cells.get("image"), where, question_id)
        facts = {"answers": row.answers, "half": row.half, "image": name}
        questions.append(Question(question_id, row.question + SHORT, image, facts))
    return sorted(questions, key=lambda question: HALVES.index(question.facts["half"]))


def _read_cells(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in find_shards(root, TABLES, SOURCE):
        yield from read_rows(path, ())


def _rename(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of a table under the names of this module."""
    if "human_or_machine" in cells:  # HuggingFaceM4/ChartQA
        number = cells["human_or_machine"]
        half = HALVES[number] if number in (0, 1) else number
        return {"half": half, "question": cells.get("query"), "answers": cells.get("label")}
    if "split" in cells and "type" not in cells:  # VLMEvalKit
        half = {f"test_{half}": half for half in HALVES}.get(cells["split"], cells["split"])
        answers = read_answers(cells.get("answer", ""))
        return {"half": half, "question": cells.get("question"), "answers": answers}
    # lmms-lab/ChartQA
    half = {f"{half}_test": half for half in HALVES}.get(cells.get("type", ""), cells.get("type"))
    return {"half": half, "question": cells.get("question"), "answers": [cells.get("answer")]}


BENCHMARK = Benchmark(
    name="chartqa",
    metrics=(
        Metric("relaxed_accuracy", "%", "questions answered right, numbers within 5 %"),
        Metric("human", "%", "questions that people wrote"),
        Metric("augmented", "%", "questions made from captions"),
        Metric("average_of_splits", "%", "mean of the two halves"),
        Metric("swapped", "%", "as the scripts of InternVL and Qwen-VL: 5 % of the prediction"),
    ),
    splits={"test": Split(2500)},
    protocol=(
        "ChartQA test, human and augmented, question, then `Answer the question using a single "
        "word or phrase.`, greedy; relaxed accuracy of pix2struct (5 % of the right number) on the "
        "text as it is; mean over questions; 95 % interval: cluster bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    id_advice="ChartQA's ids are human/<row> and augmented/<row>, from 0 in each file",
)
