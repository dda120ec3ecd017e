"""Run folders and studies are known again by the digests of their recipes, so digests stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.alignment.recipe import list_alignment_recipes, load_alignment_recipe
from mipha.recipe import list_recipes, load_recipe
from mipha.studies.study import list_studies, load_study

KNOWN = json.loads((Path(__file__).parent / "digests.json").read_text(encoding="utf-8"))
"""As computed before stages had names of their own. A new key goes into `recipe._LATER`."""


def test_recipes_keep_their_digests() -> None:
    assert {name: load_recipe(name).digest() for name in list_recipes()} == KNOWN["recipe"]


def test_alignment_recipes_keep_their_digests() -> None:
    found = {name: load_alignment_recipe(name).digest() for name in list_alignment_recipes()}
    assert found == KNOWN["alignment"]


@pytest.mark.parametrize("name", list_studies())
@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_studies_keep_their_digests_and_those_of_their_variants(name: str, scale: str) -> None:
    experiment = load_study(name).at(scale)
    assert experiment.digest() == KNOWN["study"][f"{name} {scale}"]
    for variant in experiment.variants:
        assert variant.recipe.digest() == KNOWN["variant"][f"{name} {scale} {variant.name}"]
