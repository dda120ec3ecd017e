"""The learning rate over time, and one of its own for each part."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from mipha.models.tuning import apply_tuning, part_parameters
from mipha.training.optim import make_optimizer, schedule, set_learning_rates


def test_warmup_climbs_in_equal_steps_to_the_peak() -> None:
    shares = [schedule(step, 100, 0.03) for step in range(100)]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(shares) == 1.0


def test_the_cosine_falls_from_the_peak_to_nearly_nothing() -> None:
    shares = [schedule(step, 100, 0.0) for step in range(100)]
    assert shares[0] == 1.0
    assert shares[50] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in pairwise(shares))
    assert 0 < shares[-1] < 1e-3
    assert schedule(100, 100, 0.0) == pytest.approx(0.0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.99])
def test_every_step_of_a_short_run_moves(num_steps: int, ratio: float) -> None:
    assert all(0 < schedule(step, num_steps, ratio) <= 1 for step in range(num_steps))


def test_warmup_is_rounded_up() -> None:
    """Source: transformers' Trainer, `get_warmup_steps`."""
    assert schedule(0, 10, 0.01) == pytest.approx(0.5)
    assert schedule(1, 10, 0.01) == pytest.approx(1.0)
    assert math.ceil(10 * 0.01) == 1


def test_each_part_has_its_own_rate(tiny_model: Callable, tiny_run_recipe: Callable) -> None:
    model, _ = tiny_model()
    rates = ("part_learning_rates={vision_tower: 2e-6}", "learning_rate=1e-3")
    stage = tiny_run_recipe(*(f"stages.finetune.{rate}" for rate in rates)).stages.finetune
    apply_tuning(model, stage.tuning)
    optimizer = make_optimizer(model, stage)
    set_learning_rates(optimizer, 0.5)
    assert {group["part"]: group["lr"] for group in optimizer.param_groups} == {
        "vision_tower": pytest.approx(1e-6),
        "projector": pytest.approx(5e-4),
        "language_model": pytest.approx(5e-4),
    }
    set_learning_rates(optimizer, 1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-6), "the peak is remembered"


def test_a_part_moves_at_its_own_rate(tiny_model: Callable, tiny_run_recipe: Callable) -> None:
    """Adam's first step is the learning rate in every weight that has a gradient."""
    model, _ = tiny_model()
    rates = ("part_learning_rates={projector: 1e-2}", "learning_rate=1e-4")
    stage = tiny_run_recipe(*(f"stages.finetune.{rate}" for rate in rates)).stages.finetune
    apply_tuning(model, stage.tuning)
    optimizer = make_optimizer(model, stage)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for part, rate in (("vision_tower", 1e-4), ("projector", 1e-2), ("language_model", 1e-4)):
        for name, parameter in part_parameters(model, part).items():
            if parameter.requires_grad:
                moved = (before[name] - parameter.detach()).flatten()
                assert torch.allclose(moved, torch.full_like(moved, rate), rtol=0.02), name


def test_only_what_trains_is_in_the_optimizer(
    tiny_model: Callable, tiny_run_recipe: Callable
) -> None:
    model, _ = tiny_model("qwen2")
    stage = tiny_run_recipe().stages.pretrain
    apply_tuning(model, stage.tuning)
    groups = make_optimizer(model, stage).param_groups
    assert [group["part"] for group in groups] == ["projector"]
    assert set(map(id, groups[0]["params"])) == set(
        map(id, model.model.multi_modal_projector.parameters())
    )


def test_the_settings_reach_adam(tiny_model: Callable, tiny_run_recipe: Callable) -> None:
    model, _ = tiny_model()
    changes = ("adam_betas=[0.8, 0.95]", "adam_eps=1e-5", "weight_decay=0.1")
    stage = tiny_run_recipe(*(f"stages.finetune.{change}" for change in changes)).stages.finetune
    apply_tuning(model, stage.tuning)
    for group in make_optimizer(model, stage).param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-5, 0.1)
