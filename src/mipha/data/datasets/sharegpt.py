"""Your own data as ShareGPT's successors write it: `conversations` with more than LLaVA's have.

That is other roles, a system turn, or several images:

    {"conversations": [{"from": "system" | "human" | "gpt", "value": "<image>..."}, ...],
     "images": ["a.jpg", "b.jpg"], "system": "..."}
    {"conversations": [{"role": "user" | "assistant", "content": "..."}, ...], "images": [...]}

JSON lines, or one JSON list. Every turn is kept and every `<image>` stays where it is; images
without a marker go to the front of the first user turn. Image paths start from the folder of the
file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mipha.data.dataset import DataSet
from mipha.data.datasets._records import LINE_SUFFIXES, Row, Rows, record_rows
from mipha.data.datasets._regions import READS
from mipha.data.datasets.messages import read_conversation
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


def to_sample(row: Row) -> Sample:
    """Read one conversation.

    Raises:
        RecordError: The record is not such a conversation, or images and markers do not match.
    """
    content = row.content
    if not isinstance(content, Mapping) or not isinstance(content.get("conversations"), list):
        raise row.fault(
            'it has no list of "conversations"', 'wanted an object with a list of "conversations"'
        )

    keys = row.keys()
    keys.read.add("conversations")
    turns = [_named_turn(row, number, turn) for number, turn in enumerate(content["conversations"])]
    return read_conversation(row, keys, turns, path="conversations[]")


def _named_turn(row: Row, number: int, turn: Any) -> dict[str, Any]:
    """Return a turn under the names that `messages` uses, with its other keys."""
    name = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise row.fault(
            f'turn {number} is not an object whose "from" is {" or ".join(ROLES)}: '
            f"{str(turn)[:80]}",
            "write the turn so, or remove the row",
        )
    roles = {ROLES.get(str(turn[key]).lower()) for key in ("from", "role") if turn.get(key)}
    if len(roles) > 1 or None not in (turn.get("value"), turn.get("content")):
        raise row.fault(f"turn {number} has two roles or texts: {str(turn)[:80]}", "keep one")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    content = turn.get("value", turn.get("content"))
    return rest | {"role": ROLES[name.lower()], "content": content}


DATASET = DataSet("sharegpt", load, to_sample, takes_image_root=True, reads=READS)
