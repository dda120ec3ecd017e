"""The machine that trains: what its disk takes, and what its GPUs could compute."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from mipha.engine.machine import check_free_space, peak_flops, peak_memory_gib
from mipha.world import World


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 0, 3 * 10**9))
    check_free_space(tmp_path, 3 * 10**9)
    with pytest.raises(OSError, match=r"3\.0 GB free, but this stage writes up to 4\.0 GB: free"):
        check_free_space(tmp_path, 4 * 10**9)

    # A resumed stage has written a part already.
    with (tmp_path / "state").open("wb") as file:
        file.truncate(2 * 10**9)
    check_free_space(tmp_path, 5 * 10**9)
    with pytest.raises(OSError, match=r"writes up to 4\.0 GB"):
        check_free_space(tmp_path, 6 * 10**9)


def test_peak_memory_is_what_this_process_holds() -> None:
    assert 0.01 < peak_memory_gib() < 1000


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
