"""Your own data: {"messages": [...], "images": [...]}, as TRL and OpenAI write conversations.

    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}

A user's content may be a list of parts; the image stands in the part, or in the list beside it:

    [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is it?"}]
    [{"type": "image_url", "image_url": {"url": "cat.jpg"}}, ...]

A turn with `"weight": 0` (or loss, train, trainable: false) is not learned; `system` and `history`
may stand beside the turns. The turns may be divided:

    {"prompt": [{"role": "user", ...}], "completion": [{"role": "assistant", ...}], "images": [...]}

Lines, or one JSON list. Image paths start from the folder of the file. Images without a marker go
to the front of the first user turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from mipha.data.dataset import DataSet
from mipha.data.datasets._keys import MARKS, Keys
from mipha.data.datasets._records import LINE_SUFFIXES, Row, Rows, put_images_first, record_rows
from mipha.data.datasets._regions import READS
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
    keys = row.keys()
    whole = isinstance(row.content.get("messages"), list)
    keys.read.update(("messages",) if whole else ("prompt", "completion"))
    return read_conversation(row, keys, turns)


def turns_of(content: Mapping[str, Any]) -> list[Any] | None:
    """Return the turns of a conversation: `messages`, or `prompt` and `completion` together."""
    if isinstance(content.get("messages"), list):
        return content["messages"]
    parts = content.get("prompt"), content.get("completion")
    return [*parts[0], *parts[1]] if all(isinstance(part, list) for part in parts) else None


def read_conversation(
    row: Row, keys: Keys, turns: Sequence[Any], path: str = "messages[]"
) -> Sample:
    """Read turns of {"role", "content"} as a sample, with what stands beside them.

    Args:
        row: The record.
        keys: Its keys; those of the turns are marked as read.
        turns: Its turns; images stand in the turns themselves, or in the list beside them.
        path: Place of the turns, for remarks.

    Raises:
        RecordError: A turn is something else, images are given in both places, or there are two
            different system turns.
    """
    # Read the turns, and which of them are learned.
    read = [_read_turn(row, keys, number, turn, path) for number, turn in enumerate(turns)]
    messages = [message for message, _ in read]
    messages = keys.with_marks(messages)

    # Put the system turn and earlier turns of the record before them.
    system, own = keys.take_system(), [m for m in messages[:1] if m.role == "system"]
    if system and own and system[0].text.strip() != own[0].text.strip():
        raise row.fault("it has two different system turns", "keep one of them")
    messages = [*(own or system), *keys.take_history(), *messages[len(own) :]]

    # Find the images: in the turns, or beside them.
    images = keys.take_images()
    inline = [value for _, values in read for value in values]
    given = [value for value in inline if value is not None]
    if given and (images or len(given) < len(inline)):
        raise row.fault(
            "images are given inside some parts and beside them", "give all in one place"
        )
    images = given or images
    return row.sample(put_images_first(messages, len(images)), images, keys)


def _read_turn(
    row: Row, keys: Keys, number: int, turn: Any, path: str
) -> tuple[Message, list[Any]]:
    """Read a turn, and the content of each of its image parts."""
    roles = [role for role in get_args(Role) if role != "document"]
    if not isinstance(turn, Mapping) or turn.get("role") not in roles:
        raise row.fault(
            f"message {number} is not an object whose role is {' or '.join(roles)}: "
            f"{str(turn)[:80]}",
            "write the message so, or remove the row",
        )
    role = turn["role"]
    learned = keys.learned(f"message {number}", turn, role)
    keys.turn(path, turn, "role", "content", *MARKS)

    content = turn.get("content")
    if isinstance(content, list):
        parts = [_read_part(row, keys, number, part, path) for part in content]
        text = _join([text for text, _ in parts])
        images = [value for text, value in parts if text == IMAGE]
        return Message(role, text, learned), images
    if not isinstance(content, str):
        raise row.fault(
            f"the content of message {number} is {str(content)[:80]!r}",
            "wanted text, or a list of parts",
        )
    return Message(role, content, learned), []


def _read_part(row: Row, keys: Keys, number: int, part: Any, path: str) -> tuple[str, Any]:
    """Read a part's text, and the content of an image part: None if the image is in the list.

    Source: the parts of TRL and OpenAI, and those of LLaMA-Factory, whose content is `value`.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image" or kind == "image_url" or kind == "input_image":
        names = ("image_url", "image", "path", "url", "value", "bytes", "data")
        name = next((name for name in names if part.get(name) is not None), None)
        keys.turn(f"{path}.content[]", part, "type", "detail", *((name,) if name else ()))
        beside = None if kind == "image" else {}
        return IMAGE, part[name] if name else beside
    name = next((n for n in ("text", "value", "content") if kind and part.get(n) is not None), "")
    text = part[name] if name else None
    if kind in ("text", "input_text", "output_text") and isinstance(text, str):
        if text == IMAGE:  # would be taken for an image part
            raise row.fault(
                f"a text part of message {number} is {IMAGE}",
                'write {"type": "image"} for an image',
            )
        keys.turn(f"{path}.content[]", part, "type", name)
        return text, None
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


DATASET = DataSet("messages", load, to_sample, takes_image_root=True, reads=READS)
