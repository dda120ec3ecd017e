"""A stage that learns from preferences, inside a recipe: one file and one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mipha.api import check_training, train
from mipha.files import read_lines
from mipha.recipe import DpoStageRecipe, Recipe


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions about images; "yes" is chosen."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(8):
        Image.new("RGB", (30, 30), (number * 30, 60, 90)).save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "prompt": f"Is it {number}?"}
        rows.append(row | {"chosen": "yes", "rejected": "no, a circle"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture
def recipe(tiny_run_recipe: Callable[..., Recipe], pairs: Path) -> Recipe:
    tree = tiny_run_recipe("stages.finetune.max_steps=2").model_dump(mode="json")
    tree["stages"]["prefer"] = {
        "kind": "dpo",
        "data": str(pairs),
        "learning_rate": 1e-3,
        "batch_size": 4,
        "max_steps": 2,
        "checkpoint_every": 1,
        "held_out": 0.0,
    }
    return Recipe.parse(tree, "three stages")


def test_three_stages_with_preferences_are_one_command_and_go_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    whole = train(recipe, tmp_path / "whole")
    assert [row["step"] for row in read_lines(whole.stage("prefer") / "dpo" / "metrics.jsonl")]
    card = (whole.final_checkpoint() / "README.md").read_text()
    assert "by preferences" in card

    # The language model moved, the tower did not.
    start = load_file(whole.checkpoint("finetune") / "model.safetensors")
    end = load_file(whole.final_checkpoint() / "model.safetensors")
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert any("language_model" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)

    # Killed before its result is taken over, the same command ends in the same weights.
    import mipha.training.pipeline as pipeline

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_adopt_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "killed")
    again = load_file(train(recipe, tmp_path / "killed").final_checkpoint() / "model.safetensors")
    assert all(torch.equal(end[name], again[name]) for name in end)


def test_a_dpo_stage_has_keys_of_its_own(recipe: Recipe) -> None:
    assert isinstance(recipe.stages["prefer"], DpoStageRecipe)
    assert list(recipe.supervised_stages) == ["pretrain", "finetune"]
    assert Recipe.parse(recipe.model_dump(mode="json"), "again") == recipe
    moved = recipe.override("data.prefer=other.jsonl", "stages.prefer.beta=0.2")
    assert moved.stages["prefer"].data == Path("other.jsonl")
    with pytest.raises(ValueError, match=r"stages\.prefer\.row_tokens: unknown key"):
        recipe.override("stages.prefer.row_tokens=100")
    with pytest.raises(ValueError, match="is a dpo stage, whose pairs are checked"):
        recipe.stage("prefer")


def test_what_cannot_be_trained_is_said_before_anything_loads(
    recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data at gone\.jsonl"):
        check_training(recipe.override("data.prefer=gone.jsonl"), tmp_path / "run")
    with pytest.raises(ValueError, match="does not divide batch_size"):
        check_training(recipe.override("stages.prefer.micro_batch=3"), tmp_path / "run")

    tree = recipe.model_dump(mode="json")
    tree["stages"] = {"prefer": tree["stages"]["prefer"]}
    with pytest.raises(ValueError, match="the projector of a model from parts has not learned"):
        Recipe.parse(tree, "alone")
    Recipe.parse(tree | {"model": {"checkpoint": "runs/x"}}, "from a checkpoint")
