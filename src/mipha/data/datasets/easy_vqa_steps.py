"""easy-VQA with the steps of each yes/no answer: what is seen, whether it is as asked, the answer.

Target: "it is a red circle, blue is wrong, so no". The answer to "is there not a blue shape?" is an
exclusive or of what is seen and how it is asked. A small model learns the two halves sooner than
both at once: LOG.md, 2026-11-30.
"""

from __future__ import annotations

import re

from mipha.data.dataset import DataSet
from mipha.data.datasets.easy_vqa import (
    COLOURS,
    SHAPES,
    EasyVqaRecord,
    describe,
    explain,
    left_out,
    load,
)
from mipha.data.sample import IMAGE, Message, Sample


def to_sample(record: EasyVqaRecord) -> Sample:
    """Return one question and its answer, step by step."""
    return Sample(
        id=f"easy_vqa_steps/{record.folder}/{record.image}/{record.number}",
        messages=(
            Message("user", f"{IMAGE}\n{record.question}"),
            Message("assistant", reason(record)),
        ),
        images=(record.file,),
    )


def reason(record: EasyVqaRecord) -> str:
    """Say what is seen, whether that is the colour or shape asked about, and the answer."""
    if record.answer not in ("yes", "no"):
        return explain(record.colour, record.shape, record.answer)

    # `load` has refused yes/no questions that name none or several.
    words = re.findall(r"[a-z]+", record.question.lower())
    [asked] = [word for word in words if word in COLOURS or word in SHAPES]
    verdict = "right" if asked in (record.colour, record.shape) else "wrong"
    return f"{describe(record.colour, record.shape)}, {asked} is {verdict}, so {record.answer}"


DATASET = DataSet("easy_vqa_steps", load, to_sample, left_out=left_out)
