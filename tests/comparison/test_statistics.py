from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipha.comparison import statistics
from mipha.comparison.statistics import cluster_bootstrap, holm, paired_difference


def clustered(rng: np.random.Generator, num_clusters: int, per_cluster: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Values with mean 0 whose clusters differ as much as the values in one do."""
    sizes = rng.integers(1, 2 * per_cluster, num_clusters)
    labels = np.repeat(np.arange(num_clusters), sizes)
    return spread * rng.normal(size=num_clusters)[labels] + rng.normal(size=len(labels)), labels


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    covered = independent = 0
    for trial in range(400):
        values, labels = clustered(rng, 80, 6)
        low, high = cluster_bootstrap(values, labels, num_resamples=400, seed=trial)
        covered += low <= 0 <= high
        low, high = cluster_bootstrap(values, range(len(values)), num_resamples=400, seed=trial)
        independent += low <= 0 <= high
    assert 0.91 <= covered / 400 <= 0.98
    assert independent / 400 < 0.8, "the simulation must be one in which ignoring clusters fails"


def test_interval_equals_a_plain_loop() -> None:
    values, labels = clustered(np.random.default_rng(2), 7, 4)
    rng = np.random.default_rng(5)
    drawn = rng.integers(7, size=(50, 7))
    means = [np.concatenate([values[labels == cluster] for cluster in row]).mean() for row in drawn]
    expected = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose(cluster_bootstrap(values, labels, num_resamples=50, seed=5), expected)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = clustered(np.random.default_rng(3), 30, 3)
    whole = cluster_bootstrap(values, labels), paired_difference(values, values * 0.5, labels)
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    assert (cluster_bootstrap(values, labels), paired_difference(values, values * 0.5, labels)) == whole


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 4)), min_size=1, max_size=40), st.randoms())
def test_interval_moves_with_the_values_and_lies_within_them(pairs: list[tuple[int, int]], random: object) -> None:
    values, labels = [float(value) for value, _ in pairs], [f"image {label}" for _, label in pairs]
    low, high = cluster_bootstrap(values, labels, num_resamples=200)
    assert min(values) <= low <= high <= max(values)
    shifted = cluster_bootstrap([100 + 10 * value for value in values], labels, num_resamples=200)
    np.testing.assert_allclose(shifted, (100 + 10 * low, 100 + 10 * high))


def test_a_test_at_5_percent_errs_5_times_in_100_and_finds_what_is_there() -> None:
    rng = np.random.default_rng(4)
    errors = found = 0
    for trial in range(300):
        values, labels = clustered(rng, 40, 5)
        errors += paired_difference(values, np.zeros_like(values), labels, num_resamples=199, seed=trial).p_value <= 0.05
        found += paired_difference(values + 1, np.zeros_like(values), labels, num_resamples=199, seed=trial).p_value <= 0.05
    assert 0.02 <= errors / 300 <= 0.09
    assert found / 300 > 0.95


def test_difference_turns_sign_with_the_sides_and_equals_by_itself() -> None:
    rng = np.random.default_rng(6)
    a, labels = clustered(rng, 25, 4)
    b = a + rng.normal(0.3, 1, size=len(a))
    ab, ba = paired_difference(a, b, labels), paired_difference(b, a, labels)
    assert ab.difference == pytest.approx(a.mean() - b.mean()) and ab.difference == -ba.difference
    assert ab.p_value == ba.p_value and ab.low < ab.difference < ab.high
    assert (ab.n, ab.num_clusters) == (len(a), 25)
    same = paired_difference(a, a, labels)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_plain_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for i, (p, q) in enumerate(zip(p_values, adjusted, strict=True)):
        assert p <= q <= min(1, p * len(p_values)) + 1e-12
        assert all(q <= other for j, other in enumerate(adjusted) if p_values[j] > p_values[i])


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], []), ([1.0, 2.0], ["a"])])
def test_wrong_lengths(values: list[float], clusters: list[str]) -> None:
    with pytest.raises(ValueError, match="values in"):
        cluster_bootstrap(values, clusters)


def test_unpaired_and_impossible_input() -> None:
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([1.0], [1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match=r"1\.5 is not a p-value"):
        holm([0.1, 1.5])
