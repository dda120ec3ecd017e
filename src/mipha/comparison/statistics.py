"""How sure a number is: intervals and tests that know that questions about one image are not independent.

Everything resamples whole clusters (images), never single questions: easy-VQA asks 10 questions an image, and intervals
that take them for independent come out too narrow.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_CHUNK = 4_000_000
"""Random numbers held at a time: 2,000 resamples of 40,000 images at once would be 640 MB."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over the questions that both answered.

    Args:
        difference: Mean of `a - b`, in the units of the values.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p_value: Two-sided, of "the two are exchangeable within each cluster".
        n: Pairs.
        num_clusters: Independent units.
    """

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    num_clusters: int


def cluster_bootstrap(
    values: Sequence[float], clusters: Sequence[Hashable], num_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean, resampling clusters with replacement.

    Args:
        values: One number a question, shape (questions,).
        clusters: Which cluster (image) each belongs to, shape (questions,).
        num_resamples: Bootstrap resamples.
        seed: Of the resampling; the same input gives the same interval.
        level: Coverage aimed at. With fewer than some 30 clusters the true coverage is a few points lower; values that
            are all equal give an interval of no width.

    Raises:
        ValueError: No values, or as many clusters are not given as values.

    Source: Field and Welsh 2007, "Bootstrapping clustered data" (the cluster bootstrap); Miller 2024, "Adding Error Bars
        to Evals" (clustering by shared context).
    """
    sums, counts = _per_cluster(values, clusters)
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for rows in _chunks(num_resamples, len(sums)):
        drawn = rng.integers(len(sums), size=(rows.stop - rows.start, len(sums)))
        # The number of questions varies from resample to resample: a mean over questions is a ratio of two sums.
        means[rows] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], num_resamples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Compare two models on the same questions.

    Args:
        a: One model's value a question, shape (questions,).
        b: The other's, same questions in the same order.
        clusters: Which cluster (image) each question belongs to.
        num_resamples: Bootstrap resamples, and sign flips; the smallest p-value possible is 1 / (num_resamples + 1).
        seed: Of both.

    Returns:
        The mean difference with its cluster-bootstrap interval, and a p-value by flipping the sign of whole clusters:
        if the models were equally good, which of the two gave which answers on an image would be a coin toss.

    Raises:
        ValueError: The three lengths differ, or are zero.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values and b has {len(b)}: compare the same questions in the same order")
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    low, high = cluster_bootstrap(differences, clusters, num_resamples, seed)
    sums, counts = _per_cluster(differences, clusters)
    rng = np.random.default_rng(seed + 1)
    observed, as_extreme = abs(sums.sum()), 0
    for rows in _chunks(num_resamples, len(sums)):
        signs = rng.integers(2, size=(rows.stop - rows.start, len(sums))) * 2 - 1
        # A flip that gives the observed sum again must count as such, whatever the order of additions rounds it to.
        as_extreme += int((np.abs(signs @ sums) >= observed - 1e-9 * (1 + observed)).sum())
    p_value = (as_extreme + 1) / (num_resamples + 1)
    return PairedDifference(float(differences.mean()), low, high, p_value, len(differences), len(counts))


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


def _per_cluster(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of them, each of shape (clusters,)."""
    if len(values) == 0 or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values in {len(clusters)} cluster labels: give at least one value, and a label for each")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    return np.bincount(index, weights=np.asarray(values, dtype=float)), np.bincount(index)


def _chunks(num_rows: int, row_size: int) -> Iterator[slice]:
    step = max(1, _CHUNK // row_size)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
