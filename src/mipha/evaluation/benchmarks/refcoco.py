"""RefCOCO: which box does an expression mean? The share of boxes with an IoU of 0.5 or more.

The question is LLaVA's sentence, and the box is read in the form that the model was trained in:

    Please provide the bounding box coordinate of the region this sentence describes: the left cat
    [228, 320, 961, 970]

A row of the files is a thing in an image, and each of its expressions is a question. An answer
without a box is wrong; lmms-eval reads it as [0, 0, 0, 0], which gives the same accuracy.
`refcoco_plus` and `refcocog` are the same with other expressions.

Source: EvolvingLMMs-Lab/lmms-eval `tasks/refcoco/utils_rec.py` for files, IoU and threshold; its
    prompt has a sentence on the form of the numbers in front, which is left out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field

from mipha.data.images import read_size
from mipha.data.region_text import DEFAULT
from mipha.data.regions import as_region, corners
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Question, Split
from mipha.evaluation.boxes import METRICS, THRESHOLD, judge_boxes, measure_boxes
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    TableImages,
    find_shards,
    read_parquet,
    read_record,
)

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: "


@dataclass(frozen=True)
class Collection:
    """One of the three collections of expressions.

    Args:
        name: Name of the benchmark.
        title: Its name on the hub.
        splits: Name of a split to its number of expressions.
    """

    name: str
    title: str
    splits: Mapping[str, int]


class _Row(OfficialRecord):
    answer: list[str] = Field(min_length=1)
    bbox: list[float] = Field(min_length=4, max_length=4)


def read(collection: Collection, with_images: bool, root: Path, split: str) -> list[Question]:
    """Return every expression in the order of the files.

    Args:
        collection: Collection of expressions.
        with_images: Whether a model will be asked.
        root: Folder with the .parquet files, or the only one of them.
        split: Name of the split.

    Returns:
        Questions whose ids are the row and the number of its expression, and whose facts are
        `boxes` (one region) and `image` (hash of the image).
    """
    images = TableImages(with_images)
    questions: list[Question] = []
    number = 0
    names = (f"data/{split}-*.parquet", f"{split}-*.parquet", f"{split}.parquet")
    for path in find_shards(root, names, _source(collection, split)):
        for where, cells in read_parquet(path, ("answer", "bbox", "image")):
            row = read_record(_Row, cells, where)
            content = (cells["image"] or {}).get("bytes")
            if not content:
                raise ValueError(f"{where} has no image, whose size its box needs: {AGAIN}")
            size, _, _ = read_size(content)
            box = as_region(corners(tuple(row.bbox), "xywh"), size, 0, "", where)
            name, image = images.read(content, where, str(number))
            facts = {"boxes": (box,), "image": name}
            questions += [
                Question(f"{number}/{place}", PROMPT + expression, image, facts)
                for place, expression in enumerate(row.answer)
            ]
            number += 1
    return questions


def score(
    form: str,
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    judge: Judge | None = None,
) -> Judgement:
    """Judge the box of each answer."""
    return judge_boxes(questions, predictions, form)


def make_benchmark(collection: Collection, form: str = DEFAULT) -> Benchmark:
    """Return the benchmark of a collection, for models that write boxes in a form."""
    first = next(iter(collection.splits))
    return Benchmark(
        name=collection.name,
        metrics=METRICS,
        splits={name: Split(size) for name, size in collection.splits.items()},
        protocol=(
            f"{collection.title}, LLaVA's sentence (`{PROMPT}` and the expression), greedy; the "
            f"first box as {form}, right from an IoU of {THRESHOLD} on; mean over expressions; "
            "95 % interval: cluster bootstrap over images"
        ),
        source=_source(collection, first),
        max_new_tokens=128,
        read=partial(read, collection, True),
        read_labels=lambda path: read(collection, False, path, first),
        score=partial(score, form),
        measure=measure_boxes,
        rules="lmms-eval",
        id_advice="its ids are the row and the number of its expression, from 0, such as 12/0",
        in_form=partial(make_benchmark, collection),
    )


def _source(collection: Collection, split: str) -> str:
    return f"get data/{split}-*.parquet from huggingface.co/datasets/lmms-lab/{collection.title}"


BENCHMARK = make_benchmark(
    Collection("refcoco", "RefCOCO", {"val": 10_834, "testA": 5_657, "testB": 5_095})
)
