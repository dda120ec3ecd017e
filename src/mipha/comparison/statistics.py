"""Intervals and tests that know that questions about one image are not independent.

contributions --Tally: sums by cluster (image)--> resampled or swapped clusters --measure--> metrics

A metric is any function of sums over questions: a mean, an F1, MME's points. So one bootstrap and
one permutation test serve all benchmarks. Everything resamples whole clusters, never single
questions: GQA asks 31 questions an image, and intervals that take them for independent come out too
narrow.

    intervals            one model: a cluster bootstrap of every metric
    paired_differences   two models on the same questions: bootstrap and permutation test
    seed_difference      two recipes, each trained several times: Welch's t-test with questions
    holm                 p-values of several comparisons
    wilson               a share of independent questions, such as that of equal answers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000
_CHUNK = 4_000_000
"""Random numbers held at a time: 2,000 resamples of 40,000 images at once would be 640 MB."""


@dataclass(frozen=True)
class Totals:
    """Sums over all questions: of the data, shape (), or of each resample, shape (resamples,).

    Args:
        sums: Name to sum of its contributions.
        counts: Name to number of its contributions.
    """

    sums: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name that some question contributes to, in order of first appearance."""
        return tuple(self.sums)

    def sum(self, name: str) -> np.ndarray:
        """Return the sum of the contributions to a name; 0 where there are none."""
        return self.sums.get(name, self._nothing())

    def count(self, name: str) -> np.ndarray:
        """Return the number of the contributions to a name."""
        return self.counts.get(name, self._nothing())

    def mean(self, name: str) -> np.ndarray:
        """Return the mean contribution; NaN where there are none."""
        return ratio(self.sum(name), self.count(name))

    def _nothing(self) -> np.ndarray:
        return np.zeros_like(next(iter(self.sums.values())))


Measure = Callable[[Totals], Mapping[str, np.ndarray]]
"""Totals to every metric by name, the headline first, on any shape of totals; NaN: undefined."""


@dataclass(frozen=True)
class Tally:
    """Contributions summed by cluster: all that a metric's value, interval and tests need.

    Args:
        clusters: Label of each cluster, in the order of the rows.
        names: Names of the contributions, in the order of the columns.
        sums: Shape (clusters, names).
        counts: Shape (clusters, names).
    """

    clusters: tuple[Hashable, ...]
    names: tuple[str, ...]
    sums: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file; `read_tally` reads them back.

        Only cells that something contributed to are listed.
        """
        rows, columns = np.nonzero(self.counts)
        cells = zip(
            rows.tolist(),
            columns.tolist(),
            self.sums[rows, columns].tolist(),
            self.counts[rows, columns].tolist(),
            strict=True,
        )
        return {
            "clusters": [str(label) for label in self.clusters],
            "names": list(self.names),
            "cells": list(cells),
        }

    def totals(self, weights: np.ndarray | None = None) -> Totals:
        """Return totals with every cluster taken `weights` times.

        Args:
            weights: Shape (..., clusters); None: every cluster once.
        """
        if weights is None:
            sums, counts = self.sums.sum(axis=0), self.counts.sum(axis=0)  # (names,)
        else:
            sums, counts = weights @ self.sums, weights @ self.counts  # (..., names)
        return Totals(
            {name: sums[..., i] for i, name in enumerate(self.names)},
            {name: counts[..., i] for i, name in enumerate(self.names)},
        )


@dataclass(frozen=True)
class PairedDifference:
    """One metric of a minus that of b, on the same questions.

    Args:
        difference: Difference in the metric's unit.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p_value: Two-sided p-value of "the two are exchangeable within each cluster".
        num_clusters: Independent units.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_clusters: int


@dataclass(frozen=True)
class SeedDifference:
    """One metric of recipe a minus that of recipe b.

    Args:
        difference: Difference of the means over seeds, in the metric's unit.
        low: Lower end of the 95 % interval; NaN where a recipe was trained once.
        high: Upper end.
        p_value: Two-sided p-value of "no difference"; NaN where a recipe was trained once.
        num_runs: Runs of a, and of b.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_runs: tuple[int, int]


def tally(contributions: Iterable[tuple[Hashable, Mapping[str, float]]]) -> Tally:
    """Sum contributions by cluster.

    Args:
        contributions: One (cluster, name -> amount) per question.

    Raises:
        ValueError: There are none.
    """
    clusters: dict[Hashable, int] = {}
    names: dict[str, int] = {}
    at: list[tuple[int, int]] = []
    amounts: list[float] = []
    for cluster, amount_of in contributions:
        row = clusters.setdefault(cluster, len(clusters))
        for name, amount in amount_of.items():
            at.append((row, names.setdefault(name, len(names))))
            amounts.append(amount)
    if not at:
        raise ValueError("there is nothing to score: give at least one question with an answer")

    # Sum by cell of the table.  (clusters, names)
    rows, columns = np.array(at).T
    cells, shape = rows * len(names) + columns, (len(clusters), len(names))
    sums = np.bincount(cells, weights=amounts, minlength=shape[0] * shape[1]).reshape(shape)
    counts = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape).astype(float)
    return Tally(tuple(clusters), tuple(names), sums, counts)


def read_tally(content: Mapping[str, Any]) -> Tally:
    """Return the tally that `Tally.as_json` wrote."""
    tables = np.zeros((2, len(content["clusters"]), len(content["names"])))
    if content["cells"]:
        rows, columns, sums, counts = np.array(content["cells"]).T
        tables[:, rows.astype(int), columns.astype(int)] = sums, counts
    return Tally(tuple(content["clusters"]), tuple(content["names"]), *tables)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient; NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(denominator) == 0, np.nan, np.divide(numerator, denominator))


def wilson(num: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, which has a width even for a share of 0 or 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z, share = 1.959964, num / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = (
        z
        / (1 + z * z / total)
        * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def values(data: Tally, measure: Measure) -> dict[str, float]:
    """Return every metric of the data; NaN where it is undefined."""
    return {name: float(value) for name, value in measure(data.totals()).items()}


def intervals(
    data: Tally,
    measure: Measure,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Return the percentile interval of every metric, resampling clusters with replacement.

    Args:
        data: Sums by cluster.
        measure: Totals to metrics.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resampling; the same input gives the same interval.
        level: Nominal coverage. With fewer than some 30 clusters the true coverage is a few points
            lower; a metric that no resample can change gets an interval of no width. Resamples in
            which a metric is undefined do not count for it.

    Source: Field and Welsh 2007, "Bootstrapping clustered data" (the cluster bootstrap); Miller
        2024, "Adding Error Bars to Evals" (clustering by shared context).
    """
    rng = np.random.default_rng(seed)
    drawn = [
        measure(data.totals(weights))
        for weights in _resamples(rng, num_resamples, len(data.clusters))
    ]
    return {
        name: _percentiles(np.concatenate([part[name] for part in drawn]), level)
        for name in drawn[0]
    }


def resampled_values(
    data: Tally, measure: Measure, metric: str, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Return one metric on resampled clusters, shape (resamples,).

    Every tally over the same clusters gets the same resamples, whatever the order of its clusters.
    """
    order = np.argsort([str(label) for label in data.clusters])
    in_order = Tally(
        tuple(data.clusters[i] for i in order), data.names, data.sums[order], data.counts[order]
    )
    rng = np.random.default_rng(seed)
    draws = [
        measure(in_order.totals(weights))[metric]
        for weights in _resamples(rng, num_resamples, len(order))
    ]
    return np.concatenate(draws)


def paired_differences(
    a: Tally, b: Tally, measure: Measure, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, PairedDifference]:
    """Compare two models on the same questions, metric by metric.

    Args:
        a: Tally of one model.
        b: Tally of the other, over the same clusters and names.
        measure: Totals to metrics.
        num_resamples: Bootstrap resamples, and random swaps; the smallest possible p-value is
            1 / (num_resamples + 1).
        seed: Seed of both.

    Returns:
        Each metric's difference with its cluster-bootstrap interval, and a p-value by swapping the
        two models' answers on whole clusters: if the models were equally good, a coin toss would
        decide which of the two gave which answers on an image. Metrics that are undefined for
        either model are left out.

    Raises:
        ValueError: The clusters or the names differ.
    """
    if set(a.clusters) != set(b.clusters) or set(a.names) != set(b.names):
        raise ValueError(
            "the two were not asked the same questions: compare models on one and the same set"
        )
    b = _in_order_of(a, b)
    shift = Tally(a.clusters, a.names, a.sums - b.sums, a.counts - b.counts)
    observed = _difference(measure, a.totals(), b.totals())
    observed = {name: value for name, value in observed.items() if np.isfinite(value)}

    # The bootstrap: both models on the same resampled clusters.
    rng = np.random.default_rng(seed)
    drawn = [
        _difference(measure, a.totals(w), b.totals(w))
        for w in _resamples(rng, num_resamples, len(a.clusters))
    ]

    # The permutation test: whole clusters swap sides at random.
    as_extreme = dict.fromkeys(observed, 0)
    for rows in _chunks(num_resamples, len(a.clusters)):
        swapped = rng.integers(2, size=(rows.stop - rows.start, len(a.clusters))).astype(float)
        moved = shift.totals(swapped)
        random = _difference(measure, _minus(a.totals(), moved), _plus(b.totals(), moved))
        for name, value in observed.items():
            # A swap that gives the observed difference again must count, whatever it is rounded to.
            # An undefined difference counts as extreme: it can only make the test more careful.
            below = np.abs(random[name]) < abs(value) - 1e-9 * (1 + abs(value))
            as_extreme[name] += int((~below).sum())

    return {
        name: PairedDifference(
            float(value),
            *_percentiles(np.concatenate([part[name] for part in drawn]), 0.95),
            (as_extreme[name] + 1) / (num_resamples + 1),
            len(a.clusters),
        )
        for name, value in observed.items()
    }


def seed_difference(
    a: Sequence[Tally], b: Sequence[Tally], measure: Measure, metric: str, num_resamples: int = 500
) -> SeedDifference:
    """Compare two recipes over their seeds, on the same questions.

    A difference between two trained models says little about two recipes, because another seed may
    reverse it. So the variance of the difference of two means has a part from seeds,
    s_a^2 / n_a + s_b^2 / n_b (Welch), and a part from the questions: recipes may differ on these
    questions but not on others. The second part is the variance of the difference when images are
    resampled, less the variance between runs of one recipe, which the seeds' part holds already.

    Args:
        a: One tally per run, over the same clusters.
        b: The same of the other recipe.
        measure: Totals to metrics.
        metric: Name of the metric to compare.
        num_resamples: Resamples of images, for the questions' part.

    Raises:
        ValueError: A run was asked other questions, or the metric is undefined for one.

    Source: Welch 1947 and Satterthwaite 1946 for the t-test; Miller 2024, "Adding Error Bars to
        Evals", for clusters.
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

    # Variance from the choice of questions.
    draws = [
        np.stack([resampled_values(run, measure, metric, num_resamples) for run in group])
        for group in (a, b)
    ]  # two of (runs, resamples)
    own = [_own_variance(group) / len(group) for group in draws]
    moved = float(np.nanvar(draws[0].mean(axis=0) - draws[1].mean(axis=0), ddof=1))
    questions = max(0.0, moved - sum(own))

    # Variance from the seeds, and the sum of all with its degrees of freedom.
    seeds = [float(group.var(ddof=1)) / len(group) for group in scores]
    parts = [
        (seeds[0], counts[0] - 1),
        (seeds[1], counts[1] - 1),
        (questions, max(1, len(a[0].clusters) - 1)),
    ]
    variance = sum(part for part, _ in parts)
    if variance == 0:  # every run of either recipe scored the same
        p_value = 0.0 if difference else 1.0
        return SeedDifference(difference, difference, difference, p_value, counts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)

    error = math.sqrt(variance)
    half = t_quantile(0.975, freedom) * error
    p_value = t_test(difference / error, freedom)
    return SeedDifference(difference, difference - half, difference + half, p_value, counts)


def t_test(t: float, freedom: float) -> float:
    """Return the two-sided p-value of Student's t; `freedom` below 1 counts as 1."""
    from scipy.stats import t as student  # half a second to import

    return float(2 * student.sf(abs(t), max(1.0, freedom)))


def t_quantile(share: float, freedom: float) -> float:
    """Return the t that this share of Student's distribution lies below."""
    from scipy.stats import t as student

    return float(student.ppf(share, max(1.0, freedom)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for several comparisons, in the order given.

    Raises:
        ValueError: A value is not between 0 and 1.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, dtype=float)
    if wrong := [value for value in p.tolist() if not 0 <= value <= 1]:
        raise ValueError(f"{wrong[0]} is not a p-value: give numbers between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def _own_variance(draws: np.ndarray) -> float:
    """Return the variance of one run's metric against its recipe's when images are resampled.

    Args:
        draws: Metric of each run on each resample, shape (runs, resamples).
    """
    spread = np.nanvar(draws - draws.mean(axis=0), axis=1, ddof=1)  # (runs,)
    return float(np.nanmean(spread)) * len(draws) / (len(draws) - 1)


def _percentiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
    defined = drawn[np.isfinite(drawn)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _difference(measure: Measure, a: Totals, b: Totals) -> dict[str, np.ndarray]:
    theirs = measure(b)
    return {
        name: np.asarray(value - theirs[name])
        for name, value in measure(a).items()
        if name in theirs
    }


def _minus(a: Totals, b: Totals) -> Totals:
    return Totals(
        {k: a.sums[k] - v for k, v in b.sums.items()},
        {k: a.counts[k] - v for k, v in b.counts.items()},
    )


def _plus(a: Totals, b: Totals) -> Totals:
    return Totals(
        {k: a.sums[k] + v for k, v in b.sums.items()},
        {k: a.counts[k] + v for k, v in b.counts.items()},
    )


def _in_order_of(a: Tally, b: Tally) -> Tally:
    if a.clusters == b.clusters and a.names == b.names:
        return b
    row, column = ({label: i for i, label in enumerate(labels)} for labels in (b.clusters, b.names))
    at = np.ix_([row[label] for label in a.clusters], [column[name] for name in a.names])
    return Tally(a.clusters, a.names, b.sums[at], b.counts[at])


def _resamples(
    rng: np.random.Generator, num_resamples: int, num_clusters: int
) -> Iterator[np.ndarray]:
    """Yield how often each resample drew each cluster, shape (some resamples, clusters)."""
    for rows in _chunks(num_resamples, num_clusters):
        num = rows.stop - rows.start
        drawn = (
            rng.integers(num_clusters, size=(num, num_clusters))
            + np.arange(num)[:, None] * num_clusters
        )
        yield (
            np.bincount(drawn.ravel(), minlength=num * num_clusters)
            .reshape(num, num_clusters)
            .astype(float)
        )


def _chunks(num_rows: int, row_size: int) -> Iterator[slice]:
    step = max(1, _CHUNK // row_size)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
