"""What is known of published training sets without having them: for planning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedData:
    """Means over a set.

    Args:
        samples: As published.
        images: A sample.
        text_tokens: A sample, the image's not counted.
        supervised_tokens: Of them.
        source: Where these come from; lengths are assumptions until the set has been read.
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
"""By the data set's module."""
