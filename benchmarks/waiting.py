"""Layers a second with one thread and two, by how OpenMP threads wait, idle and beside other work.

    python benchmarks/waiting.py [--seconds 10] [--busy 4] [--out benchmarks/results]

Each case is a process of its own, because libgomp reads its settings when torch is imported. The
others are as many busy processes of the same priority.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CASES = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads, libgomp's own setting": {"OMP_NUM_THREADS": "2"},
    "two threads, 1,000 spins (mipha)": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"},
    "two threads, no spins": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
}


def main() -> None:
    """Measure every case idle, then beside busy processes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--busy", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(_measure(options.seconds))
        return

    print(f"{'layers/s':<36}{'idle':>10}{f'{options.busy} busy':>10}")
    found = {}
    for name, settings in CASES.items():
        rates = [_in_process(settings, options.seconds, busy) for busy in (0, options.busy)]
        found[name] = rates
        print(f"{name:<36}{rates[0]:>10.1f}{rates[1]:>10.1f}", flush=True)
    if options.out:
        # Not above: importing mipha chooses how the threads of this process wait.
        from mipha.files import write_whole

        content = {"load_before": os.getloadavg()[0], "busy": options.busy, "layers_per_s": found}
        write_whole(options.out / "waiting.json", json.dumps(content, indent=2) + "\n")


def _in_process(settings: dict[str, str], seconds: float, num_busy: int) -> float:
    """Return the layers a second of one case beside so many busy processes."""
    clean = {key: os.environ[key] for key in os.environ if not key.startswith(("OMP_", "GOMP_"))}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
    try:
        command = [sys.executable, __file__, "--measure", "--seconds", str(seconds)]
        done = subprocess.run(
            command, env=clean | settings, capture_output=True, text=True, check=True
        )
        return float(done.stdout)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def _measure(seconds: float) -> float:
    """Return how many layers of a small model, forward and backward, this process does a second."""
    import torch
    from torch.nn.functional import silu

    up = [torch.nn.Linear(576, 1536, dtype=torch.bfloat16) for _ in range(4)]
    down = [torch.nn.Linear(1536, 576, dtype=torch.bfloat16) for _ in range(4)]
    start = torch.randn(320, 576, requires_grad=True)  # (tokens, width)

    def run() -> None:
        hidden = start
        for widen, narrow in zip(up, down, strict=True):
            scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
            wide = widen((hidden * scale).bfloat16())
            hidden = hidden + narrow(silu(wide) * wide).float()
        hidden.sum().backward()

    run()
    begin, number = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        run()
        number += 1
    return number * len(up) / (time.monotonic() - begin)


if __name__ == "__main__":
    main()
