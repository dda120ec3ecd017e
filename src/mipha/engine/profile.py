"""Where the time of a training step goes: a trace of some steps, and a table of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARMUP = 5
"""Steps before those that are traced: the first ones allocate memory and compile."""


@contextmanager
def trace_steps(folder: Path, num_steps: int) -> Iterator[Callable[[], None]]:
    """Trace some steps of a loop, after a warm-up.

    Args:
        folder: Folder of `profile.json`, a Chrome trace, and `profile.txt`, time by operator.
        num_steps: Steps to trace; 0 for none.

    Yields:
        A function to call at the end of every step.
    """
    if not num_steps:
        yield lambda: None
        return

    on_gpu = torch.cuda.is_available()

    def write(traced: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        traced.export_chrome_trace(str(folder / "profile.json"))
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=order, row_limit=40)
        (folder / "profile.txt").write_text(table, encoding="utf-8")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    plan = schedule(wait=0, warmup=WARMUP, active=num_steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as traced:
        yield traced.step
