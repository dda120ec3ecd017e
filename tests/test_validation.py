"""A wrong key is named with the keys that may stand in its place, however deep it stands."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict

from mipha.validation import validated


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Leaf(Strict):
    colour: str
    size: int = 1


class Other(Strict):
    shape: str


class Tree(Strict):
    leaves: tuple[Leaf, ...] = ()
    named: dict[str, Leaf | Other] = {}
    best: Leaf | None = None


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"leafs": []}, "leafs: unknown key; did you mean leaves?"),
        (
            {"leaves": [{"colour": "red", "sise": 2}]},
            "leaves.0.sise: unknown key; did you mean size?",
        ),
        (
            {"best": {"colour": "red", "colur": "red"}},
            "best.colur: unknown key; did you mean colour?",
        ),
        (
            {"named": {"mine": {"shpe": "oval"}}},
            "named.mine.Other.shpe: unknown key; did you mean shape or size?",
        ),
        (
            {"leaves": [{"colour": "red", "size": "big"}]},
            "leaves.0.size: must be a whole number",
        ),
        ({"leaves": [{"colour": "red", "size": "big"}]}, "(got 'big')"),
        ({"best": {}}, "best.colour: is missing"),
        ({"colour": "red", "best": {}}, "colour: unknown key; did you mean best.colour?"),
        (
            {"size": 2, "named": {"mine": {"colour": "red"}}},
            "size: unknown key; did you mean named.mine.size?",
        ),
        ([], "plant: must be a group of keys"),
    ],
)
def test_a_line_for_each_wrong_key(tree: object, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        validated(Tree, tree, "tree.yaml", "plant")
    assert str(caught.value).startswith("tree.yaml is not a valid plant:\n  ") and sentence in str(
        caught.value
    )


def test_a_long_value_is_not_repeated() -> None:
    with pytest.raises(ValueError) as caught:
        validated(Tree, {"best": {"colour": "red", "size": "x" * 500}}, "tree.yaml", "plant")
    assert "xxx" not in str(caught.value)


def test_what_is_right_is_the_schemas_object() -> None:
    assert validated(Tree, {"leaves": [{"colour": "red"}]}, "tree.yaml", "plant").leaves == (
        Leaf(colour="red"),
    )
