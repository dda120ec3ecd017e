"""Relaxed accuracy: which texts are numbers, and how near is near enough."""

from __future__ import annotations

import pytest

from mipha.evaluation.relaxed import is_relaxed_match, read_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *((" 5\n", 5), ("+.5", 0.5), ("5.", 5), ("1e3", 1000), ("1_000", 1000), ("１２", 12)),
        *(("62%", 0.62), ("62%%", 0.62), (" 62 %", 0.62)),
        *(("62% ", None), ("1,234", None), ("$5", None), ("5 cm", None), ("1/2", None)),
        *(("−5", None), ("0x10", None), ("", None), ("%", None), ("Yes", None)),
    ],
)
def test_which_texts_are_numbers(text: str, number: float | None) -> None:
    assert read_number(text) == (None if number is None else pytest.approx(number))


# The official results.
@pytest.mark.parametrize(
    ("prediction", "answer", "is_right"),
    [
        *(("105", "100", True), ("95", "100", True), ("105.1", "100", False)),
        *(("62%", "62", False), ("62%", "0.62", True), ("62%", "62%", True)),
        *(("1950", "2010", True), ("-5", "5", False)),
        *(("0", "0", True), ("0.0", "0", False), ("0%", "0", False)),
        *(("1,234", "1,234", True), ("1234", "1,234", False)),
        *(("yes", "Yes", True), ("Yes.", "Yes", False), (" Yes", "Yes", False)),
        *(("yes\n", "Yes", False), ("5\n", "5", True), ("", "", True), ("", "5", False)),
        *(("STRASSE", "straße", False), ("nan", "5", False), ("nan", "nan", False)),
        *(("inf", "inf", False), ("nan", "0", False), ("[8, 12]", "[8, 12]", True)),
        # Binary floating point decides: 0.05 * 3 is a little more than the difference.
        ("3.15", "3", abs(3.15 - 3) / 3 <= 0.05),
    ],
)
def test_matches(prediction: str, answer: str, is_right: bool) -> None:
    assert is_relaxed_match(prediction, answer) == is_right
