"""What a record of own data is, whichever kind of file it stands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mipha.data.datasets import llava, messages, sharegpt, table
from mipha.data.datasets._llava import ROLES
from mipha.data.datasets._records import Row
from mipha.data.sample import Sample

_READERS: dict[str, Callable[[Row, Path | None], Sample]] = {
    "messages": messages.to_sample,
    "llava": llava.to_sample,
    "sharegpt": sharegpt.to_sample,
    "table": table.to_sample,
}


def shapes_of(content: Any) -> list[str]:
    """The formats that a record fits by its keys: the names of the data set modules that would read it."""
    if not isinstance(content, Mapping):
        return []
    shapes = ["messages"] if messages.turns_of(content) is not None else []
    if isinstance(content.get("conversations"), list):
        shapes.append("llava" if _is_llava(content) else "sharegpt")
    if not shapes and table.columns_of(table.by_name(content)):
        shapes.append("table")
    return shapes


def describe(content: Mapping[str, Any], shape: str) -> str:
    """What a record of this shape holds, in words."""
    if shape == "table":
        columns = table.columns_of(table.by_name(content))
        assert columns is not None
        return f"rows of {' and '.join(columns)}" + (
            f' (a caption answers "{table.INSTRUCTION}")' if len(columns) == 1 else ""
        )
    return {
        "messages": "conversations whose turns have a role and content",
        "llava": "LLaVA's conversations between human and gpt",
        "sharegpt": "conversations in ShareGPT's manner",
    }[shape]


def sample_of(row: Row) -> Sample:
    """A record as a sample, read by the one format that it fits.

    Raises:
        ValueError: It fits none, or more than one, or is broken; the message names file and row.
    """
    shapes = shapes_of(row.content)
    if len(shapes) != 1:
        keys = (
            ", ".join(map(str, row.content))
            if isinstance(row.content, Mapping)
            else str(row.content)[:80]
        )
        raise ValueError(
            f"{row.where} holds {keys or 'nothing'}, which fits {' and '.join(shapes) or 'no known format'}; "
            "wanted messages, or conversations, or question and answer, or an image with caption or text"
        )
    return _READERS[shapes[0]](row, None)


def _is_llava(content: Mapping[str, Any]) -> bool:
    if (
        content.get("images") is not None
        or content.get("system")
        or isinstance(content.get("image"), list)
    ):
        return False
    return all(
        isinstance(turn, Mapping) and turn.get("from") in ROLES for turn in content["conversations"]
    )
