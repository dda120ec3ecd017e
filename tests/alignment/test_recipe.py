"""Recipes of single steps: strict, overridden, told apart by what they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mipha.alignment.recipe import (
    StepRecipe,
    list_alignment_recipes,
    load_alignment_recipe,
)

TREE = {
    "name": "a",
    "step": "reward",
    "language_model": "smollm2-135m",
    "data": "a.jsonl",
    "learning_rate": "1e-3",
    "batch_size": 8,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": "ppo2"}, "step is 'ppo2', but must be sft, reward, cost, dpo, rlhf, safe-rlhf"),
        ({"beta": 0.1}, "beta: unknown key"),
        ({"lerning_rate": 1}, "lerning_rate: unknown key; did you mean learning_rate"),
        ({"step": "sft", "regularization": 0.1}, "regularization: unknown key"),
        ({"lora": {"rank": 4}}, "lora has no effect with tuning=full"),
        ({"tuning": "lora", "lora": {"rnk": 4}}, "lora.rnk: unknown key; did you mean rank"),
        ({"held_out_data": "b.jsonl"}, "two ways to hold rows out"),
        ({"held_out": 0, "validate_every": 5}, "validate_every=5 has no effect"),
        ({"micro_batch": 3}, "micro_batch=3 does not divide batch_size=8"),
        ({"learning_rate": -1}, "learning_rate: must be greater than 0"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        StepRecipe.parse(TREE | change, source="a.yaml")
    assert said in str(refused.value)


def test_a_recipe_round_trips_and_its_digest_names_what_it_trains(tmp_path: Path) -> None:
    recipe = StepRecipe.parse(TREE, source="a")
    assert recipe.learning_rate == 0.001
    (tmp_path / "a.yaml").write_text(recipe.dump(), encoding="utf-8")
    assert load_alignment_recipe(tmp_path / "a.yaml") == recipe
    assert recipe.override("name=b", "description=c").digest() == recipe.digest()
    changed = recipe.override("tuning=lora", "lora.rank=4", "learning_rate=1e-4")
    assert (changed.lora.rank, changed.lora.alpha, changed.learning_rate) == (4, 256, 1e-4)
    assert changed.digest() != recipe.digest()
    assert recipe.differences(changed).keys() >= {
        "learning_rate",
        "lora.rank",
        "tuning",
    }


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "has no `=`"),
        ("a.b=1", "a: unknown key"),
        ("name.b=1", "name is a value, not a group of keys"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_a_bad_override_is_one_sentence(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StepRecipe.parse(TREE, source="a").override(override)


def test_the_catalog_is_valid_and_a_wrong_name_is_helped() -> None:
    names = list_alignment_recipes()
    assert {"phi-2-sft", "phi-2-reward", "phi-2-cost", "phi-2-dpo", "smollm2-135m-sft"} <= set(
        names
    )
    assert all(load_alignment_recipe(name).name == name for name in names)
    with pytest.raises(
        FileNotFoundError, match="no alignment recipe 'phi-2-stf': did you mean phi-2-sft"
    ):
        load_alignment_recipe("phi-2-stf")
