"""Your own data as a table: a picture, a question and its answer, or a picture and its caption, a row.

    image,question,answer                {"image": "cat.jpg", "question": "What is it?", "answer": "A cat."}
    cat.jpg,What is it?,A cat.           {"file_name": "cat.jpg", "text": "A cat on a sofa."}

A .csv or .tsv whose first line names the columns, JSON lines, or one JSON list. A row with an empty image is text alone. Image paths
start from the folder of the file. A caption answers the request "Describe the image."
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mipha.data.datasets._index import LINE_SUFFIXES, TABLE_SUFFIXES, Rows, record_rows
from mipha.data.datasets._records import IMAGE_COLUMNS, Row, image_values, images_first, make_sample
from mipha.data.sample import Message, Sample

QUESTIONS = ("question", "prompt", "query")
ANSWERS = ("answer", "response", "completion")
CAPTIONS = ("caption", "text", "description")
INSTRUCTION = "Describe the image."


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the rows of a split; arguments and errors as in `messages`, of tables also that one is not UTF-8 or leaves a quote open."""
    return record_rows("table", root, split, (*TABLE_SUFFIXES, *LINE_SUFFIXES), image_root)


def to_sample(record: Row, root: Path | None) -> Sample:
    """One question and answer, or one caption; the record knows its file, so `root` is not read.

    Raises:
        ValueError: The row has no such columns, or a cell is empty or no text; the message names file and row.
    """
    if not isinstance(record.content, Mapping):
        raise ValueError(f"{record.where}: wanted an object, got {str(record.content)[:80]}")
    content = by_name(record.content)
    columns = columns_of(content)
    if columns is None:
        raise ValueError(
            f"{record.where} has the columns {', '.join(map(str, record.content)) or 'none'}; wanted {' or '.join(QUESTIONS)} and "
            f"{' or '.join(ANSWERS)}, or an image and {' or '.join(CAPTIONS)}"
        )
    words = [_text(content, column, record.where) for column in columns]
    question, answer = words if len(words) == 2 else (INSTRUCTION, words[0])
    images = image_values(content, record.where)
    if len(words) == 1 and not images:
        raise ValueError(
            f"{record.where}: its caption is about no image; give one, or remove the row"
        )
    turns = [Message("user", question), Message("assistant", answer)]
    return make_sample(record._replace(content=content), images_first(turns, len(images)), images)


def by_name(content: Mapping[Any, Any]) -> dict[str, Any]:
    """A record by its columns' names in small letters, as people write them in either."""
    return {str(name).strip().lower().replace(" ", "_"): value for name, value in content.items()}


def columns_of(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the columns with question and answer; else of the one with the caption, where there is an image; else null.

    Args:
        content: As `by_name` gives it.
    """
    question, answer, caption, image = (
        next((name for name in names if name in content), None)
        for names in (QUESTIONS, ANSWERS, CAPTIONS, IMAGE_COLUMNS)
    )
    if question and answer:
        return question, answer
    return (caption,) if caption and image else None


def _text(content: Mapping[str, Any], column: str, where: str) -> str:
    value = content[column]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{where}: its {column} is {str(value)[:80]!r}; wanted text that is not empty"
        )
    return value
