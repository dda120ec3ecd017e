"""LLaVA-1.5's second stage: 665,298 conversations, some without an image, `llava_v1_5_mix665k.json`.

Source: https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mipha.data.datasets._index import Rows
from mipha.data.datasets._llava import llava_sample, load_llava
from mipha.data.datasets._records import Row
from mipha.data.sample import Sample

FILENAME = "llava_v1_5_mix665k.json"


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """The rows of the published file; `root` is that file or its folder, with `coco`, `gqa`, ... beside it."""
    return load_llava("llava_instruct", root, split, FILENAME, image_root)


def to_sample(record: Row, root: Path | None) -> Sample:
    """One conversation of one or more rounds; the record knows its files, so `root` is not read."""
    return llava_sample(record)
