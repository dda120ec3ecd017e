"""Frozen matrices in bfloat16: no bit of a bfloat16 run changes, nor of its export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mipha.models.tuning import apply_tuning, describe_tuning
from mipha.recipe import TuningRecipe
from mipha.training import pipeline
from mipha.training.pipeline import train
from mipha.training.placement import restore_frozen, round_frozen

TUNING = {"vision_tower": "frozen", "projector": "full", "language_model": "frozen"}
GPU = torch.device("cuda")
"""Decides what is kept; nothing is put there."""


@pytest.mark.parametrize(
    "family", ["llama", "phi", "qwen2"]
)  # a head of its own, with a bias, tied to the embeddings
def test_every_product_is_bit_by_bit_what_it_was(family: str, tiny_model: Callable) -> None:
    model, processor = tiny_model(family)
    apply_tuning(model, TuningRecipe(**TUNING))
    ids = torch.arange(40)[None] % 300 + 5
    ids[0, :4] = processor.image_token_id
    torch.manual_seed(0)
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.rand(1, 3, 28, 28),
        "position_ids": torch.arange(40)[None],
        "labels": ids,
    }
    before = _loss_and_gradients(model, inputs)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    originals = round_frozen(model, GPU)
    after = _loss_and_gradients(model, inputs)
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    kept = {
        name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16
    }
    assert kept == set(originals) and all(
        "multi_modal_projector" not in name and "norm" not in name for name in kept
    )
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert ("lm_head.weight" in kept) == (family != "qwen2")
    assert [part.dtypes for part in describe_tuning(model, TuningRecipe(**TUNING))] == [
        ("bfloat16", "float32"),
        ("float32",),
        ("bfloat16", "float32"),
    ]
    restored = restore_frozen(model.state_dict(), originals)
    assert all(
        torch.equal(restored[name], start[name]) and restored[name].dtype == start[name].dtype
        for name in start
    )


def test_what_training_changed_is_not_covered_up(tiny_model: Callable) -> None:
    model, _ = tiny_model()
    apply_tuning(model, TuningRecipe(**TUNING))
    originals = round_frozen(model, GPU)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight[0, 0] += 1
    assert torch.equal(restore_frozen(model.state_dict(), originals)[name], weight.float())


def test_on_a_cpu_only_what_bfloat16_holds_exactly_is_kept_in_it(tiny_model: Callable) -> None:
    model, _ = tiny_model()
    apply_tuning(model, TuningRecipe(**TUNING))
    layer = model.model.language_model.layers[0].mlp.up_proj
    layer.weight.data = layer.weight.data.bfloat16().float()
    assert set(round_frozen(model, torch.device("cpu"))) == {
        "model.language_model.layers.0.mlp.up_proj.weight"
    }


def test_a_run_in_bfloat16_is_the_same_with_and_without(
    tiny_run_recipe: Callable,
    tmp_path: Path,
    weights: Callable,
    metrics: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_run_recipe(
        "precision=bfloat16",
        "stages.finetune.tuning.language_model=lora",
        "stages.finetune.held_out=0.3",
    )
    monkeypatch.setattr(
        pipeline,
        "round_frozen",
        lambda model, device: round_frozen(model, GPU),
    )
    kept = train(recipe, tmp_path / "kept")
    monkeypatch.setattr(pipeline, "round_frozen", lambda model, device: {})
    plain = train(recipe, tmp_path / "plain")
    for stage in ("pretrain", "finetune"):
        mine, theirs = weights(kept.checkpoint(stage)), weights(plain.checkpoint(stage))
        assert mine.keys() == theirs.keys() and all(
            torch.equal(mine[name], theirs[name]) for name in theirs
        ), stage
        rows = [[row["loss"] for row in metrics(run.metrics(stage))] for run in (kept, plain)]
        assert rows[0] == rows[1]
        assert (
            json.loads((kept.checkpoint(stage) / "config.json").read_text())["dtype"] == "float32"
        )


def _loss_and_gradients(model: torch.nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss_sum
    loss.backward()
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found | {"loss": loss.detach()}
