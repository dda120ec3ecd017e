"""The learning rate over time."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from mipha.engine.optimizer import Group, make_adamw, set_learning_rates, warmup_cosine


def test_warmup_climbs_in_equal_steps_to_the_peak() -> None:
    shares = [warmup_cosine(step, 100, 0.03) for step in range(100)]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(shares) == 1.0


def test_the_cosine_falls_from_the_peak_to_nearly_nothing() -> None:
    shares = [warmup_cosine(step, 100, 0.0) for step in range(100)]
    assert shares[0] == 1.0
    assert shares[50] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in pairwise(shares))
    assert 0 < shares[-1] < 1e-3
    assert warmup_cosine(100, 100, 0.0) == pytest.approx(0.0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.99])
def test_every_step_of_a_short_run_moves(num_steps: int, ratio: float) -> None:
    assert all(0 < warmup_cosine(step, num_steps, ratio) <= 1 for step in range(num_steps))


def test_warmup_is_rounded_up() -> None:
    """Source: transformers' Trainer, `get_warmup_steps`."""
    assert warmup_cosine(0, 10, 0.01) == pytest.approx(0.5)
    assert warmup_cosine(1, 10, 0.01) == pytest.approx(1.0)


@pytest.mark.parametrize(("num_steps", "ratio", "warmup"), [(100, 0.03, 3), (40, 0.25, 10)])
def test_behind_the_warmup_the_cosine_falls_to_zero_at_the_last_step(
    num_steps: int, ratio: float, warmup: int
) -> None:
    rest = num_steps - warmup
    for share in (0.0, 0.25, 0.5, 1.0):
        wanted = 0.5 * (1 + math.cos(math.pi * share))
        step = warmup + share * rest
        assert warmup_cosine(step, num_steps, ratio) == pytest.approx(wanted)  # type: ignore[arg-type]


def test_each_group_has_its_own_rate_and_remembers_its_peak() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [Group("policy", weights[:1], 1e-3), Group("critic", weights[1:], 1e-5)]
    optimizer = make_adamw(groups, betas=(0.9, 0.95))
    set_learning_rates(optimizer, 0.5)
    set_learning_rates(optimizer, 0.1)
    rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"policy": pytest.approx(1e-4), "critic": pytest.approx(1e-6)}
    for weight in weights:
        weight.grad = torch.ones(2)
    optimizer.step()
    assert [weight[0].item() for weight in weights] == pytest.approx([-1e-4, -1e-6], rel=1e-3)
