"""Growth of a training step's time and memory with samples, row length, image tokens and processes.

    python benchmarks/growth.py [--only samples --only row_tokens --only image_tokens \\
        --only processes] [--out benchmarks/results]

The model is small and has random weights. Each point runs in its own process (`processes` in
several), so that peaks of memory stay apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mipha.files import write_whole
from mipha.run import provenance

AXES: dict[str, tuple[int, ...]] = {
    "samples": (1_000, 10_000, 100_000),
    "row_tokens": (512, 1024, 2048, 4096),
    "image_tokens": (16, 64, 256, 576),
    "processes": (1, 2),
}
"""Points of each axis.

The others stay at 2,000 samples, rows of 1,024 tokens, 64 image tokens and one process. A process
has one thread."""

STEPS = 4
"""Steps of a run; the figures leave the first out."""


def measure_point(axis: str, value: int, folder: Path) -> dict[str, float]:
    """Measure one point of an axis in this process: seconds of a step, of reading it, and memory.

    Args:
        axis: Key of `AXES`.
        value: Value on that axis.
        folder: Empty folder, the same in all processes of the point.

    Returns:
        The figures by name; empty in all processes but the first.
    """
    import torch
    from workloads import (
        SINGLE,
        TUNING,
        small_parts,
        small_parts_in,
        stage_recipe,
        whole_recipe,
        write_samples,
    )

    from mipha.data.batches import StepDataset
    from mipha.data.mixture import Mixture
    from mipha.engine.machine import peak_memory_gib
    from mipha.files import read_lines
    from mipha.models.build import build
    from mipha.models.tuning import apply_tuning
    from mipha.run import Run
    from mipha.training.loop import run_steps
    from mipha.training.placement import place
    from mipha.training.stage import Stage
    from mipha.world import join_world

    # Make the model and the data once, and read them in every process.
    torch.set_num_threads(1)
    world = join_world()
    side = {16: 56, 64: 112, 256: 224, 576: 336}[value if axis == "image_tokens" else 64]
    row_tokens = value if axis == "row_tokens" else 1024
    workload = replace(SINGLE, image_size=side, words=(8, 40), answer=(1, 9), batch_size=64)
    workload = replace(workload, row_tokens=max(row_tokens, workload.image_tokens + 256))
    number = value if axis == "samples" else 2_000
    if world.is_first:
        small_parts(folder, workload)
        write_samples(folder, replace(workload, questions=100), number)
    world.barrier()

    parts, file = small_parts_in(folder), folder / "samples.jsonl"
    model, processor = build(parts)
    apply_tuning(model, TUNING["finetune"])
    recipe = stage_recipe(file, workload, "finetune", "packed", max_steps=STEPS)
    steps = StepDataset(Mixture(recipe.data), processor, recipe, 0, world.rank, world.size)

    # Time the reading of the first step, then train.
    started = time.perf_counter()
    step = steps[0]
    reading = time.perf_counter() - started

    whole = whole_recipe(parts, recipe).override("precision=float32")
    stage = Stage(Run(folder / "run"), whole, "finetune", world)
    place(model, stage)
    run_steps(stage, model, steps)

    if not world.is_first:
        return {}
    rows = list(read_lines(stage.run.metrics("finetune")))
    return {
        "seconds_a_step": round(statistics.median(row["seconds"] for row in rows[1:]), 3),
        "seconds_to_first_read": round(reading, 3),
        "tokens_a_step": step.num_tokens,
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "loss": rows[-1]["loss"],
    }


def run_point(axis: str, value: int) -> dict[str, Any]:
    """Measure a point in fresh processes."""
    processes = value if axis == "processes" else 1
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *torchrun, __file__, "--point", axis, str(value), folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=environment
        )

    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    return {"axis": axis, "value": value} | json.loads(line)


def main() -> None:
    """Measure all points and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=list(AXES),
        help="axis to measure; repeat it for more; default: all",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.point:
        found = measure_point(options.point[0], int(options.point[1]), Path(options.point[2]))
        if found:
            print(json.dumps(found))
        return

    points = []
    for axis in options.only or AXES:
        for value in AXES[axis]:
            points.append(run_point(axis, value))
            print(json.dumps(points[-1]), flush=True)

    about = provenance()
    write_whole(
        options.out / "growth.json", json.dumps({"about": about, "points": points}, indent=2) + "\n"
    )
    write_whole(options.out / "growth.md", markdown(points, about))
    _plot(points, options.out / "growth.png")
    print(markdown(points, about))


def markdown(points: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    lines = [
        "# How a step grows",
        "",
        "| what | is | tokens a step | seconds a step | seconds to the first read "
        "| peak memory, GiB |",
    ]
    lines.append("|---|---|---|---|---|---|")

    for point in points:
        figures = (
            point[key]
            for key in (
                "tokens_a_step",
                "seconds_a_step",
                "seconds_to_first_read",
                "peak_memory_gib",
            )
        )
        lines.append(
            f"| {point['axis']} | {point['value']:,} | " + " | ".join(map(str, figures)) + " |"
        )

    return "\n".join([*lines, "", *(f"- {key}: {value}" for key, value in about.items())]) + "\n"


def _plot(points: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(point["axis"] for point in points))
    figure = Figure(figsize=(3 * len(axes_names), 4.5), layout="constrained")
    grid = figure.subplots(2, len(axes_names), squeeze=False)
    for column, axis in enumerate(axes_names):
        own = [point for point in points if point["axis"] == axis]
        for row, key in enumerate(("seconds_a_step", "peak_memory_gib")):
            grid[row][column].plot(
                [point["value"] for point in own],
                [point[key] for point in own],
                "o-",
                color="#3465a4",
            )
            grid[row][column].set(
                xlabel=axis,
                ylabel=key if column == 0 else None,
                xscale="log" if axis != "processes" else "linear",
            )
            grid[row][column].set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
