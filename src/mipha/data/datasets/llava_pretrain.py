"""LLaVA's first stage: 558,128 captions of LAION, CC and SBU images, `blip_laion_cc_sbu_558k.json`.

Source: https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mipha.data.datasets._index import Rows
from mipha.data.datasets._llava import llava_sample, load_llava
from mipha.data.datasets._records import Row
from mipha.data.sample import Sample

FILENAME = "blip_laion_cc_sbu_558k.json"


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """The rows of the published file; `root` is that file or its folder, with the images beside it or in `images`."""
    return load_llava("llava_pretrain", root, split, FILENAME, image_root)


def to_sample(record: Row, root: Path | None) -> Sample:
    """One caption; the record knows its files, so `root` is not read."""
    return llava_sample(record)
