"""Figures: a stage's loss curve, a sheet of answered images, the paper's radar of models."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mipha.comparison.results import LOWER_IS_BETTER, TITLES, Row, best_of, columns_of
from mipha.files import read_lines, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

INK, GREY, FAINT = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, GREEN, RED = "#2563a8", "#2a7f4f", "#b83232"
COLOURS = ("#2563a8", "#c2571a", "#2a7f4f", "#8b3fa0", "#b83232", "#7b8794", "#b8860b", "#1f7a8c")


def plot_metrics(metrics_jsonl: Path, png: Path) -> None:
    """Draw one stage's loss (raw and smoothed) over its steps, with the learning rate below.

    Args:
        metrics_jsonl: Lines with `step`, `loss` (nats per supervised token) and
            `learning_rate/<part>`; the stage is named after the folder.
        png: File to write.

    Raises:
        ValueError: No line has a step and a finite loss.
    """
    rows = [
        row
        for row in read_lines(metrics_jsonl)
        if "step" in row and math.isfinite(row.get("loss", math.nan))
    ]
    if not rows:
        raise ValueError(
            f"{metrics_jsonl} has no line with a step and a finite loss: nothing to draw"
        )

    # The loss, raw and smoothed, and that of held-out images.
    steps = [row["step"] for row in rows]
    losses = np.array([row["loss"] for row in rows], dtype=float)
    width = max(1, len(rows) // 20)
    figure = new_figure(6.4, 4.2)
    top, bottom = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1], "hspace": 0.12}
    )
    top.plot(steps, losses, color=BLUE, linewidth=0.8, alpha=0.35)
    top.plot(steps, _smoothed(losses, width), color=BLUE, linewidth=2)
    validated = [row for row in rows if math.isfinite(row.get("validation_loss", math.nan))]
    if validated:
        points = [row["step"] for row in validated], [row["validation_loss"] for row in validated]
        top.plot(
            *points, color=GREEN, linewidth=1.2, marker="o", markersize=3.5, label="held-out images"
        )
        top.legend(frameon=False, fontsize=8)

    # Titles and scales. The first steps of a new projector are many times the rest: on a linear
    # scale the interesting part would be a flat line at the bottom.
    top.set_ylabel("loss (nats per token)")
    title = f"{metrics_jsonl.parent.name}: loss {losses[-width:].mean():.3f} at the end"
    top.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", parse_math=False)
    if losses.min() > 0 and losses.max() / losses.min() > 20:
        top.set_yscale("log")
        top.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        top.set_ylim(bottom=0)

    _plot_learning_rates(bottom, rows, steps)
    for axes in (top, bottom):
        _clean(axes)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.margins(x=0.01)
    figure.align_ylabels()
    save_figure(figure, png)


def contact_sheet(items: Sequence[tuple[Image, str, str, str | None]], png: Path) -> None:
    """Draw images side by side, each with its question and its answer underneath.

    Args:
        items: Image, question, answer, and the gold answer or None. The answer is green if it ends
            with the gold answer's words (case and punctuation aside), red if not, and neither where
            there is no gold answer.
        png: File to write.

    Raises:
        ValueError: No items.
    """
    if not items:
        raise ValueError("a contact sheet needs at least one image, got none")

    columns = min(len(items), 5)
    num_rows = -(-len(items) // columns)
    figure = new_figure(2.35 * columns, 3.75 * num_rows)
    for axes in figure.subplots(num_rows, columns, squeeze=False).flat:
        axes.set_axis_off()

    # Answers start at one height under images of one size: the eye compares along the row.
    asked = [_wrapped(question, 30, 3) for _, question, _, _ in items]
    below = max(text.count("\n") for text in asked) + 1
    for axes, question, (image, _, answer, gold) in zip(figure.axes, asked, items, strict=False):
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[], anchor="N")
        right = None
        if gold is not None:
            right = _words(answer)[-max(1, len(_words(gold))) :] == _words(gold)

        # Small images are shown as their pixels are; smoothing 64 pixels over 2 inches is a blur.
        axes.imshow(
            image.convert("RGB"),
            interpolation="nearest" if max(image.size) < 200 else "antialiased",
        )
        for spine in axes.spines.values():
            spine.set(color=FAINT, linewidth=1)

        mark, colour = {None: ("", INK), True: ("✓ ", GREEN), False: ("✗ ", RED)}[right]
        said = _wrapped(mark + (answer or "(no answer)"), 24, 4)
        _caption(axes, 0, question, color=GREY, fontsize=9.5)
        _caption(axes, below, said, color=colour, fontsize=10.5, fontweight="bold")
        if right is False:
            line = below + 1.2 * (said.count("\n") + 1)
            published = _wrapped(f"published: {gold}", 30, 2)
            _caption(axes, line, published, color=GREY, fontsize=9)

    figure.subplots_adjust(left=0.01, right=0.99, top=0.98, bottom=0.02, wspace=0.12, hspace=0.02)
    save_figure(figure, png)


def draw_radar(rows: Sequence[Row], path: Path) -> None:
    """Draw one line per model on one axis per benchmark: the paper's radar.

    An axis goes from the lowest of these models to the highest, with their numbers at its label. A
    benchmark that a model was not measured on is a gap in its line, not a zero. Perplexities, where
    less is better, have no axis.

    Args:
        rows: Two models or more.
        path: File to write, `.png` or `.svg`.

    Raises:
        ValueError: Fewer than three benchmarks that two of the models share.
    """
    columns = [
        column
        for column in columns_of(rows)
        if sum(column in row.cells for row in rows) > 1 and column not in LOWER_IS_BETTER
    ]
    if len(columns) < 3 or len(rows) < 2:
        raise ValueError(
            f"a radar wants two models and three benchmarks that they share, these share "
            f"{len(columns)}: draw a table"
        )

    figure = new_figure(7.2, 6.4)
    axes = figure.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    angles = [2 * math.pi * number / len(columns) for number in range(len(columns))]
    lowest = {
        column: min(row.cells[column].value for row in rows if column in row.cells)
        for column in columns
    }
    highest = {column: best_of(rows, column) or 0.0 for column in columns}

    # One closed line per model.
    for number, row in enumerate(rows):
        share = [_share(row, column, lowest[column], highest[column]) for column in columns]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            [*angles, angles[0] + 2 * math.pi],
            [*share, share[0]],
            color=colour,
            linewidth=2,
            marker="o",
            markersize=4,
            label=row.name,
        )
        if not any(math.isnan(value) for value in share):
            axes.fill(angles, share, color=colour, alpha=0.08)

    axes.set_ylim(0, 1.12)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], labels=[])
    labels = [
        f"{TITLES.get(column, column)}\n{lowest[column]:g} to {highest[column]:g}"
        for column in columns
    ]
    axes.set_xticks(angles, labels=labels, fontsize=9, color=INK)
    axes.tick_params(pad=18)
    axes.grid(color=FAINT)
    axes.spines["polar"].set_color(GREY)
    figure.legend(loc="lower center", ncols=min(4, len(rows)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save_figure(figure, path)


def _plot_learning_rates(axes: Axes, rows: list[dict[str, Any]], steps: list[int]) -> None:
    keys = sorted({key for row in rows for key in row if key.partition("/")[0] == "learning_rate"})
    curves: dict[tuple[float, ...], list[str]] = {}
    for key in keys:
        curves.setdefault(tuple(row.get(key, math.nan) for row in rows), []).append(
            key.partition("/")[2].replace("_", " ")
        )

    # Parts with the same rate share a curve.
    styles = ("-", "--", ":")
    for (curve, parts), style in zip(curves.items(), styles, strict=False):
        axes.plot(steps, curve, color=GREY, linewidth=1.2, linestyle=style, label=", ".join(parts))
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=7, labelcolor=GREY)

    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning\nrate")
    axes.set_xlabel("optimizer step")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.yaxis.get_offset_text().set(fontsize=8, color=GREY)
    axes.locator_params(axis="y", nbins=2)


def _share(row: Row, column: str, low: float, high: float) -> float:
    """Return where a number lies on its axis, from 0.25 to 1; NaN where it is absent."""
    if column not in row.cells:
        return math.nan
    if high <= low:
        return 1.0
    return 0.25 + 0.75 * (row.cells[column].value - low) / (high - low)


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean over a window around each step.

    It looks ahead no further than back, so that the steep start is not flattened.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    back = np.minimum(width, index)
    ahead = np.minimum(back, len(values) - 1 - index)
    return (sums[index + ahead + 1] - sums[index - back]) / (back + ahead + 1)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _wrapped(text: str, width: int, most_lines: int) -> str:
    lines = textwrap.wrap(" ".join(text.split()), width, max_lines=most_lines, placeholder=" …")
    return "\n".join(lines) or " "


def _caption(axes: Axes, line: float, text: str, **style: Any) -> None:
    """Write text some lines under the image; a dollar sign in it is money, not mathematics."""
    place = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "va": "top",
        "linespacing": 1.2,
        "parse_math": False,
    }
    axes.annotate(text, (0, 0), (0, -7 - 13.5 * line), **place, **style)


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of its own, in inches.

    pyplot would keep every figure alive and pick a window system.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", colors=GREY, labelsize=8)
    axes.xaxis.label.set(color=GREY, fontsize=9)
    axes.yaxis.label.set(color=GREY, fontsize=9)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole.

    Args:
        path: File to write, `.png` or `.svg`.

    Raises:
        ValueError: Another ending.
    """
    form = path.suffix.removeprefix(".")
    if form not in ("png", "svg"):
        raise ValueError(f"a figure is .png or .svg, not {path.name}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=150, bbox_inches="tight", pad_inches=0.15)
    write_whole(path, buffer.getvalue())
