"""A plan as tables in the terminal, and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mipha.planning.plan import Compared, Device, StagePlan

console = Console()


def as_json(
    plans: Sequence[StagePlan],
    device: Device,
    num_devices: int,
    price: float | None,
    compared: Sequence[Compared],
) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, hours, and money where a price was given."""
    stages = []
    for stage in plans:
        stages.append(
            {
                "stage": stage.name,
                "parameters": {
                    part.part: {
                        "tuning": part.tuning,
                        "all": part.parameters,
                        "trained": part.trained,
                    }
                    for part in stage.parts
                },
                "samples": stage.samples,
                "steps": stage.steps,
                "tokens_per_step": stage.step.work.tokens,
                "images_per_step": stage.step.work.images,
                "padding_percent": 100 * stage.step.padding,
                "lengths_from": stage.step.source,
                "memory_bytes": stage.memory,
                "teraflop_per_step": stage.flops / 1e12,
                "seconds_per_step": stage.seconds,
                "hours": stage.hours,
                "cost": None
                if price is None or stage.hours is None
                else price * num_devices * stage.hours,
                "largest_micro_batch_rows": stage.largest_rows,
                "mends": list(stage.mends),
            }
        )
    keys = ("predicted", "measured")
    measured = [
        {
            "seconds": dict(zip(keys, one.seconds, strict=True)),
            "memory": dict(zip(keys, one.memory, strict=True)),
        }
        for one in compared
    ]
    return {
        "device": device.name,
        "num_devices": num_devices,
        "stages": stages,
        "compared": measured,
    }


def print_plan(
    recipe: str,
    plans: Sequence[StagePlan],
    device: Device,
    num_devices: int,
    price: float | None,
    compared: Sequence[Compared],
) -> None:
    """Parameters, memory and time of each stage side by side, then what to change where it does not fit."""
    table = Table(
        title=f"{recipe} on {num_devices} x {device.name}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("")
    for stage in plans:
        table.add_column(stage.name, justify="right")
    for index, part in enumerate(plans[0].parts):
        cells = [
            f"{stage.parts[index].trained / 1e6:,.1f} of {stage.parts[index].parameters / 1e6:,.1f} M train"
            for stage in plans
        ]
        table.add_row(part.part, *cells)
    rows: dict[str, list[str]] = {
        "samples": [f"{stage.samples:,}" for stage in plans],
        "steps": [f"{stage.steps:,}" for stage in plans],
        "tokens a step": [
            f"{stage.step.work.tokens:,} + {stage.step.padding:.1%} padding" for stage in plans
        ],
        "images a step": [f"{stage.step.work.images:,}" for stage in plans],
        **{
            f"memory, {key}": [f"{stage.memory[key] / 1e9:.2f} GB" for stage in plans]
            for key in plans[0].memory
        },
        "memory of a device": [
            f"{stage.total_memory / 1e9:.2f} of {device.memory / 1e9:.0f} GB" for stage in plans
        ],
        "largest micro_batch_rows": [
            str(stage.largest_rows) if stage.largest_rows else "none fits" for stage in plans
        ],
        "TFLOP a step": [f"{stage.flops / 1e12:,.2f}" for stage in plans],
        "seconds a step": [
            "-" if stage.seconds is None else f"{stage.seconds:.2f}" for stage in plans
        ],
        "hours": ["-" if stage.hours is None else f"{stage.hours:.2f}" for stage in plans],
    }
    if price is not None:
        rows["cost"] = [
            "-" if stage.hours is None else f"{price * num_devices * stage.hours:,.2f}"
            for stage in plans
        ]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    for name, pick in (("measured seconds a step", "seconds"), ("measured memory", "memory")):
        if compared:
            table.add_row(name, *(_measured(getattr(one, pick), pick) for one in compared))
    console.print(table)
    for stage in plans:
        console.print(f"[dim]{stage.name}: lengths from {stage.step.source}")
        if stage.mends:
            console.print(
                f"[red]{stage.name} does not fit[/red]; it would with {', '.join(stage.mends)}"
            )
    if compared and all(one.efficiency for one in compared):
        shares = ", ".join(f"{one.efficiency:.2f}" for one in compared if one.efficiency)
        console.print(
            f"the run reached these shares of the device's peak: {shares}; plan with --efficiency"
        )


def _measured(pair: tuple[float | None, float], kind: str) -> str:
    predicted, found = pair
    off = "" if not predicted else f", plan {100 * (predicted / found - 1):+.0f} %"
    return f"{found:.2f}{off}" if kind == "seconds" else f"{found / 1e9:.2f} GB{off}"
