"""easy-VQA's images with captions that follow from their questions: "it is a red circle".

One sample an image; the caption is the beginning of `easy_vqa`'s answers, so that the second stage
builds on the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mipha.data.dataset import DataSet
from mipha.data.datasets.easy_vqa import describe, facts, image_path, questions_of
from mipha.data.sample import IMAGE, Message, Sample

INSTRUCTION = "describe the image"


class CaptionRecord(NamedTuple):
    """One image of known colour and shape; `folder` is the published `train` or `test`."""

    file: Path
    folder: str
    image: int
    colour: str
    shape: str


def load(root: Path | None, split: str) -> Sequence[CaptionRecord]:
    """List the images of a split whose colour and shape are known; arguments as in `easy_vqa`."""
    folder, questions = questions_of(root, split)
    return [
        CaptionRecord(image_path(root, folder, image), folder, image, colour, shape)
        for image, (colour, shape) in facts(questions, folder).items()
    ]


def to_sample(record: CaptionRecord) -> Sample:
    """Return one image and its caption."""
    return Sample(
        id=f"easy_vqa_captions/{record.folder}/{record.image}",
        messages=(
            Message("user", f"{IMAGE}\n{INSTRUCTION}"),
            Message("assistant", describe(record.colour, record.shape)),
        ),
        images=(record.file,),
    )


def left_out(root: Path | None, split: str) -> str | None:
    """Return a sentence on what `load` leaves out of a split; None if nothing."""
    folder, questions = questions_of(root, split)
    num_unknown = len(questions) - len(facts(questions, folder))
    return (
        f"easy_vqa_captions {split}: {num_unknown} of {len(questions)} images are left out, "
        "because their questions and answers do not tell both colour and shape"
        if num_unknown
        else None
    )


DATASET = DataSet("easy_vqa_captions", load, to_sample, left_out=left_out)
