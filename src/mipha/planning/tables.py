"""A plan as a table in the terminal, and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from mipha.planning.plan import Compared, Device, StagePlan
from mipha.terminal import Console

console = Console()


def as_json(
    plans: Sequence[StagePlan],
    device: Device,
    num_devices: int,
    price: float | None,
    compared: Sequence[Compared | None],
) -> dict[str, Any]:
    """Return the plan as plain values: bytes, seconds, hours, and money where there is a price."""
    keys = ("predicted", "measured")
    measured = [
        {
            "seconds": dict(zip(keys, one.seconds, strict=True)),
            "memory": dict(zip(keys, one.memory, strict=True)),
        }
        for one in compared
        if one is not None
    ]
    return {
        "device": device.name,
        "num_devices": num_devices,
        "stages": [_stage_as_json(stage, num_devices, price) for stage in plans],
        "compared": measured,
    }


def _stage_as_json(stage: StagePlan, num_devices: int, price: float | None) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "parameters": {
            part.part: {"tuning": part.tuning, "all": part.parameters, "trained": part.trained}
            for part in stage.parts
        },
        "samples": stage.samples,
        "steps": stage.steps,
        "tokens_per_step": stage.step.work.tokens,
        "images_per_step": stage.step.work.images,
        "padding_percent": 100 * stage.step.padding,
        "lengths_from": stage.step.source,
        "sharding": stage.sharding if num_devices > 1 else None,
        "memory_bytes": stage.memory,
        "teraflop_per_step": stage.flops / 1e12,
        "seconds_per_step": stage.seconds,
        "efficiency": stage.efficiency,
        "efficiency_is_assumed": stage.is_assumed,
        "hours": stage.hours,
        "cost": _cost(stage, num_devices, price),
        "largest_micro_batch_rows": stage.largest_rows,
        "mends": list(stage.fixes),
    }


def print_plan(
    recipe: str,
    plans: Sequence[StagePlan],
    device: Device,
    num_devices: int,
    price: float | None,
    compared: Sequence[Compared | None],
) -> None:
    """Print the stages side by side, then what to change where a stage does not fit."""
    title = f"{recipe} on {num_devices} x {device.name}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for stage in plans:
        table.add_column(stage.name, justify="right")

    # Parameters, work and memory.
    for parts in zip(*(stage.parts for stage in plans), strict=True):
        cells = [f"{p.trained / 1e6:,.1f} of {p.parameters / 1e6:,.1f} M train" for p in parts]
        table.add_row(parts[0].part, *cells)
    table.add_row("samples", *(f"{stage.samples:,}" for stage in plans))
    table.add_row("steps", *(f"{stage.steps:,}" for stage in plans))
    cells = [f"{s.step.work.tokens:,} + {s.step.padding:.1%} padding" for s in plans]
    table.add_row("tokens a step", *cells)
    table.add_row("images a step", *(f"{stage.step.work.images:,}" for stage in plans))
    if num_devices > 1:
        table.add_row("sharding", *(stage.sharding for stage in plans))
    for key in dict.fromkeys(key for stage in plans for key in stage.memory):
        cells = [f"{stage.memory.get(key, 0.0) / 1e9:.2f} GB" for stage in plans]
        table.add_row(f"memory, {key}", *cells)
    room = f"{device.memory / 1e9:.0f} GB"
    table.add_row("memory of a device", *(f"{s.total_memory / 1e9:.2f} of {room}" for s in plans))
    cells = [str(stage.largest_rows) if stage.largest_rows else "none fits" for stage in plans]
    table.add_row("largest micro_batch_rows", *cells)

    # Time and money.
    table.add_row("TFLOP a step", *(f"{stage.flops / 1e12:,.2f}" for stage in plans))
    table.add_row("seconds a step", *(_number(stage.seconds, ".2f") for stage in plans))
    table.add_row("hours", *(_number(stage.hours, ".2f") for stage in plans))
    if price is not None:
        costs = [_cost(stage, num_devices, price) for stage in plans]
        table.add_row("cost", *(_number(cost, ",.2f") for cost in costs))

    # A run beside its plan.
    if compared:
        cells = [f"{one.seconds[1]:.2f}{_off(one.seconds)}" if one else "-" for one in compared]
        table.add_row("measured seconds a step", *cells)
        cells = [
            f"{one.memory[1] / 1e9:.2f} GB{_off(one.memory)}" if one else "-" for one in compared
        ]
        table.add_row("measured memory", *cells)

    console.print(table)
    if plans[0].is_assumed:
        console.print(
            f"assumed: a step reaches {plans[0].efficiency} of the device's peak, so seconds, "
            "hours and cost are a guess; --run measures the share, --efficiency sets it"
        )
    for stage in plans:
        console.print(f"[dim]{stage.name}: lengths from {stage.step.source}")
        if stage.fixes:
            changes = ", ".join(stage.fixes)
            console.print(f"[red]{stage.name} does not fit[/red]; it would with {changes}")
    measured = [one for one in compared if one is not None]
    if measured and all(one.efficiency for one in measured):
        shares = ", ".join(f"{one.efficiency:.2f}" for one in measured if one.efficiency)
        console.print(
            f"the run reached these shares of the device's peak: {shares}; plan with --efficiency"
        )


def _cost(stage: StagePlan, num_devices: int, price: float | None) -> float | None:
    return None if price is None or stage.hours is None else price * num_devices * stage.hours


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _off(pair: tuple[float | None, float]) -> str:
    """Return a table of the plan beside what was measured."""
    planned, measured = pair
    return f", plan {100 * (planned / measured - 1):+.0f} %" if planned else ""
