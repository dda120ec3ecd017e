"""LLaVA's conversations, {"id", "image", "conversations": [{"from", "value"}, ...]}, and LLaVA's rules for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mipha.data.datasets._index import Part, Rows
from mipha.data.datasets._json_records import JsonRecords
from mipha.data.datasets._records import Row, check_split, image_folders, make_sample
from mipha.data.sample import IMAGE, Message, Role, Sample

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


def load_llava(
    dataset: str, root: Path | None, split: str, filename: str, image_root: Sequence[Path] = ()
) -> Rows:
    """Index the rows of a published file, one JSON list; they are read and checked one by one.

    Args:
        dataset: Name for messages.
        root: The JSON file, or the folder that holds it as `filename`. Images are in the folder's `images` where there is
            one (as LLaVA unpacks the first stage), else in the folder itself (as for the second).
        split: `train` is all there is.
        image_root: Folders that images may lie in, where they are elsewhere; a relative path starts from the first.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another split, no root, or the file is not a JSON list.
    """
    check_split(dataset, split, ("train",))
    if root is None:
        raise ValueError(
            f"{dataset} has no packaged copy: set the data's root to {filename} or the folder that holds it"
        )
    file = root / filename if root.is_dir() else root
    if not file.is_file():
        raise FileNotFoundError(
            f"{dataset}: no file {file}; download {filename} or set the data's root to where it is"
        )
    records = JsonRecords(file)
    if not records.is_list:
        raise ValueError(
            f"{file} holds no JSON list; wanted a list of conversations (for JSON lines, set the data set to llava)"
        )
    images = file.parent / "images" if (file.parent / "images").is_dir() else file.parent
    return Rows(dataset, [Part(dataset, records, image_folders(file, image_root, base=images))])


def llava_sample(row: Row) -> Sample:
    """One row as a sample, by LLaVA's rules.

    The image marker moves to the front of the turn that holds it, followed by a new line; several in a turn become one.
    A first turn that is not the human's is left out, and so is a last one that nobody answers.
    Source: `preprocess_multimodal` and `preprocess` of LLaVA 1.5, train.py.

    Raises:
        ValueError: The row is not a conversation, or its image has no marker; the message names file and row.
    """
    content = row.content
    if not isinstance(content, Mapping) or not isinstance(content.get("conversations"), list):
        raise ValueError(f'{row.where}: wanted an object with a list of "conversations"')
    messages = [
        _message(turn, f"{row.where}, turn {number}")
        for number, turn in enumerate(content["conversations"])
    ]
    if messages and messages[0].role != "user":
        messages = messages[1:]
    if messages and messages[-1].role == "user":
        messages = messages[:-1]
    if not messages:
        raise ValueError(
            f"{row.where}: no human turn is answered, so there is nothing to train on; remove the row"
        )
    return make_sample(row, messages, [] if content.get("image") is None else [content["image"]])


def _message(turn: Any, where: str) -> Message:
    if (
        not isinstance(turn, Mapping)
        or turn.get("from") not in ROLES
        or not isinstance(turn.get("value"), str)
    ):
        raise ValueError(
            f'{where}: wanted {{"from": "human" or "gpt", "value": text}}, got {str(turn)[:80]}'
        )
    text = turn["value"]
    if IMAGE in text:
        text = f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
    return Message(ROLES[turn["from"]], text)
