"""How sure a number is: intervals and tests that know that questions about one image are not independent.

contributions  --Tally: sums by cluster (image)-->  resampled or swapped clusters  --measure-->  every metric, many times over

A metric is any function of sums over questions: a mean, an F1, MME's points. So one bootstrap and one permutation test serve
all benchmarks. Everything resamples whole clusters, never single questions: GQA asks 31 questions an image, and intervals
that take them for independent come out too narrow.
"""

from __future__ import annotations

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
        """Every name that some question contributes to, in order of first appearance."""
        return tuple(self.sums)

    def sum(self, name: str) -> np.ndarray:
        """Sum of the contributions to a name; 0 where there are none."""
        return self.sums.get(name, self._nothing())

    def count(self, name: str) -> np.ndarray:
        """Number of the contributions to a name."""
        return self.counts.get(name, self._nothing())

    def mean(self, name: str) -> np.ndarray:
        """Mean contribution; NaN where there are none."""
        return ratio(self.sum(name), self.count(name))

    def _nothing(self) -> np.ndarray:
        return np.zeros_like(next(iter(self.sums.values())))


Measure = Callable[[Totals], Mapping[str, np.ndarray]]
"""Totals to every metric by name, the headline first; works on any shape of totals; NaN where a metric is undefined."""


@dataclass(frozen=True)
class Tally:
    """Contributions summed by cluster: all that a metric's value, interval and tests need.

    Args:
        clusters: Label of each cluster.
        names: What is contributed to.
        sums: Shape (clusters, names).
        counts: Shape (clusters, names).
    """

    clusters: tuple[Hashable, ...]
    names: tuple[str, ...]
    sums: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; `read_tally` reads them back. Only cells that something contributed to are listed."""
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
        """Totals with every cluster taken `weights` times, shape (..., clusters); null: once."""
        sums = self.sums.sum(axis=0) if weights is None else weights @ self.sums
        counts = self.counts.sum(axis=0) if weights is None else weights @ self.counts
        return Totals(
            *(
                {name: table[..., i] for i, name in enumerate(self.names)}
                for table in (sums, counts)
            )
        )


@dataclass(frozen=True)
class PairedDifference:
    """One metric of a minus that of b, on the same questions.

    Args:
        difference: In the metric's unit.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p_value: Two-sided, of "the two are exchangeable within each cluster".
        num_clusters: Independent units.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_clusters: int


def tally(contributions: Iterable[tuple[Hashable, Mapping[str, float]]]) -> Tally:
    """Sum contributions by cluster.

    Args:
        contributions: One (cluster, name -> amount) a question.

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
    rows, columns = np.array(at).T
    cells, shape = rows * len(names) + columns, (len(clusters), len(names))
    sums = np.bincount(cells, weights=amounts, minlength=shape[0] * shape[1]).reshape(shape)
    counts = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape).astype(float)
    return Tally(tuple(clusters), tuple(names), sums, counts)


def read_tally(content: Mapping[str, Any]) -> Tally:
    """The tally that `Tally.as_json` wrote."""
    tables = np.zeros((2, len(content["clusters"]), len(content["names"])))
    if content["cells"]:
        rows, columns, sums, counts = np.array(content["cells"]).T
        tables[:, rows.astype(int), columns.astype(int)] = sums, counts
    return Tally(tuple(content["clusters"]), tuple(content["names"]), *tables)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient; NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(denominator) == 0, np.nan, np.divide(numerator, denominator))


def values(data: Tally, measure: Measure) -> dict[str, float]:
    """Every metric of the data; NaN where it is undefined."""
    return {name: float(value) for name, value in measure(data.totals()).items()}


def intervals(
    data: Tally,
    measure: Measure,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile interval of every metric, resampling clusters with replacement.

    Args:
        num_resamples: Bootstrap resamples.
        seed: Of the resampling; the same input gives the same interval.
        level: Coverage aimed at. With fewer than some 30 clusters the true coverage is a few points lower; a metric that
            no resample can change gets an interval of no width. Resamples in which a metric is undefined do not count for it.

    Source: Field and Welsh 2007, "Bootstrapping clustered data" (the cluster bootstrap); Miller 2024, "Adding Error Bars
        to Evals" (clustering by shared context).
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
    """One metric on resampled clusters, shape (resamples,): the same clusters for every tally over them, in whichever order they stand.

    Args:
        seed: Of the resampling.
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
        a: One model's tally.
        b: The other's, over the same clusters and names.
        num_resamples: Bootstrap resamples, and random swaps; the smallest p-value possible is 1 / (num_resamples + 1).
        seed: Of both.

    Returns:
        Each metric's difference with its cluster-bootstrap interval, and a p-value by swapping the two models' answers on
        whole clusters: if the models were equally good, which of the two gave which answers on an image would be a coin toss.
        Metrics that are undefined for either model are left out.

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
    rng = np.random.default_rng(seed)
    drawn = [
        _difference(measure, a.totals(w), b.totals(w))
        for w in _resamples(rng, num_resamples, len(a.clusters))
    ]
    as_extreme = dict.fromkeys(observed, 0)
    for rows in _chunks(num_resamples, len(a.clusters)):
        swapped = rng.integers(2, size=(rows.stop - rows.start, len(a.clusters))).astype(float)
        moved = shift.totals(swapped)
        random = _difference(measure, _minus(a.totals(), moved), _plus(b.totals(), moved))
        for name, value in observed.items():
            # A swap that gives the observed difference again must count as such, whatever order of additions rounds it to.
            # An undefined difference counts as extreme: it can only make the test more careful.
            as_extreme[name] += int(
                (~(np.abs(random[name]) < abs(value) - 1e-9 * (1 + abs(value)))).sum()
            )
    return {
        name: PairedDifference(
            float(value),
            *_percentiles(np.concatenate([part[name] for part in drawn]), 0.95),
            (as_extreme[name] + 1) / (num_resamples + 1),
            len(a.clusters),
        )
        for name, value in observed.items()
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for having made several comparisons, in the order given.

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
    """How often each resample drew each cluster, shape (some resamples, clusters)."""
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
