"""Your own data as a table: a row is an image, a question and its answer, or image and caption.

    image,question,answer
    cat.jpg,What is it?,A cat.

    {"image": "cat.jpg", "question": "What is it?", "answer": "A cat."}
    {"file_name": "cat.jpg", "text": "A cat on a sofa."}

A .csv or .tsv whose first line names the columns, JSON lines, or one JSON list. A row with an empty
image is text alone. Image paths start from the folder of the file. A caption answers the request
"Describe the image."
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mipha.data.dataset import DataSet
from mipha.data.datasets._images import IMAGE_COLUMNS, image_values
from mipha.data.datasets._records import (
    LINE_SUFFIXES,
    TABLE_SUFFIXES,
    Row,
    Rows,
    put_images_first,
    record_rows,
)
from mipha.data.sample import Message, Sample

QUESTIONS = ("question", "prompt", "query")
ANSWERS = ("answer", "response", "completion")
CAPTIONS = ("caption", "text", "description")
INSTRUCTION = "Describe the image."


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the rows of a split; arguments and errors as in `messages`.

    Raises:
        ValueError: Also where a table is not UTF-8 or leaves a quote open.
    """
    return record_rows("table", root, split, (*TABLE_SUFFIXES, *LINE_SUFFIXES), image_root)


def to_sample(row: Row) -> Sample:
    """Read one question and answer, or one caption.

    Raises:
        RecordError: The row has no such columns, or a cell is empty or not text.
    """
    if not isinstance(row.content, Mapping):
        raise row.fault(
            f"the row is not an object: {str(row.content)[:80]}", "name its columns in an object"
        )
    content = by_name(row.content)
    columns = columns_of(content)
    if columns is None:
        raise row.fault(
            f"it has the columns {', '.join(map(str, row.content)) or 'none'}",
            f"wanted {' or '.join(QUESTIONS)} and {' or '.join(ANSWERS)}, "
            f"or an image and {' or '.join(CAPTIONS)}",
        )

    words = [_read_text(row, content, column) for column in columns]
    question, answer = words if len(words) == 2 else (INSTRUCTION, words[0])
    images = image_values(content, row.where)
    if len(words) == 1 and not images:
        raise row.fault("its caption is about no image", "give one, or remove the row")

    turns = [Message("user", question), Message("assistant", answer)]
    return row._replace(content=content).sample(put_images_first(turns, len(images)), images)


def by_name(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a record by its columns' names in small letters; people write them in either case."""
    return {str(name).strip().lower().replace(" ", "_"): value for name, value in content.items()}


def columns_of(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Name the columns with question and answer; else the one with the caption of an image.

    Args:
        content: A record, as `by_name` gives it.

    Returns:
        One or two names; None where the record has neither.
    """
    question, answer, caption, image = (
        next((name for name in names if name in content), None)
        for names in (QUESTIONS, ANSWERS, CAPTIONS, IMAGE_COLUMNS)
    )
    if question and answer:
        return question, answer
    return (caption,) if caption and image else None


def _read_text(row: Row, content: Mapping[str, Any], column: str) -> str:
    value = content[column]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise row.fault(f"its {column} is {str(value)[:80]!r}", "wanted text that is not empty")
    return value


DATASET = DataSet("table", load, to_sample, takes_image_root=True)
