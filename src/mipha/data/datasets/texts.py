"""Your own data as the_cauldron and FineVision publish it: images, then questions and answers.

    {"images": ["a.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat."}, ...]}

JSON lines, one JSON list, or the rows of a parquet file. All images stand in front of the first
question, unless the texts have one `<image>` for each of them; other markers are left out. Turns
may be rated (`relevance_ratings`, ...), and the recipe's `min_ratings` leaves some out.

Source: the cards of HuggingFaceM4/the_cauldron and HuggingFaceM4/FineVision
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mipha.data.dataset import DataSet
from mipha.data.datasets._keys import MARKS, Keys
from mipha.data.datasets._ratings import SUFFIX, judge_turns, ratings_of
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
    keys, content = row.keys(), row.content
    turns = content["texts"]
    ratings = ratings_of(content)
    keys.read.update(("texts", "source"), *((f"{n}_ratings", f"{n}_min") for n in ratings))
    for name, given in ratings.items():
        if given is not None and len(given) != len(turns):
            about = f"{name}{SUFFIX} are not one for each turn; missing ones count as unrated"
            keys.remark("rating-count", about, f"{about}: {len(given)} for {len(turns)} turns")

    # Markers are places only where there is one for each image.
    messages = [
        message
        for number, turn in enumerate(turns)
        for message in _read_turns(row, keys, number, turn)
    ]
    messages = keys.with_marks(messages)
    images = keys.take_images()
    num_markers = sum(message.text.count(IMAGE) for message in messages)
    if num_markers not in (0, len(images)):
        about = f"{IMAGE} stands in the texts, but not once for each image, so it is left out"
        what = f"{about}: {num_markers} markers for {len(images)} images"
        keys.remark("foreign-marker", about, what)
        messages = [
            replace(message, text=message.text.replace(IMAGE, "").strip()) for message in messages
        ]
        num_markers = 0

    # Leave out turns that are rated low, with the images whose places are in them.
    if row.reading.min_ratings:
        judged = list(judge_turns(content, len(turns), row.reading.min_ratings))
        kept = [message for n, message in enumerate(messages) if judged[n // 2] is not False]
        if num_markers:
            shown = [
                judged[n // 2] is not False
                for n, message in enumerate(messages)
                for _ in range(message.text.count(IMAGE))
            ]
            images = [image for image, keep in zip(images, shown, strict=True) if keep]
        messages = kept
    messages = [*keys.take_system(), *messages]
    return row.sample(put_images_first(messages, len(images)), images, keys)


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


DATASET = DataSet("texts", load, to_sample, takes_image_root=True, reads=("min_ratings",))
