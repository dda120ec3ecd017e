"""Two recipes, each trained several times: is their difference more than that of two runs of one recipe?

A difference between two trained models says little of two recipes: another seed may turn it round. So the spread of the seeds
enters, and what the choice of questions adds to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mipha.comparison.statistics import Measure, Tally, resampled_values, values


@dataclass(frozen=True)
class SeedDifference:
    """One metric of recipe a minus that of recipe b.

    Args:
        difference: Of the means over seeds, in the metric's unit.
        low: Lower end of the 95 % interval; NaN where a recipe was trained once.
        high: Upper end.
        p_value: Two-sided, of "no difference"; NaN where a recipe was trained once.
        num_runs: Of a, and of b.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_runs: tuple[int, int]


def seed_difference(
    a: Sequence[Tally], b: Sequence[Tally], measure: Measure, metric: str, num_resamples: int = 500
) -> SeedDifference:
    """Compare two recipes over their seeds, on the same questions.

    The variance of the difference of two means has a part from seeds, s_a^2 / n_a + s_b^2 / n_b (Welch), and one from the questions:
    recipes may differ on these as they would not on others. That part is what the difference varies by when images are resampled, less
    what runs of one recipe vary by against one another, which the seeds' part holds already.

    Args:
        a: A tally a run, over the same clusters.
        b: The same of the other recipe.
        metric: Which of the measure's.
        num_resamples: Of images, for the questions' part.

    Raises:
        ValueError: A run was asked other questions, or the metric is undefined for one.

    Source: Welch 1947 and Satterthwaite 1946 for the t-test; Miller 2024, "Adding Error Bars to Evals", for clusters.
    """
    runs = [*a, *b]
    if any(set(run.clusters) != set(runs[0].clusters) for run in runs):
        raise ValueError(
            "the runs were not asked the same questions: measure all of them on one set"
        )
    scores = [np.array([values(run, measure)[metric] for run in group]) for group in (a, b)]
    if not all(np.isfinite(group).all() for group in scores):
        raise ValueError(
            f"{metric} is undefined for one of the runs: compare them by another metric"
        )
    difference = float(scores[0].mean() - scores[1].mean())
    counts = (len(a), len(b))
    if min(counts) < 2:
        return SeedDifference(difference, math.nan, math.nan, math.nan, counts)
    draws = [
        np.stack([resampled_values(run, measure, metric, num_resamples) for run in group])
        for group in (a, b)
    ]
    own = [_own_variance(group) / len(group) for group in draws]
    questions = max(
        0.0, float(np.nanvar(draws[0].mean(axis=0) - draws[1].mean(axis=0), ddof=1)) - sum(own)
    )
    seeds = [float(group.var(ddof=1)) / len(group) for group in scores]
    parts = [
        (seeds[0], counts[0] - 1),
        (seeds[1], counts[1] - 1),
        (questions, max(1, len(a[0].clusters) - 1)),
    ]
    variance = sum(part for part, _ in parts)
    if variance == 0:  # every run of either recipe scored the same
        return SeedDifference(
            difference, difference, difference, 0.0 if difference else 1.0, counts
        )
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    error = math.sqrt(variance)
    half = _t_quantile(freedom) * error
    return SeedDifference(
        difference,
        difference - half,
        difference + half,
        t_test(difference / error, freedom),
        counts,
    )


def t_test(t: float, freedom: float) -> float:
    """Two-sided p-value of Student's t, by the integral of cos^(freedom - 1) from atan(t / sqrt(freedom)) to a right angle."""
    freedom = max(1.0, freedom)
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(1 - np.interp(math.atan(abs(t) / math.sqrt(freedom)), angles, below) / below[-1])


def _t_quantile(freedom: float, p_value: float = 0.05) -> float:
    """The t whose two-sided p-value is this."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_test(middle, freedom) > p_value else (low, middle)
    return high


def _own_variance(draws: np.ndarray) -> float:
    """What one run's metric varies by against another of its recipe when images are resampled; draws is (runs, resamples)."""
    return (
        float(np.nanmean(np.nanvar(draws - draws.mean(axis=0), axis=1, ddof=1)))
        * len(draws)
        / (len(draws) - 1)
    )
