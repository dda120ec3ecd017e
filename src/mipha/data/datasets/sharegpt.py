"""Your own data as ShareGPT's successors write it: `conversations` with other roles, a system turn, or several images.

    {"conversations": [{"from": "system" | "human" | "gpt", "value": "<image>..."}, ...], "images": ["a.jpg", "b.jpg"], "system": "..."}
    {"conversations": [{"role": "user" | "assistant", "content": "..."}, ...], "images": [...]}

JSON lines, or one JSON list. Every turn is kept and every `<image>` stays where it is; images without a marker go to the front of the
first user turn. Image paths start from the folder of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mipha.data.datasets._index import LINE_SUFFIXES, Rows, record_rows
from mipha.data.datasets._records import Row, image_values
from mipha.data.datasets.messages import conversation
from mipha.data.sample import Role, Sample

# Source: the names in ShareGPT exports and in the data sets that LLaMA-Factory and ms-swift read
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
}


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the records of a split; arguments and errors as in `messages`."""
    return record_rows("sharegpt", root, split, LINE_SUFFIXES, image_root)


def to_sample(record: Row, root: Path | None) -> Sample:
    """One conversation; the record knows its file, so `root` is not read.

    Raises:
        ValueError: The record is not such a conversation, or images and markers do not match; the message names file and row.
    """
    content = record.content
    if not isinstance(content, Mapping) or not isinstance(content.get("conversations"), list):
        raise ValueError(f'{record.where}: wanted an object with a list of "conversations"')
    turns = [
        _turn(turn, f"{record.where}, turn {number}")
        for number, turn in enumerate(content["conversations"])
    ]
    if system := content.get("system"):
        turns.insert(0, {"role": "system", "content": system})
    return conversation(record, turns, image_values(content, record.where))


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """A turn under the names that `messages` uses."""
    name = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise ValueError(
            f'{where}: wanted an object whose "from" is {" or ".join(ROLES)}, got {str(turn)[:80]}'
        )
    return {"role": ROLES[name.lower()], "content": turn.get("value", turn.get("content"))}
