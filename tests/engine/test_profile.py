"""A trace of chosen steps of a loop."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mipha.engine.profile import WARMUP, trace_steps


def run(folder: Path, num_steps: int, done: int) -> None:
    with trace_steps(folder, num_steps) as end_of_step:
        for _ in range(done):
            torch.ones(4, 4) @ torch.ones(4, 4)
            end_of_step()


def test_the_steps_behind_the_warm_up_are_traced(tmp_path: Path) -> None:
    run(tmp_path / "stage", 2, WARMUP + 4)
    events = json.loads((tmp_path / "stage" / "profile.json").read_text())["traceEvents"]
    assert sum(event["name"] == "aten::matmul" for event in events) == 2
    assert "aten::mm" in (tmp_path / "stage" / "profile.txt").read_text()


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    run(tmp_path / "stage", 0, WARMUP + 4)
    assert not (tmp_path / "stage").exists()
