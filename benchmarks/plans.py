"""The table of predicted memory and hours in docs/gpu.md, from the same plans as `mipha plan`.

python benchmarks/plans.py
"""

from __future__ import annotations

from collections.abc import Iterator

from mipha.planning.plan import StagePlan, device_named, plan_training
from mipha.recipe import load_recipe

RECIPES = ("mipha-1.6b", "mipha-2.4b", "mipha-3b-base")
DEVICES = (("h100", 1), ("h200", 1), ("h100", 8))


def table() -> Iterator[str]:
    """Yield the lines of the table: a stage a line, a device a column."""
    names = [f"{number} x {device}" if number > 1 else device for device, number in DEVICES]
    yield f"| recipe, stage | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(DEVICES)}"
    for name in RECIPES:
        recipe = load_recipe(name)
        columns = [
            plan_training(recipe, device_named(device), number) for device, number in DEVICES
        ]
        for plans in zip(*columns, strict=True):
            yield f"| {name}, {plans[0].name} | {' | '.join(map(_cell, plans))} |"


def _cell(plan: StagePlan) -> str:
    """Return gigabytes of a device and hours; where it does not fit, what would make it fit."""
    size = f"{plan.total_memory / 1e9:.0f} GB"
    if plan.fixes:
        changes = ", ".join(fix.removeprefix(f"stages.{plan.name}.") for fix in plan.fixes)
        return f"{size}: {changes}"
    return f"{size}, {plan.hours:.1f} h" if plan.hours else size


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
