"""YAML of strangers: aliases that mean billions, keys that stand twice, brackets without end."""

from __future__ import annotations

import pytest

from mipha.lookup import read_yaml

BOMB = "l0: &l0 [1]\n" + "".join(
    f"l{number}: &l{number} [{', '.join([f'*l{number - 1}'] * 9)}]\n" for number in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"mine\.yaml means more than 100,000 values: write fewer aliases"),
        ("a: &a [*a]", r"mine\.yaml means more than 100,000 values: write fewer aliases"),
        ("a: 1\nb: {c: 2, d: 3, c: 4}", r"mine\.yaml is not valid YAML: the key 'c' stands twice"),
        ("[" * 5000, r"mine\.yaml is nested too deeply"),
        (b"name: \xff", r"mine\.yaml is not UTF-8 text"),
    ],
    ids=["bomb", "loop", "twice", "deep", "bytes"],
)
def test_yaml_that_means_harm_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_yaml(text, "mine.yaml")


def test_aliases_merges_and_short_exponents_are_read() -> None:
    text = "a: &a {x: 1e-3, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n"
    shared = {"x": 1e-3, "y": 2}
    assert read_yaml(text, "") == {"a": shared, "b": shared, "c": shared | {"y": 3}}
    assert read_yaml("", "") is None
