"""Figures of alignment steps: loss and accuracy of a supervised step, rewards and costs of RLHF."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipha.files import read_lines, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHARES = {
    "accuracy": "pairs ranked right",
    "sign_accuracy": "responses on the right side of zero",
    "token_accuracy": "tokens predicted",
}
_PANELS = {
    "reward": "reward",
    "cost": "cost",
    "multiplier": "lambda",
    "unsafe": "unsafe by the rule",
    "kl": "KL (nats a response)",
}
_GREY, _LIGHT_GREY = "#7b8794", "#e4e7eb"


def plot_losses(metrics_jsonl: Path, png: Path, title: str) -> None:
    """Draw the loss above and shares below over optimizer steps; held-out rows as dots.

    Args:
        metrics_jsonl: Lines with `step` and any of loss, accuracy, sign_accuracy, token_accuracy
            and validation_<the same>.
        png: File to write, whole.
        title: Text above the figure.
    """
    rows = list(read_lines(metrics_jsonl))
    figure = _new_figure(6.4, 5.2)
    top, bottom = figure.subplots(2, 1, sharex=True)

    # Draw each metric in training as a line, and on held-out rows as dots.
    for axes, names in ((top, {"loss": "loss"}), (bottom, _SHARES)):
        for number, (key, label) in enumerate(names.items()):
            colour = f"C{number}"
            trained, held_out = _curve(rows, key), _curve(rows, f"validation_{key}")
            if trained[0]:
                label_trained = f"{label}, in training"
                axes.plot(*trained, color=colour, linewidth=1, alpha=0.6, label=label_trained)
            if held_out[0]:
                label_held_out = f"{label}, held out"
                axes.plot(*held_out, "o-", color=colour, markersize=4, label=label_held_out)
        _style(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)

    # Name the axes.
    top.set_ylabel("loss (nats)")
    top.set_title(title, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    bottom.set_ylim(0, 1.02)
    bottom.set_ylabel("share")
    bottom.set_xlabel("optimizer step")
    _save(figure, png)


def plot_rlhf(runs: Mapping[str, Path], png: Path, threshold: float | None = None) -> None:
    """Draw the means of each RLHF step: reward, cost, lambda, unsafe share, KL, where they exist.

    Args:
        runs: metrics.jsonl of each run, as `train_policy` writes it, by the run's title; several
            runs are drawn over one another.
        png: File to write, whole.
        threshold: Mean cost to draw as a line; None: no line.
    """
    rows = {name: list(read_lines(path)) for name, path in runs.items()}
    panels = {
        key: label
        for key, label in _PANELS.items()
        if any(key in row for lines in rows.values() for row in lines)
    }
    figure = _new_figure(6.4, 1.5 * len(panels) + 0.6)
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False).flat

    # Draw each metric in a panel: the steps thin, their running mean thick.
    for axes, (key, label) in zip(all_axes, panels.items(), strict=True):
        for number, (name, lines) in enumerate(rows.items()):
            steps, values = _curve(lines, key)
            axes.plot(steps, values, color=f"C{number}", linewidth=0.6, alpha=0.35)
            axes.plot(steps, _smooth(values), color=f"C{number}", linewidth=1.6, label=name)
        if key == "cost" and threshold is not None:
            axes.axhline(threshold, color=_GREY, linewidth=1, linestyle=":", label="threshold")
        if key == "unsafe":
            axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
        _style(axes)

    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.axes[-1].set_xlabel("step")
    _save(figure, png)


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color=_LIGHT_GREY)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, png: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    write_whole(png, buffer.getvalue())


def _curve(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and the finite values of a metric."""
    points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float], back: int = 5) -> list[float]:
    """Return the mean over a few steps to either side."""
    near = [values[max(0, index - back) : index + back + 1] for index in range(len(values))]
    return [sum(part) / len(part) for part in near]
