"""Random damage of every kind of input ends in a sentence; `make fuzz` goes on for minutes."""

from __future__ import annotations

import pytest

from tests.fuzz import KINDS, run

MOST = {"requests": 200, "images": 300, "data": 200, "recipes": 40, "states": 60, "models": 25}
MOST["adapters"] = 40
"""Inputs of each kind: a few seconds each."""


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_read_or_refused_with_a_sentence(kind: str) -> None:
    ends = run(kind, seed=1, seconds=600, most=MOST[kind])
    assert ends.total() == MOST[kind] and ends["read"] and len(ends) > 1, ends
