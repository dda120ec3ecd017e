"""Your own data: {"messages": [...], "images": [...]}, as TRL and OpenAI write conversations.

    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}

A user's content may be a list of parts; the image stands in the part, or in the list beside it:

    [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is it?"}]
    [{"type": "image_url", "image_url": {"url": "cat.jpg"}}, ...]

The turns may be divided:

    {"prompt": [{"role": "user", ...}], "completion": [{"role": "assistant", ...}], "images": [...]}

Lines, or one JSON list. Image paths start from the folder of the file. Images without a marker go
to the front of the first user turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from mipha.data.dataset import DataSet
from mipha.data.datasets._images import image_values
from mipha.data.datasets._records import LINE_SUFFIXES, Row, Rows, put_images_first, record_rows
from mipha.data.sample import IMAGE, Message, Role, Sample


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the records of a split; they are read and checked one by one.

    Args:
        root: A file (its one split is `train`), or a folder with one or more files a split:
            train.jsonl, val-00000.jsonl.
        split: Name of the split.
        image_root: Folders that images may lie in; a relative path starts from the first. Empty:
            the folder of the file.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No root, no such split, or a JSON list that is cut short.
    """
    return record_rows("messages", root, split, LINE_SUFFIXES, image_root)


def to_sample(row: Row) -> Sample:
    """Read one conversation.

    Raises:
        RecordError: The record is not such a conversation, or images and markers do not match.
    """
    turns = turns_of(row.content) if isinstance(row.content, Mapping) else None
    if turns is None:
        raise row.fault(
            'it has no list of "messages"', 'wanted an object with a list of "messages"'
        )
    return read_conversation(row, turns, image_values(row.content, row.where))


def turns_of(content: Mapping[str, Any]) -> list[Any] | None:
    """Return the turns of a conversation: `messages`, or `prompt` and `completion` together."""
    if isinstance(content.get("messages"), list):
        return content["messages"]
    parts = content.get("prompt"), content.get("completion")
    return [*parts[0], *parts[1]] if all(isinstance(part, list) for part in parts) else None


def read_conversation(row: Row, turns: Sequence[Any], images: Sequence[Any]) -> Sample:
    """Read turns of {"role", "content"} as a sample.

    Args:
        row: The record.
        turns: Its turns; images stand in the turns themselves, or in the list beside them.
        images: The list beside them.

    Raises:
        RecordError: A turn is something else, or images are given in both places.
    """
    read = [_read_turn(row, number, turn) for number, turn in enumerate(turns)]

    inline = [value for _, values in read for value in values]
    given = [value for value in inline if value is not None]
    if given and (images or len(given) < len(inline)):
        raise row.fault(
            "images are given inside some parts and beside them", "give all in one place"
        )

    images = given or images
    messages = put_images_first([message for message, _ in read], len(images))
    return row.sample(messages, images)


def _read_turn(row: Row, number: int, turn: Any) -> tuple[Message, list[Any]]:
    """Read a turn, and what each of its image parts holds."""
    roles = get_args(Role)
    if not isinstance(turn, Mapping) or turn.get("role") not in roles:
        raise row.fault(
            f"message {number} is not an object whose role is {' or '.join(roles)}: "
            f"{str(turn)[:80]}",
            "write the message so, or remove the row",
        )
    if turn.get("weight") not in (None, 1):
        raise row.fault(
            f'the "weight" of message {number} is {turn["weight"]!r}, but every assistant turn is '
            "trained on alike",
            "remove the turn, or the key",
        )

    content = turn.get("content")
    if isinstance(content, list):
        parts = [_read_part(row, number, part) for part in content]
        text = _join([text for text, _ in parts])
        return Message(turn["role"], text), [value for text, value in parts if text == IMAGE]
    if not isinstance(content, str):
        raise row.fault(
            f"the content of message {number} is {str(content)[:80]!r}",
            "wanted text, or a list of parts",
        )
    return Message(turn["role"], content), []


def _read_part(row: Row, number: int, part: Any) -> tuple[str, Any]:
    """Read a part's text, and for an image part what it holds: None if the image is in the list."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        keys = ("image", "path", "url")
        return IMAGE, next((part[key] for key in keys if part.get(key) is not None), None)
    if kind == "image_url":
        return IMAGE, part.get("image_url") or {}
    if kind == "text" and isinstance(part.get("text"), str):
        if part["text"] == IMAGE:  # would be taken for an image part
            raise row.fault(
                f"a text part of message {number} is {IMAGE}",
                'write {"type": "image"} for an image',
            )
        return part["text"], None
    raise row.fault(
        f'a part of message {number} is not {{"type": "text", "text": ...}}, '
        f'{{"type": "image"}} or {{"type": "image_url", ...}}: {str(part)[:80]}',
        "write the part so, or remove the row",
    )


def _join(parts: Sequence[str]) -> str:
    """Join parts: an image stands on a line of its own, texts follow each other as they are."""
    text = ""
    for number, part in enumerate(parts):
        after_image = number > 0 and parts[number - 1] == IMAGE
        before_image = part == IMAGE and text and not text.endswith("\n")
        text += ("\n" if after_image or before_image else "") + part
    return text


DATASET = DataSet("messages", load, to_sample, takes_image_root=True)
