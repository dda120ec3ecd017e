"""The first losses of a tiny run, compared with stored ones.

A change that moves them changes the training of every user: say so in LOG.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mipha.training.pipeline import train

GOLDEN = {
    "pretrain": [6.537944, 6.461376],
    "finetune": [6.381439, 5.816300, 5.512097],
}


def test_first_losses(tiny_run_recipe: Callable, tmp_path: Path) -> None:
    run = train(
        tiny_run_recipe("stages.finetune.max_steps=3", "stages.finetune.batching=shared-image"),
        tmp_path / "run",
    )
    for stage, golden in GOLDEN.items():
        losses = [json.loads(line)["loss"] for line in run.metrics(stage).read_text().splitlines()]
        assert losses == pytest.approx(golden, rel=1e-4), stage
