"""What a record of own data is, whichever kind of file it stands in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mipha.data.datasets import documents, grounding, llava, messages, sharegpt, table, texts
from mipha.data.datasets._records import Row
from mipha.data.sample import Sample

_READERS = {
    "messages": messages.to_sample,
    "llava": llava.to_sample,
    "sharegpt": sharegpt.to_sample,
    "table": table.to_sample,
    "texts": texts.to_sample,
    "documents": documents.to_sample,
    "grounding": grounding.to_sample,
}

READS = tuple(
    dict.fromkeys(
        key
        for module in (documents, grounding, llava, messages, sharegpt, table, texts)
        for key in module.DATASET.reads
    )
)
"""Keys of `ReadingRecipe` that one of the formats heeds."""


def shapes_of(content: Any) -> list[str]:
    """Return the formats that a record fits by its keys: names of the data sets that read it."""
    if not isinstance(content, Mapping):
        return []
    shapes = ["messages"] if messages.turns_of(content) is not None else []
    if isinstance(content.get("conversations"), list):
        shapes.append("llava" if llava.is_llava(content) else "sharegpt")
    if texts.is_texts(content):
        shapes.append("texts")
    elif documents.is_document(content):
        shapes.append("documents")
    if not shapes and grounding.is_grounding(content):
        shapes.append("grounding")
    if not shapes and table.columns_of(table.by_name(content)):
        shapes.append("table")
    return shapes


def describe(content: Mapping[str, Any], shape: str) -> str:
    """Return in words what a record of this shape holds."""
    if shape == "table":
        columns = table.columns_of(table.by_name(content))
        assert columns is not None
        answers = f' (a caption answers "{table.INSTRUCTION}")' if len(columns) == 1 else ""
        return f"rows of {' and '.join(columns)}{answers}"
    return {
        "messages": "conversations whose turns have a role and content",
        "llava": "LLaVA's conversations between human and gpt",
        "sharegpt": "conversations in ShareGPT's manner",
        "texts": "texts of user and assistant, as FineVision has them",
        "grounding": "expressions and boxes, labels and points, or detections",
        "documents": "documents of texts and images in turn, as OBELICS has them",
    }[shape]


def sample_of(row: Row) -> Sample:
    """Read a record by the one format that it fits.

    Raises:
        RecordError: It fits no format, or more than one, or is broken.
    """
    if row.reading.columns:
        return table.to_sample(row)
    shapes = shapes_of(row.content)
    if len(shapes) != 1:
        content = row.content
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else str(content)[:80]
        fits = " and ".join(shapes) or "no known format"
        raise row.fault(
            f"it holds {keys or 'nothing'}, which fits {fits}",
            "wanted messages, or conversations, or texts, or question and answer, "
            "or an image with caption or text",
        )
    return _READERS[shapes[0]](row)
