"""Figures of a study: bars with every seed's score on them, or a curve over a numeric axis."""

from __future__ import annotations

import math
from pathlib import Path

from mipha.comparison.figures import BLUE, FAINT, GREY, INK, new_figure, save_figure
from mipha.comparison.results import TITLES
from mipha.studies.findings import Findings


def draw_scores(findings: Findings, path: Path) -> None:
    """One panel a benchmark: a bar or a point a variant, a dot a seed.

    Args:
        path: `.png` or `.svg`, written whole.
    """
    benchmarks = list(findings.headline)
    numeric = all(variant.number is not None for variant in findings.variants)
    columns = min(4, len(benchmarks))
    rows = math.ceil(len(benchmarks) / columns)
    figure = new_figure(max(5.6, 3.4 * columns), 3.3 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, benchmarks, strict=False):
        (_curve if numeric else _bars)(axes, findings, name)
        axes.set_title(
            TITLES.get(name, name), loc="left", color=INK, fontsize=11, fontweight="bold"
        )
        axes.set_ylabel(
            f"{findings.headline[name].name} ({findings.headline[name].unit})",
            color=GREY,
            fontsize=9,
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY, labelsize=8)
        axes.grid(axis="y", color=FAINT)
        axes.set_axisbelow(True)
    for axes in panels[len(benchmarks) :]:
        axes.set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)


def _bars(axes, findings: Findings, benchmark: str) -> None:
    names = [variant.name for variant in findings.variants]
    for place, name in enumerate(names):
        scores = findings.scores[name][benchmark]
        if scores.values:
            axes.bar(place, scores.mean, width=0.6, color=BLUE, alpha=0.3)
            axes.plot([place] * len(scores.values), scores.values, "o", color=BLUE, markersize=4)
    axes.set_xticks(
        range(len(names)),
        [name.replace("-", "-\n", 1) if len(name) > 12 else name for name in names],
    )


def _curve(axes, findings: Findings, benchmark: str) -> None:
    in_order = sorted(findings.variants, key=lambda variant: variant.number)
    points = [(variant.number, findings.scores[variant.name][benchmark]) for variant in in_order]
    measured = [(number, scores) for number, scores in points if scores.values]
    axes.plot(
        [number for number, _ in measured],
        [scores.mean for _, scores in measured],
        color=BLUE,
        linewidth=2,
    )
    for number, scores in measured:
        axes.plot([number] * len(scores.values), scores.values, "o", color=BLUE, markersize=4)
    numbers = [number for number, _ in points]
    if min(numbers) > 0 and max(numbers) / min(numbers) >= 10:
        axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    (axis,) = {variant.name.split("=")[0] for variant in findings.variants}
    axes.set_xlabel(axis, color=GREY, fontsize=9)
