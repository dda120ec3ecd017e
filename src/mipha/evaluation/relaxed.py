"""Relaxed accuracy: a number may be off by 5 %, any other text must be the same.

    51 for 48    wrong          48.5 for 48      right        37% for 0.37     right
    0.0 for 0    wrong          1,234 for 1234   wrong        yes for Yes      right

A year is a number as well, so 1950 is right for 2010.

Source: google-research/pix2struct 945f27e9 `pix2struct/metrics.py:relaxed_correctness`.
"""

from __future__ import annotations

TOLERANCE = 0.05
"""Share of the right number by which another may be off."""


def is_relaxed_match(prediction: str, answer: str) -> bool:
    """Return whether a prediction is near enough to the right answer.

    Both texts are taken verbatim. Right answers that are 0 or no number are compared as text,
    without regard to case.
    """
    found, wanted = read_number(prediction), read_number(answer)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= TOLERANCE
    return prediction.lower() == answer.lower()


def read_number(text: str) -> float | None:
    """Return the number that a text is, `%` at its end as hundredths; None for any other text."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
