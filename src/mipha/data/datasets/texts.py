"""Your own data as the_cauldron and FineVision publish it: images, then questions and answers.

    {"images": ["a.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat."}, ...]}

JSON lines, one JSON list, or the rows of a parquet file. All images stand in front of the first
question, unless the texts have one `<image>` for each of them; other markers are left out.

Source: the cards of HuggingFaceM4/the_cauldron and HuggingFaceM4/FineVision
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mipha.data.dataset import DataSet
from mipha.data.datasets._keys import MARKS, Keys
from mipha.data.datasets._records import LINE_SUFFIXES, Row, Rows, put_images_first, record_rows
from mipha.data.sample import IMAGE, Message, Sample


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the records of a split; arguments and errors as in `messages`."""
    return record_rows("texts", root, split, LINE_SUFFIXES, image_root)


def to_sample(row: Row) -> Sample:
    """Read one record.

    Raises:
        RecordError: Its texts are not questions and answers, or an image does not fit.
    """
    if not isinstance(row.content, Mapping) or not is_texts(row.content):
        raise row.fault(
            'it has no list of "texts" with user and assistant',
            'wanted {"texts": [{"user": text, "assistant": text}]}',
        )
    keys = row.keys()
    keys.read.add("texts")
    turns = [
        message
        for number, turn in enumerate(row.content["texts"])
        for message in _read_turns(row, keys, number, turn)
    ]
    turns = [*keys.take_system(), *keys.with_marks(turns)]

    # Markers are places only where there is one for each image.
    images = keys.take_images()
    num_markers = sum(turn.text.count(IMAGE) for turn in turns)
    if num_markers not in (0, len(images)):
        keys.remark("removed-marker", f"{IMAGE} markers that are not one for each image go")
        turns = [
            Message(turn.role, turn.text.replace(IMAGE, "").strip(), turn.learned) for turn in turns
        ]
    return row.sample(put_images_first(turns, len(images)), images, keys)


def is_texts(content: Mapping[str, Any]) -> bool:
    """Return whether a record has a list of questions and answers under `texts`."""
    texts = content.get("texts")
    return (
        isinstance(texts, list)
        and bool(texts)
        and all(isinstance(turn, Mapping) and {"user", "assistant"} <= set(turn) for turn in texts)
    )


def _read_turns(row: Row, keys: Keys, number: int, turn: Mapping[str, Any]) -> list[Message]:
    asked, said = turn["user"], turn["assistant"]
    if not isinstance(asked, str) or not isinstance(said, str):
        raise row.fault(
            f"text {number} is {str(turn)[:80]}", "wanted text of both user and assistant"
        )
    learned = keys.learned(f"text {number}", turn, "assistant")
    # `source` names the set that a turn came from, and is no part of it.
    keys.turn("texts[]", turn, "user", "assistant", "source", *MARKS)
    return [Message("user", asked), Message("assistant", said, learned)]


DATASET = DataSet("texts", load, to_sample, takes_image_root=True)
