"""Shared parts of the benchmarks: timing side by side, and a report as JSON, Markdown and PNG.

A claim is a ratio to a named baseline. Both are measured in turn in one run, because seconds of two
runs on a shared machine cannot be compared.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mipha.files import write_whole
from mipha.run import provenance


@dataclass(frozen=True)
class Row:
    """One way of doing one case.

    Args:
        case: Name of the work.
        way: Name of the way; the baseline is the first of a case.
        rate: Median rate, in units of work a second.
        low: Rate of the slowest repeat.
        high: Rate of the fastest repeat.
        ratio: Median over the repeats of this way's rate to the baseline's in the same repeat.
        unit: Unit of work, such as questions.
    """

    case: str
    way: str
    rate: float
    low: float
    high: float
    ratio: float
    unit: str


def side_by_side(
    case: str, unit: str, work: float, ways: Mapping[str, Callable[[], Any]], repeats: int
) -> list[Row]:
    """Time several ways of the same work, in turn, after one warm-up of each.

    Args:
        case: Name of the work.
        unit: Unit of work.
        work: Units of work in one call.
        ways: Call by name of the way; the first is the baseline.
        repeats: Number of rounds; every way runs once in each.
    """
    for call in ways.values():
        call()

    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, call in ways.items():
            started = time.perf_counter()
            call()
            rates[way].append(work / (time.perf_counter() - started))

    baseline = next(iter(rates.values()))
    return [
        Row(
            case,
            way,
            statistics.median(found),
            min(found),
            max(found),
            statistics.median(r / b for r, b in zip(found, baseline, strict=True)),
            unit,
        )
        for way, found in rates.items()
    ]


def report(name: str, title: str, rows: Sequence[Row], out: Path, facts: Mapping[str, Any]) -> None:
    """Write `<name>.json`, `<name>.md` and `<name>.png`, and print the table.

    Args:
        name: Name of the files.
        title: Title of the report.
        rows: Measurements.
        out: Folder of the files.
        facts: Other facts for the reader: sizes, repeats, whether the results were equal.
    """
    about = provenance() | {"cpu": _cpu(), "device": _device()} | dict(facts)
    write_whole(
        out / f"{name}.json",
        json.dumps(
            {"title": title, "about": about, "rows": [asdict(row) for row in rows]}, indent=2
        )
        + "\n",
    )

    lines = [
        f"# {title}",
        "",
        "| case | way | median | slowest to fastest | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.case} | {row.way} | {row.rate:.3g} {row.unit}/s "
            f"| {row.low:.3g} to {row.high:.3g} | {row.ratio:.2f} |"
        )
    lines += ["", *(f"- {key}: {value}" for key, value in about.items())]

    write_whole(out / f"{name}.md", "\n".join(lines) + "\n")
    _plot(title, rows, out / f"{name}.png")
    print("\n".join(lines))


def _plot(title: str, rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()

    labels = [f"{row.case}: {row.way}" for row in rows]
    axes.barh(
        labels,
        [row.ratio for row in rows],
        color=["#bbbbbb" if row.ratio == 1 else "#3465a4" for row in rows],
    )
    for place, row in enumerate(rows):
        axes.text(
            row.ratio,
            place,
            f" {row.ratio:.2f}x, {row.rate:.3g} {row.unit}/s",
            va="center",
            fontsize=8,
        )

    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(row.ratio for row in rows))
    axes.set_xlabel("speed relative to the baseline, same run")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    names = (
        [
            line.partition(":")[2].strip()
            for line in path.read_text().splitlines()
            if line.startswith("model name")
        ]
        if path.is_file()
        else []
    )
    return names[0] if names else "unknown"


def _device() -> str:
    import torch

    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
