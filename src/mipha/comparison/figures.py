"""Pictures of numbers: a stage's loss curve, and a sheet of answered pictures."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mipha.files import read_lines, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

INK, GREY, FAINT = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, GREEN, RED = "#2563a8", "#2a7f4f", "#b83232"


def plot_metrics(metrics_jsonl: Path, png: Path) -> None:
    """Draw one stage's loss (raw and smoothed) over its steps, with the learning rate on a small axis below.

    Args:
        metrics_jsonl: Lines with `step`, `loss` (nats per supervised token) and `learning_rate/<part>`; the stage is
            named after the folder.
        png: Written whole.

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
    top.set_ylabel("loss (nats per token)")
    title = f"{metrics_jsonl.parent.name}: loss {losses[-width:].mean():.3f} at the end"
    top.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", parse_math=False)
    # The first steps of a new projector are many times the rest: the interesting part would be a flat line at the bottom.
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
    """Draw pictures side by side, each with its question and its answer underneath.

    Args:
        items: Picture, question, answer, and the gold answer or None. The answer is green if it ends with the gold answer's
            words (case and punctuation aside), red if not, and neither where there is no gold answer.
        png: Written whole.

    Raises:
        ValueError: No items.
    """
    if not items:
        raise ValueError("a contact sheet needs at least one picture, got none")
    columns = min(len(items), 5)
    num_rows = -(-len(items) // columns)
    figure = new_figure(2.35 * columns, 3.75 * num_rows)
    for axes in figure.subplots(num_rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    asked = [_wrapped(question, 30, 3) for _, question, _, _ in items]
    # Answers start at one height under pictures of one size: the eye compares along the row.
    below = max(text.count("\n") for text in asked) + 1
    for axes, question, (image, _, answer, gold) in zip(figure.axes, asked, items, strict=False):
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[], anchor="N")
        right = (
            None if gold is None else _words(answer)[-max(1, len(_words(gold))) :] == _words(gold)
        )
        # Small pictures are shown as their pixels are; smoothing 64 pixels over 2 inches is a blur.
        axes.imshow(
            image.convert("RGB"),
            interpolation="nearest" if max(image.size) < 200 else "antialiased",
        )
        for spine in axes.spines.values():
            spine.set(color=FAINT, linewidth=1)
        said = _wrapped(
            {None: "", True: "✓ ", False: "✗ "}[right] + (answer or "(no answer)"), 24, 4
        )
        _caption(axes, 0, question, color=GREY, fontsize=9.5)
        _caption(
            axes,
            below,
            said,
            color={None: INK, True: GREEN, False: RED}[right],
            fontsize=10.5,
            fontweight="bold",
        )
        if right is False:
            _caption(
                axes,
                below + 1.2 * (said.count("\n") + 1),
                _wrapped(f"published: {gold}", 30, 2),
                color=GREY,
                fontsize=9,
            )
    figure.subplots_adjust(left=0.01, right=0.99, top=0.98, bottom=0.02, wspace=0.12, hspace=0.02)
    save_figure(figure, png)


def _plot_learning_rates(axes: Axes, rows: list[dict[str, Any]], steps: list[int]) -> None:
    keys = sorted({key for row in rows for key in row if key.partition("/")[0] == "learning_rate"})
    curves: dict[tuple[float, ...], list[str]] = {}
    for key in keys:
        curves.setdefault(tuple(row.get(key, math.nan) for row in rows), []).append(
            key.partition("/")[2].replace("_", " ")
        )
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


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a window around each step; it looks ahead no further than back, so that the steep start is not flattened."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    back = np.minimum(width, index)
    ahead = np.minimum(back, len(values) - 1 - index)
    return (sums[index + ahead + 1] - sums[index - back]) / (back + ahead + 1)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _wrapped(text: str, width: int, most_lines: int) -> str:
    return (
        "\n".join(
            textwrap.wrap(" ".join(text.split()), width, max_lines=most_lines, placeholder=" …")
        )
        or " "
    )


def _caption(axes: Axes, line: float, text: str, **style: Any) -> None:
    """Text that many lines under the picture; a dollar sign in it is money, not mathematics."""
    place = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "va": "top",
        "linespacing": 1.2,
        "parse_math": False,
    }
    axes.annotate(text, (0, 0), (0, -7 - 13.5 * line), **place, **style)


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches; pyplot would keep every figure alive and pick a window system."""
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
        path: `.png` or `.svg`.

    Raises:
        ValueError: Another ending.
    """
    form = path.suffix.removeprefix(".")
    if form not in ("png", "svg"):
        raise ValueError(f"a figure is .png or .svg, not {path.name}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=150, bbox_inches="tight", pad_inches=0.15)
    write_whole(path, buffer.getvalue())
