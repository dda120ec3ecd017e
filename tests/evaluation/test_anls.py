"""ANLS: what counts as near, and where the score falls to 0."""

from __future__ import annotations

import pytest

from mipha.evaluation.anls import anls, edit_distance


# The official results.
@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Gresham Mills", ["Gresham Mills"], 1),
        ("gresham  mills\n", ["Gresham Mills"], 1),
        ("a\tb\u00a0c", ["A b  C"], 1),
        ("Gresham Mill", ["Gresham Mills"], 12 / 13),
        ("1968", ["1969"], 0.75),
        ("2000", ["1969"], 0),
        ("abxy", ["abcd"], 0.5),
        ("axy", ["abcd"], 0),
        # The closest answer counts.
        ("12", ["twelve", "13", "12"], 1),
        # Spaces around a wrong answer lengthen it, so its share of wrong letters falls.
        ("xyz" + " " * 10, ["abc"], 10 / 13),
        # Upper case may be longer.
        ("ß", ["x"], 0.5),
        ("\u00e9", ["e\u0301"], 0),
        ("", ["abc"], 0),
        ("", [""], 1),
        ("  ", [""], 1),
        ("it is written there that it is abc", ["abc"], 0),
    ],
)
def test_scores(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score)


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == edit_distance("sitting", "kitten") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("same", "same") == 0
