"""Your own data as LLaVA writes it: {"image": path, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}.

One JSON list, or JSON lines. LLaVA's rules: the image goes to the front of the turn that holds `<image>`; a first turn that is not the
human's and a last one that nobody answers are left out. Image paths start from the folder of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mipha.data.datasets._index import LINE_SUFFIXES, Rows, record_rows
from mipha.data.datasets._llava import llava_sample
from mipha.data.datasets._records import Row
from mipha.data.sample import Sample


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the records of a split; arguments and errors as in `messages`."""
    return record_rows("llava", root, split, LINE_SUFFIXES, image_root)


def to_sample(record: Row, root: Path | None) -> Sample:
    """One conversation; the record knows its file, so `root` is not read.

    Raises:
        ValueError: The record is not such a conversation, or its image has no marker; the message names file and row.
    """
    return llava_sample(record)
