"""Your own data: JSON lines of {"messages": [...], "images": [paths]}, as TRL and OpenAI write conversations.

    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}, ...], "images": ["cat.jpg"]}

Image paths start from the folder of the file. Images without a marker go to the front of the first user turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from mipha.data.datasets._records import check_split, path_inside
from mipha.data.sample import IMAGE, Message, Role, Sample


class MessagesRecord(NamedTuple):
    """One line of a file; `line` counts from 1, as editors do."""

    file: Path
    line: int
    content: Any


def load(root: Path | None, split: str) -> Sequence[MessagesRecord]:
    """Read the lines of a file; they are checked one by one in `to_sample`.

    Args:
        root: A .jsonl file (its one split is `train`), or a folder with one `<split>.jsonl` a split.
        split: Which.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No root, no such split, or a line is not valid JSON.
    """
    if root is None:
        raise ValueError("messages has no packaged copy: set the data's root to a .jsonl file, or a folder with train.jsonl")
    if not root.exists():
        raise FileNotFoundError(f"messages: no file or folder {root}; check the data's root")
    check_split(f"messages in {root}", split, sorted(path.stem for path in root.glob("*.jsonl")) if root.is_dir() else ("train",))
    file = root / f"{split}.jsonl" if root.is_dir() else root
    records = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                records.append(MessagesRecord(file, number, json.loads(line.decode("utf-8-sig"))))
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not valid JSON: {error}") from error
    return records


def to_sample(record: MessagesRecord, root: Path | None) -> Sample:
    """One conversation; the record knows its file, so `root` is not read.

    Raises:
        ValueError: The line is not such a conversation, or images and markers do not match; the message names file and line.
    """
    where = f"{record.file}, line {record.line}"
    content = record.content
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        raise ValueError(f'{where}: wanted an object with a list of "messages"')
    paths = content.get("images")
    if paths is not None and not isinstance(paths, list):
        raise ValueError(f'{where}: "images" is {str(paths)[:80]!r}; wanted a list of paths')
    images = tuple(path_inside(record.file.parent, path, where) for path in paths or ())
    messages = [_message(turn, f"{where}, message {number}") for number, turn in enumerate(content["messages"])]
    if images and not any(IMAGE in message.text for message in messages):
        messages = _images_first(messages, len(images))
    name = content.get("id")
    sample_id = f"messages/{record.file.stem}/{record.line}" + (f"/{name}" if isinstance(name, str | int) else "")
    try:
        return Sample(sample_id, tuple(messages), images)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _message(turn: Any, where: str) -> Message:
    roles = get_args(Role)
    if not isinstance(turn, dict) or turn.get("role") not in roles:
        raise ValueError(f"{where}: wanted an object whose role is {' or '.join(roles)}, got {str(turn)[:80]}")
    content = turn.get("content")
    if isinstance(content, list):
        return Message(turn["role"], _join([_part(part, where) for part in content]))
    if not isinstance(content, str):
        raise ValueError(f"{where}: its content is {str(content)[:80]!r}; wanted text, or a list of parts")
    return Message(turn["role"], content)


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return IMAGE
    if kind == "text" and isinstance(part.get("text"), str):
        if part["text"] == IMAGE:  # would be taken for an image part
            raise ValueError(f'{where}: a text part is {IMAGE}; write {{"type": "image"}} for an image')
        return part["text"]
    raise ValueError(
        f'{where}: wanted parts {{"type": "text", "text": ...}} or {{"type": "image"}} (paths go to "images"), got {str(part)[:80]}'
    )


def _join(parts: Sequence[str]) -> str:
    """Parts as one text: an image stands on a line of its own, texts follow each other as they are."""
    text = ""
    for number, part in enumerate(parts):
        after_image = number > 0 and parts[number - 1] == IMAGE
        before_image = part == IMAGE and text and not text.endswith("\n")
        text += ("\n" if after_image or before_image else "") + part
    return text


def _images_first(messages: list[Message], num_images: int) -> list[Message]:
    """All images, a line each, at the front of the first user turn."""
    for number, message in enumerate(messages):
        if message.role == "user":
            return [*messages[:number], Message("user", f"{IMAGE}\n" * num_images + message.text), *messages[number + 1 :]]
    return messages
