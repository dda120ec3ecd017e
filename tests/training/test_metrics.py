"""A line of metrics: rates of real work, and the share of the device's peak where that is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mipha.training.batches import Step
from mipha.training.flops import StepFlops, Work
from mipha.training.metrics import Meter, peak_flops
from mipha.world import World

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


def test_a_peak_is_of_all_processes_and_never_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """H100 SXM: 989.5 TFLOP/s of bfloat16, 67 of float32; a T4 has no bfloat16."""
    assert peak_flops(World(0, 2, torch.device("cpu")), None) is None
    gpu = World(0, 4, torch.device("cuda", 0))
    for name, dtype, peak in (
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 4 * 989.5e12),
        ("NVIDIA H100 80GB HBM3", None, 4 * 67e12),
        ("Tesla T4", torch.bfloat16, None),
        ("GPU of tomorrow", torch.bfloat16, None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, dtype) == peak
