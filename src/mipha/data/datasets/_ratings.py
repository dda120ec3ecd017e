"""Ratings of turns, as FineVision publishes them: one list a rating, one number a turn.

    {"texts": [{...}, {...}], "relevance_ratings": [5, 2], "relevance_min": 2, ...}

`min_ratings: {relevance: 3}` leaves out the second turn; a sample without turns leaves with them.
A turn that has no rating passes, and is counted.

Source: the card of HuggingFaceM4/FineVision; columns stand in another order in each of its
configs, so they are read by name
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import Any, NamedTuple

import numpy as np

from mipha.data.datasets._images import is_list
from mipha.data.datasets._records import Rows

SUFFIX = "_ratings"


class Rated(NamedTuple):
    """What `min_ratings` left out.

    Args:
        turns_left_out: Questions with their answers.
        samples_left_out: Records without a turn left.
        unrated_turns: Turns that were kept because a rating is missing.
    """

    turns_left_out: int
    samples_left_out: int
    unrated_turns: int

    @property
    def sentence(self) -> str:
        """What was left out, for people."""
        return (
            f"min_ratings leaves out {self.turns_left_out:,} turns, with which "
            f"{self.samples_left_out:,} samples leave; {self.unrated_turns:,} turns have no rating "
            "and stay"
        )


def ratings_of(content: Mapping[str, Any]) -> dict[str, Sequence[Any] | None]:
    """Return the ratings of a record by name: a number or None for each turn, or None."""
    return {
        key.removesuffix(SUFFIX): value if is_list(value) else None
        for key, value in content.items()
        if isinstance(key, str) and key.endswith(SUFFIX) and key != SUFFIX
    }


def judge_turns(
    content: Mapping[str, Any], num_turns: int, min_ratings: Mapping[str, int]
) -> Iterator[bool | None]:
    """Yield whether each turn is kept; None where it is only because a rating is missing."""
    ratings = ratings_of(content)
    for number in range(num_turns):
        found = [
            _as_rating(given[number])
            if (given := ratings.get(name)) and number < len(given)
            else None
            for name in min_ratings
        ]
        pairs = zip(found, min_ratings.values(), strict=True)
        if any(rating is not None and rating < least for rating, least in pairs):
            yield False
        else:
            yield None if None in found else True


def _as_rating(value: Any) -> float | None:
    """Return a rating as a number, which may stand there as text; None where it is none."""
    try:
        rating = float(value)
    except (TypeError, ValueError):
        return None
    return None if isnan(rating) else rating


def keep_rated(rows: Rows) -> tuple[Rows, Rated]:
    """Return the records that have a turn left by the recipe's `min_ratings`, and the counts.

    Every record is read once for it, without its images.

    Raises:
        ValueError: No record has a rating of that name, or none is left.
    """
    wanted = rows.reading.min_ratings
    kept, seen = [], set()
    num_left_out, num_unrated = 0, 0
    for index, content in enumerate(rows.scan(lambda key: key == "texts" or key.endswith(SUFFIX))):
        turns = content.get("texts") if isinstance(content, Mapping) else None
        if not is_list(turns) or not turns:
            kept.append(index)  # whoever reads it says what is wrong
            continue
        seen.update(ratings_of(content))
        judged = list(judge_turns(content, len(turns), wanted))
        num_left_out += judged.count(False)
        num_unrated += judged.count(None)
        if judged.count(False) < len(turns):
            kept.append(index)

    if unknown := sorted(set(wanted) - seen):
        known = ", ".join(sorted(seen)) or "no ratings at all"
        raise ValueError(f"min_ratings names {unknown[0]}, and the data have {known}: rename it")
    if not kept:
        raise ValueError(f"min_ratings={wanted} leaves out all {len(rows):,} samples: lower it")
    rated = Rated(num_left_out, len(rows) - len(kept), num_unrated)
    return rows.keep(np.asarray(kept, dtype=np.int64)), rated
