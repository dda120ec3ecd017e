"""ANLS, the score of answers that were read from a document: how few letters are wrong.

    "gresham mill" for "Gresham Mills"    1 - 1/13 = 0.92    one letter is missing
    "abxy" for "abcd"                     0.5                half of the letters: it stays
    "axy" for "abcd"                      0                  below a half

The distance is that of the texts in lower case with single spaces. It is divided by the length of
the longer text as it was given, in upper case, so spaces around a wrong answer raise its score.

Source: the evaluation script of the Robust Reading Competition, copied in QwenLM/Qwen-VL aa00ed04
    `eval_mm/infographicsvqa_eval.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5
"""A score below this is 0; this one stays."""


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the score of a prediction against the closest of the right answers, 0 to 1.

    Args:
        prediction: The text, verbatim.
        answers: Right answers, verbatim; at least one.
    """
    score = 1 - min(_distance_share(prediction, answer) for answer in answers)
    return score if score >= THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: insertions, deletions and replacements, each 1."""
    previous = list(range(len(b) + 1))
    for row, left in enumerate(a, start=1):
        current = [row]
        for column, right in enumerate(b, start=1):
            replaced = previous[column - 1] + (left != right)
            current.append(min(previous[column] + 1, current[-1] + 1, replaced))
        previous = current
    return previous[-1]


def _distance_share(prediction: str, answer: str) -> float:
    # Upper case may be longer: that of ß is SS.
    longest = max(len(prediction.upper()), len(answer.upper()))
    if not longest:
        return 0.0
    return edit_distance(_normalise(prediction), _normalise(answer)) / longest


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())
