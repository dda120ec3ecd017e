"""Your own data: {"messages": [...], "images": [paths]} a line, as TRL and OpenAI write conversations.

    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, ...], "images": ["cat.jpg"]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is it?"}]}, ...]}
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.jpg"}}, ...]}, ...]}
    {"prompt": [{"role": "user", ...}], "completion": [{"role": "assistant", ...}], "images": ["cat.jpg"]}

Lines, or one JSON list. Image paths start from the folder of the file. Images without a marker go to the front of the first user turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from mipha.data.datasets._index import LINE_SUFFIXES, Rows, record_rows
from mipha.data.datasets._records import Row, image_values, images_first, make_sample
from mipha.data.sample import IMAGE, Message, Role, Sample


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the records of a split; they are read and checked one by one.

    Args:
        root: A file (its one split is `train`), or a folder with one or more files a split: train.jsonl, val-00000.jsonl.
        split: Which.
        image_root: Folders that images may lie in; a relative path starts from the first. None: the folder of the file.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No root, no such split, or a JSON list that is cut short.
    """
    return record_rows("messages", root, split, LINE_SUFFIXES, image_root)


def to_sample(record: Row, root: Path | None) -> Sample:
    """One conversation; the record knows its file, so `root` is not read.

    Raises:
        ValueError: The record is not such a conversation, or images and markers do not match; the message names file and row.
    """
    content = record.content
    turns = turns_of(content) if isinstance(content, Mapping) else None
    if turns is None:
        raise ValueError(f'{record.where}: wanted an object with a list of "messages"')
    return conversation(record, turns, image_values(content, record.where))


def turns_of(content: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a conversation, null if there are none: `messages`, or `prompt` and `completion` together."""
    if isinstance(content.get("messages"), list):
        return content["messages"]
    parts = content.get("prompt"), content.get("completion")
    return [*parts[0], *parts[1]] if all(isinstance(part, list) for part in parts) else None


def conversation(row: Row, turns: Sequence[Any], images: Sequence[Any]) -> Sample:
    """Turns of {"role", "content"} as a sample; images stand in the turns themselves or in a list beside them.

    Raises:
        ValueError: A turn is nothing of the kind, or images are given in both places; the message names file and row.
    """
    read = [_read_turn(turn, f"{row.where}, message {number}") for number, turn in enumerate(turns)]
    inline = [value for _, values in read for value in values]
    given = [value for value in inline if value is not None]
    if given and (images or len(given) < len(inline)):
        raise ValueError(
            f"{row.where}: images are given inside some parts and beside them; give all in one place"
        )
    images = given or images
    return make_sample(row, images_first([message for message, _ in read], len(images)), images)


def _read_turn(turn: Any, where: str) -> tuple[Message, list[Any]]:
    """A turn, and what each of its image parts holds."""
    roles = get_args(Role)
    if not isinstance(turn, Mapping) or turn.get("role") not in roles:
        raise ValueError(
            f"{where}: wanted an object whose role is {' or '.join(roles)}, got {str(turn)[:80]}"
        )
    if turn.get("weight") not in (None, 1):
        raise ValueError(
            f'{where}: "weight" is {turn["weight"]!r}, but every assistant turn is trained on alike; remove the turn, or the key'
        )
    content = turn.get("content")
    if isinstance(content, list):
        parts = [_read_part(part, where) for part in content]
        return Message(turn["role"], _join([text for text, _ in parts])), [
            value for text, value in parts if text == IMAGE
        ]
    if not isinstance(content, str):
        raise ValueError(
            f"{where}: its content is {str(content)[:80]!r}; wanted text, or a list of parts"
        )
    return Message(turn["role"], content), []


def _read_part(part: Any, where: str) -> tuple[str, Any]:
    """A part's text, and for an image part what it holds: null where the image is in the list beside."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE, next(
            (part[key] for key in ("image", "path", "url") if part.get(key) is not None), None
        )
    if kind == "image_url":
        return IMAGE, part.get("image_url") or {}
    if kind == "text" and isinstance(part.get("text"), str):
        if part["text"] == IMAGE:  # would be taken for an image part
            raise ValueError(
                f'{where}: a text part is {IMAGE}; write {{"type": "image"}} for an image'
            )
        return part["text"], None
    raise ValueError(
        f'{where}: wanted parts {{"type": "text", "text": ...}}, {{"type": "image"}} or {{"type": "image_url", ...}}, got {str(part)[:80]}'
    )


def _join(parts: Sequence[str]) -> str:
    """Parts as one text: an image stands on a line of its own, texts follow each other as they are."""
    text = ""
    for number, part in enumerate(parts):
        after_image = number > 0 and parts[number - 1] == IMAGE
        before_image = part == IMAGE and text and not text.endswith("\n")
        text += ("\n" if after_image or before_image else "") + part
    return text
