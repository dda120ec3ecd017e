"""DocVQA: questions about pages of documents, scored by how few letters are wrong (ANLS).

`infovqa` has the same files, scorer and upload, and is made here as well.

Source: the evaluation script of the Robust Reading Competition, copied in QwenLM/Qwen-VL aa00ed04
    `eval_mm/infographicsvqa_eval.py`; prompt: EvolvingLMMs-Lab/lmms-eval 75571cfe `tasks/docvqa`,
    open-compass/VLMEvalKit e8e78f05 `vlmeval/dataset/image_vqa.py`; rrc.cvc.uab.es/?ch=17 (upload).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.anls import anls
from mipha.evaluation.answers import SHORT
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    QuestionId,
    TableImages,
    find_image,
    read_answers,
    read_json_or_table,
    read_official,
    read_record,
    refuse_repeated,
)

SERVER = "rrc.cvc.uab.es (challenge 17)"


@dataclass(frozen=True)
class Edition:
    """One task of the competition.

    Args:
        name: Name of the benchmark.
        title: Its name in papers.
        task: Name of its task on the server.
        files: Split to names of its official .json file, the usual one first.
        table: Name of VLMEvalKit's .tsv file of the validation split.
        config: Folder of its .parquet files in lmms-lab/DocVQA.
        image_key: Key of an image's file name in the .json file.
        image_folders: Folders that images may lie in.
        sizes: Split to number of questions.
        groups: Key of a question's labels to the metric and the name of each label.
    """

    name: str
    title: str
    task: str
    files: Mapping[str, tuple[str, ...]]
    table: str
    config: str
    image_key: str
    image_folders: tuple[str, ...]
    sizes: Mapping[str, int]
    groups: Mapping[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where the files come from."""
        validation, test = (self.files[split][0] for split in ("validation", "test"))
        return (
            f"get {validation} (or {test}) and the images from rrc.cvc.uab.es/?ch=17, {self.task}, "
            f"or {self.config}/*.parquet from huggingface.co/datasets/lmms-lab/DocVQA, or for "
            f"validation VLMEvalKit's {self.table}"
        )


DOCVQA = Edition(
    name="docvqa",
    title="DocVQA",
    task="task 1",
    files={
        "validation": ("val_v1.0_withQT.json", "val_v1.0.json"),
        "test": ("test_v1.0.json",),
    },
    table="DocVQA_VAL.tsv",
    config="DocVQA",
    image_key="image",
    image_folders=("documents", "spdocvqa_images", "images"),
    sizes={"validation": 5349, "test": 5188},
)


class _File(OfficialRecord):
    data: list[Any]


class _Record(OfficialRecord):
    questionId: QuestionId
    question: str
    answers: list[str] | None = Field(default=None, min_length=1)


def make_benchmark(edition: Edition) -> Benchmark:
    """Return the benchmark of one task."""

    def read(root: Path, split: str) -> list[Question]:
        return _read_questions(root, split, edition, with_images=True)

    def read_labels(path: Path) -> list[Question]:
        return _read_questions(path, "validation", edition, with_images=False)

    def make_upload(
        questions: Sequence[Question], predictions: Mapping[str, str]
    ) -> dict[str, bytes]:
        answers = [
            {"questionId": int(question.id), "answer": predictions[question.id]}
            for question in questions
        ]
        content = json.dumps(answers, ensure_ascii=False, indent=1) + "\n"
        return {f"{edition.name}.json": content.encode("utf-8", "surrogatepass")}

    return Benchmark(
        name=edition.name,
        metrics=(
            Metric("anls", "%", "mean ANLS of all questions"),
            *(
                Metric(name, "%", f"mean ANLS of the questions with a label in `{key}`")
                for key, (name, _) in edition.groups.items()
            ),
        ),
        splits={
            "validation": Split(edition.sizes["validation"]),
            "test": Split(edition.sizes["test"], SERVER),
        },
        protocol=(
            f"{edition.title}, question, then `Answer the question using a single word or "
            "phrase.`, greedy; ANLS with threshold 0.5 by the rules of the Robust Reading "
            "Competition's script; mean over questions; 95 % interval: cluster bootstrap over "
            "images"
        ),
        source=edition.source,
        max_new_tokens=128,
        read=read,
        read_labels=read_labels,
        score=score,
        measure=measure,
        submission=make_upload,
    )


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Score each text, verbatim, against the closest right answer."""
    scores = {
        question.id: anls(predictions[question.id], question.facts["answers"])
        for question in questions
    }
    return Judgement(
        per_question=scores,
        contributions=[
            (
                question.facts["image"],
                dict.fromkeys(("anls", *question.facts["groups"]), scores[question.id]),
            )
            for question in questions
        ],
        submission={question.id: predictions[question.id] for question in questions},
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return mean scores in percent: of all, and of each group that has a question."""
    groups = sorted(name for name in totals.names if name != "anls")
    return {name: 100 * totals.mean(name) for name in ("anls", *groups)}


def _read_questions(root: Path, split: str, edition: Edition, with_images: bool) -> list[Question]:
    """Return every question of the official file, of the .parquet files or of the .tsv file.

    The .tsv file has no questionId, but an index, which the server does not know: it is read for
    the validation split alone.

    Returns:
        Questions whose facts are `answers` (not of a private split), `image` (name or hash of the
        image) and `groups` (names of the metrics that the question counts for).
    """
    images = TableImages(with_images)
    place_of: dict[str, str] = {}
    questions = []
    names = edition.files[split]
    patterns: tuple[str, ...] = (
        f"{edition.config}/{split}-*.parquet",
        f"{split}-*.parquet",
        f"{split}.parquet",
    )
    if split == "validation":
        patterns = (*patterns, edition.table)
    elif root.suffix == ".tsv":
        raise ValueError(f"{root} has no questionId, which the server asks for: {edition.source}")
    for where, row, folder in read_json_or_table(root, names, patterns, edition.source, _unpack):
        if "index" in row and "questionId" not in row:
            row |= {"questionId": row["index"], "answers": read_answers(row.get("answer", ""))}
        record = read_record(_Record, row, where)
        refuse_repeated(place_of, record.questionId, where, "questionId")
        if not record.questionId.isdecimal():
            raise ValueError(f"{where}: questionId {record.questionId!r} is no number: {AGAIN}")

        # The image: a file beside the .json file, or inside the table.
        image: Path | bytes | None
        if folder is None:
            name, image = images.read(row.get("image"), where, record.questionId)
        else:
            name = str(row.get(edition.image_key) or "")
            places = (name, *(f"{sub}/{Path(name).name}" for sub in edition.image_folders))
            image = find_image(folder, places, edition.source) if with_images else None

        facts: dict[str, Any] = {"image": name, "groups": _read_groups(row, edition, where)}
        if split == "validation":
            if record.answers is None:
                raise ValueError(f"{where} has no answers: give the validation file, {AGAIN}")
            facts["answers"] = tuple(record.answers)
        questions.append(Question(record.questionId, record.question + SHORT, image, facts))
    return questions


def _unpack(path: Path) -> Iterator[tuple[str, Any]]:
    content = read_record(_File, read_official(path), str(path))
    for number, row in enumerate(content.data):
        yield f"{path} data[{number}]", row


def _read_groups(row: Mapping[str, Any], edition: Edition, where: str) -> tuple[str, ...]:
    """Return the metrics of a question's labels; a .parquet file lacks some keys."""
    groups = []
    for key, (metric, names) in edition.groups.items():
        for label in row.get(key) or ():
            if label not in names:
                raise ValueError(
                    f"{where}: {key} {label!r} is none of {', '.join(map(repr, names))}: {AGAIN}"
                )
            groups.append(f"{metric}.{names[label]}")
    return tuple(dict.fromkeys(groups))


BENCHMARK = make_benchmark(DOCVQA)
