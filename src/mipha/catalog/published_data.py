"""Sizes of published training sets, for planning without the data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedData:
    """Size of a set, and means over its samples.

    Args:
        samples: Samples of the set, as published.
        images: Images of a sample.
        text_tokens: Tokens of a sample, without the image's.
        supervised_tokens: Tokens of a sample that are trained on.
        source: Source of these numbers; lengths are assumptions until the set has been read.
    """

    samples: int
    images: float
    text_tokens: float
    supervised_tokens: float
    source: str


PUBLISHED_DATA: dict[str, PublishedData] = {
    "llava_pretrain": PublishedData(
        558_128, 1.0, 35, 25, "558,128 rows as published; lengths assumed: a caption of 25 tokens"
    ),
    "llava_instruct": PublishedData(
        665_298, 0.94, 330, 180, "665,298 rows as published; lengths assumed: 330 text tokens"
    ),
}
"""Sizes by the module of the data set."""
