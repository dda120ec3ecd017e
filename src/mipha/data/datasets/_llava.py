"""LLaVA's published conversation files: one JSON list of {"id", "image", "conversations": [{"from", "value"}, ...]}."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mipha.data.datasets._records import check_split, path_inside
from mipha.data.sample import IMAGE, Message, Role, Sample

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


class LlavaRecord(NamedTuple):
    """One row of a file.

    Args:
        file: The JSON file.
        images: The folder that image paths start from.
        row: Place in the list, from 0.
        content: The row as published.
    """

    file: Path
    images: Path
    row: int
    content: Any


def load_llava(dataset: str, root: Path | None, split: str, filename: str) -> Sequence[LlavaRecord]:
    """Read the rows of a file; they are checked one by one in `to_sample`.

    Args:
        dataset: Name for messages.
        root: The JSON file, or the folder that holds it as `filename`. Images are in the folder's `images` where there is
            one (as LLaVA unpacks the first stage), else in the folder itself (as for the second).
        split: `train` is all there is.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another split, no root, or the file is not a JSON list.
    """
    check_split(dataset, split, ("train",))
    if root is None:
        raise ValueError(f"{dataset} has no packaged copy: set the data's root to {filename} or the folder that holds it")
    file = root / filename if root.is_dir() else root
    if not file.is_file():
        raise FileNotFoundError(f"{dataset}: no file {file}; download {filename} or set the data's root to where it is")
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds a JSON {type(rows).__name__}; wanted a list of conversations")
    images = file.parent / "images" if (file.parent / "images").is_dir() else file.parent
    return [LlavaRecord(file, images, number, row) for number, row in enumerate(rows)]


def llava_sample(dataset: str, record: LlavaRecord) -> Sample:
    """One row as a sample, by LLaVA's rules.

    The image marker moves to the front of the turn that holds it, followed by a new line; several in a turn become one.
    A first turn that is not the human's is left out, and so is a last one that nobody answers.
    Source: `preprocess_multimodal` and `preprocess` of LLaVA 1.5, train.py.

    Raises:
        ValueError: The row is not a conversation, or its image has no marker; the message names file and row.
    """
    where = f"{record.file}, row {record.row}"
    content = record.content
    if not isinstance(content, dict) or not isinstance(content.get("conversations"), list):
        raise ValueError(f'{where}: wanted an object with a list of "conversations"')
    image = content.get("image")
    images = () if image is None else (path_inside(record.images, image, where),)
    messages = [_message(turn, f"{where}, turn {number}") for number, turn in enumerate(content["conversations"])]
    if messages and messages[0].role != "user":
        messages = messages[1:]
    if messages and messages[-1].role == "user":
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"{where}: no human turn is answered, so there is nothing to train on; remove the row")
    name = content.get("id")
    sample_id = f"{dataset}/{record.row}" + (f"/{name}" if isinstance(name, str | int) else "")  # published ids repeat, rows do not
    try:
        return Sample(sample_id, tuple(messages), images)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
        raise ValueError(f'{where}: wanted {{"from": "human" or "gpt", "value": text}}, got {str(turn)[:80]}')
    text = turn["value"]
    if IMAGE in text:
        text = f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
    return Message(_ROLES[turn["from"]], text)
