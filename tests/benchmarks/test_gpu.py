"""The program of `make gpu`, at its small size on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest
import torch

KEYS = {"schema", "about", "versions", "device", "checks", "speed", "skipped", "seconds"}


def test_checks_run_in_processes_and_their_files_are_joined(tmp_path: Path) -> None:
    assert gpu._run_all(["environment", "loss"], tmp_path, seconds=600) == 0
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert set(whole) == KEYS and whole["schema"] == gpu.SCHEMA
    assert {check["name"] for check in whole["checks"]} == {
        "loss/torch.float32",
        "loss/torch.bfloat16",
    }
    assert all(check["ok"] for check in whole["checks"])
    assert whole["seconds"].keys() == {"environment", "loss"}


def test_without_time_the_rest_is_named_and_the_exit_code_is_3(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text("{}")
    assert gpu._run_all(["environment"], tmp_path, seconds=1) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the small size is for CPUs")
def test_kernels_are_compared_with_a_reference() -> None:
    found = gpu.Findings()
    gpu.kernels(found)
    assert {check["name"].split("/")[0] for check in found.checks} == {"segments", "flex"}
    assert [check for check in found.checks if not check["ok"]] == []
    assert any(check["name"].endswith("leak") for check in found.checks)
    assert "varlen" in found.skipped[0]


def test_a_value_past_its_limit_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(found: gpu.Findings) -> None:
        found.limit("broken/value", float("nan"), 1.0)

    monkeypatch.setitem(gpu.CHECKS, "loss", broken)
    gpu.run_check("loss", tmp_path)
    part = json.loads((tmp_path / "loss.json").read_text())
    assert [check["ok"] for check in part["checks"]] == [False]


def test_a_stage_is_measured_at_the_small_size() -> None:
    found = gpu.Findings()
    gpu.stage2(found)
    assert found.checks == [] and found.speed[0]["samples_per_second"] > 0
    assert torch.cuda.is_available() or found.speed[0]["mfu"] is None


@pytest.mark.parametrize("check", ["fsdp", "evaluation"])
def test_what_must_be_equal_is_equal_on_a_cpu(check: str) -> None:
    found = gpu.Findings()
    gpu.CHECKS[check](found)
    assert [one["ok"] for one in found.checks] == [True]
    assert len(found.speed) == (2 if check == "evaluation" else 0)
