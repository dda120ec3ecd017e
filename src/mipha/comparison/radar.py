"""The paper's radar: one axis a benchmark, one line a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mipha.comparison.figures import FAINT, GREY, INK, new_figure, save_figure
from mipha.comparison.results import TITLES, Row, best_of, columns_of

COLOURS = ("#2563a8", "#c2571a", "#2a7f4f", "#8b3fa0", "#b83232", "#7b8794", "#b8860b", "#1f7a8c")


def draw_radar(rows: Sequence[Row], path: Path) -> None:
    """Draw models on one axis a benchmark, each from the lowest of these models to the highest, with their numbers at the ends.

    A benchmark that a model was not measured on is a gap in its line, not a zero.

    Args:
        rows: Two models or more.
        path: `.png` or `.svg`, written whole.

    Raises:
        ValueError: Fewer than three benchmarks that two of the models share.
    """
    columns = [
        column for column in columns_of(rows) if sum(column in row.cells for row in rows) > 1
    ]
    if len(columns) < 3 or len(rows) < 2:
        raise ValueError(
            f"a radar wants two models and three benchmarks that they share, these share {len(columns)}: draw a table"
        )
    figure = new_figure(7.2, 6.4)
    axes = figure.add_subplot(projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    angles = [2 * math.pi * number / len(columns) for number in range(len(columns))]
    lowest = {
        column: min(row.cells[column].value for row in rows if column in row.cells)
        for column in columns
    }
    highest = {column: best_of(rows, column) or 0.0 for column in columns}
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


def _share(row: Row, column: str, low: float, high: float) -> float:
    """Where a number lies on its axis: a quarter of the way out for the lowest, the rim for the highest; NaN where it is absent."""
    if column not in row.cells:
        return math.nan
    return 0.25 + 0.75 * ((row.cells[column].value - low) / (high - low) if high > low else 1.0)
