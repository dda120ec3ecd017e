"""LLaVA's first stage: 558,128 captions of LAION, CC and SBU images, `blip_laion_cc_sbu_558k.json`.

Source: https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mipha.data.datasets._llava import LlavaRecord, llava_sample, load_llava
from mipha.data.sample import Sample

FILENAME = "blip_laion_cc_sbu_558k.json"


def load(root: Path | None, split: str) -> Sequence[LlavaRecord]:
    """The rows of the published file; `root` is that file or its folder, with the images beside it or in `images`."""
    return load_llava("llava_pretrain", root, split, FILENAME)


def to_sample(record: LlavaRecord, root: Path | None) -> Sample:
    """One caption; the record knows its files, so `root` is not read."""
    return llava_sample("llava_pretrain", record)
