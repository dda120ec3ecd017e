"""A line of metrics: rates of real work, and the share of the device's peak where that is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mipha.data.batches import Step
from mipha.models.flops import StepFlops, Work
from mipha.training.metrics import Meter

STEP = Step(
    micro_batches=(),
    ids=("a", "b", "c"),
    sources={"all": 3},
    num_tokens=60,
    num_pairs=900,
    num_supervised=12,
    num_images=2,
    num_padded=80,
    num_truncated=0,
)


def test_rates_are_of_real_work(tiny_model: Callable) -> None:
    flops = StepFlops(tiny_model()[0])
    row = Meter(flops, peak=5e9).measure(
        1, STEP, loss=2.0, grad_norm=1.0, learning_rates={"projector": 1e-3}
    )
    assert row["padding_percent"] == pytest.approx(25.0)
    assert (
        row["teraflop"]
        == flops.total(Work(images=2, tokens=60, pairs=900, supervised=12)) / 1e12
        > 0
    )
    for rate, count in (("samples", 3), ("images", 2), ("tokens", 60)):
        assert row[f"{rate}_per_second"] == pytest.approx(count / row["seconds"])
    assert row["mfu_percent"] == pytest.approx(100 * row["teraflop"] * 1e12 / row["seconds"] / 5e9)
    assert "mfu_percent" not in Meter(flops, peak=None).measure(2, STEP, 2.0, 1.0, {})
