"""A picture of one RLHF step: what the policy earns, what that costs, and how far it has gone."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

from mipha.files import read_lines, write_whole

_PANELS = (
    ("reward", "reward"),
    ("cost", "cost"),
    ("multiplier", "lambda"),
    ("unsafe", "unsafe by the rule"),
    ("kl", "KL (nats a response)"),
)
_BLUE, _GREY = "#2563a8", "#7b8794"


def plot_rlhf(metrics_jsonl: Path, png: Path, title: str, threshold: float | None = None) -> None:
    """Draw the means of each step: reward, cost, lambda, the unsafe share by an independent rule, and KL, where they are told.

    Args:
        metrics_jsonl: As `train_policy` writes it.
        png: Written whole.
        threshold: Of the mean cost, as a line.
    """
    plot_several({title: metrics_jsonl}, png, threshold)


def plot_several(runs: Mapping[str, Path], png: Path, threshold: float | None = None) -> None:
    """Draw some runs over one another; arguments as of `plot_rlhf`, `runs` being files by name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {name: list(read_lines(path)) for name, path in runs.items()}
    panels = [
        (key, label)
        for key, label in _PANELS
        if any(key in row for lines in rows.values() for row in lines)
    ]
    figure = Figure(figsize=(6.4, 1.5 * len(panels) + 0.6), facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (key, label) in zip(
        figure.subplots(len(panels), 1, sharex=True, squeeze=False).flat, panels, strict=True
    ):
        for number, (name, lines) in enumerate(rows.items()):
            steps = [row["step"] for row in lines if math.isfinite(row.get(key, math.nan))]
            values = [row[key] for row in lines if math.isfinite(row.get(key, math.nan))]
            axes.plot(steps, values, color=f"C{number}", linewidth=0.6, alpha=0.35)
            axes.plot(steps, _smoothed(values), color=f"C{number}", linewidth=1.6, label=name)
        if key == "cost" and threshold is not None:
            axes.axhline(threshold, color=_GREY, linewidth=1, linestyle=":", label="threshold")
        if key == "unsafe":
            axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel(label, fontsize=8)
        axes.grid(axis="y", color="#e4e7eb")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    write_whole(png, buffer.getvalue())


def _smoothed(values: list[float], back: int = 5) -> list[float]:
    """Mean over a few steps to either side."""
    near = [values[max(0, index - back) : index + back + 1] for index in range(len(values))]
    return [sum(part) / len(part) for part in near]
