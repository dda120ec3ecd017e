from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipha.comparison import statistics
from mipha.comparison.statistics import (
    PairedDifference,
    Tally,
    Totals,
    holm,
    intervals,
    paired_differences,
    ratio,
    read_tally,
    seed_difference,
    t_quantile,
    t_test,
    tally,
    values,
)


def mean(totals: Totals) -> dict[str, np.ndarray]:
    return {"mean": totals.mean("value")}


def tally_of(numbers: Sequence[float], clusters: Sequence[Hashable]) -> Tally:
    return tally(
        (cluster, {"value": number}) for number, cluster in zip(numbers, clusters, strict=True)
    )


def cluster_bootstrap(
    numbers: Sequence[float], clusters: Sequence[Hashable], **options: int
) -> tuple[float, float]:
    return intervals(tally_of(numbers, clusters), mean, **options)["mean"]


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], **options: int
) -> PairedDifference:
    return paired_differences(tally_of(a, clusters), tally_of(b, clusters), mean, **options)["mean"]


def clustered(
    rng: np.random.Generator, num_clusters: int, per_cluster: int, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
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
    np.testing.assert_allclose(
        cluster_bootstrap(values, labels, num_resamples=50, seed=5), expected
    )


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = clustered(np.random.default_rng(3), 30, 3)
    whole = cluster_bootstrap(values, labels), paired_difference(values, values * 0.5, labels)
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    assert (
        cluster_bootstrap(values, labels),
        paired_difference(values, values * 0.5, labels),
    ) == whole


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 4)), min_size=1, max_size=40),
    st.randoms(),
)
def test_interval_moves_with_the_values_and_lies_within_them(
    pairs: list[tuple[int, int]], random: object
) -> None:
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
        errors += (
            paired_difference(
                values, np.zeros_like(values), labels, num_resamples=199, seed=trial
            ).p_value
            <= 0.05
        )
        found += (
            paired_difference(
                values + 1, np.zeros_like(values), labels, num_resamples=199, seed=trial
            ).p_value
            <= 0.05
        )
    assert 0.02 <= errors / 300 <= 0.09
    assert found / 300 > 0.95


def test_difference_turns_sign_with_the_sides_and_equals_by_itself() -> None:
    rng = np.random.default_rng(6)
    a, labels = clustered(rng, 25, 4)
    b = a + rng.normal(0.3, 1, size=len(a))
    ab, ba = paired_difference(a, b, labels), paired_difference(b, a, labels)
    assert ab.difference == pytest.approx(a.mean() - b.mean()) and ab.difference == -ba.difference
    assert ab.p_value == ba.p_value and ab.low < ab.difference < ab.high
    assert ab.num_clusters == 25
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


def f1(totals: Totals) -> dict[str, np.ndarray]:
    precision = ratio(totals.sum("hit"), totals.sum("said"))
    recall = ratio(totals.sum("hit"), totals.sum("true"))
    return {
        "f1": 100 * ratio(2 * precision * recall, precision + recall),
        "precision": 100 * precision,
    }


def answers(said: np.ndarray, true: np.ndarray, clusters: np.ndarray) -> Tally:
    return tally(
        (cluster, {"hit": float(s and t), "said": float(s), "true": float(t)})
        for s, t, cluster in zip(said, true, clusters, strict=True)
    )


def test_a_metric_that_is_no_mean_has_a_value_an_interval_and_a_test() -> None:
    rng = np.random.default_rng(7)
    true, clusters = rng.random(600) < 0.5, np.arange(600) // 6
    good, bad = true ^ (rng.random(600) < 0.1), true ^ (rng.random(600) < 0.3)
    better, worse = answers(good, true, clusters), answers(bad, true, clusters)
    hits = (good & true).sum()
    expected = 100 * 2 * hits / (good.sum() + true.sum())
    assert values(better, f1)["f1"] == pytest.approx(expected)
    low, high = intervals(better, f1)["f1"]
    assert expected - 6 < low < expected < high < expected + 6
    found = paired_differences(better, worse, f1)
    assert list(found) == ["f1", "precision"]
    assert (
        found["f1"].difference == pytest.approx(expected - values(worse, f1)["f1"])
        and found["f1"].p_value < 0.01
    )
    assert found["f1"].low < found["f1"].difference < found["f1"].high


def test_what_is_undefined_is_not_a_number_and_is_not_compared() -> None:
    clusters = np.arange(40)
    silent = answers(np.zeros(40, bool), np.ones(40, bool), clusters)
    speaking = answers(np.ones(40, bool), np.ones(40, bool), clusters)
    assert np.isnan(values(silent, f1)["f1"]) and np.isnan(intervals(silent, f1)["f1"]).all()
    assert paired_differences(speaking, silent, f1) == {}
    rarely = answers(clusters == 0, np.ones(40, bool), clusters)
    assert intervals(rarely, f1)["precision"] == (100, 100), (
        "resamples without the one answer do not count"
    )


def test_a_tally_is_kept_whole_in_a_file_and_compared_in_any_order() -> None:
    rng = np.random.default_rng(8)
    said, true, clusters = (
        rng.random(90) < 0.5,
        rng.random(90) < 0.5,
        np.array([f"image {i % 9}" for i in range(90)]),
    )
    whole = answers(said, true, clusters)
    again = read_tally(json.loads(json.dumps(whole.as_json())))
    assert (again.clusters, again.names) == (whole.clusters, whole.names)
    np.testing.assert_array_equal([again.sums, again.counts], [whole.sums, whole.counts])
    turned = answers(said[::-1], true[::-1], clusters[::-1])
    other = answers(~said, true, clusters)
    assert paired_differences(whole, turned, f1)["f1"].difference == pytest.approx(0)
    assert paired_differences(turned, other, f1)["f1"].difference == pytest.approx(
        paired_differences(whole, other, f1)["f1"].difference
    )


def test_tallies_with_their_metrics_in_another_order_are_compared_by_name() -> None:
    rng = np.random.default_rng(9)

    def both(totals: Totals) -> dict[str, np.ndarray]:
        return {name: totals.mean(name) for name in ("easy", "hard")}

    rows = [
        (image, {"easy": rng.random() + 0.2 * side, "hard": rng.random()})
        for side in (0, 1)
        for image in range(12)
    ]
    one, other = tally(rows[:12]), tally(rows[12:])
    turned = tally([(image, dict(reversed(found.items()))) for image, found in rows[12:]])
    assert turned.names == other.names[::-1]
    assert paired_differences(one, turned, both) == paired_differences(one, other, both)


def test_a_name_that_few_contribute_to_is_averaged_over_those() -> None:
    data = tally(
        [("a", {"all": 1.0, "rare": 0.5}), ("b", {"all": 0.0}), ("b", {"all": 0.0, "rare": 1.0})]
    )
    totals = data.totals()
    assert (float(totals.mean("all")), float(totals.mean("rare")), float(totals.count("rare"))) == (
        pytest.approx(1 / 3),
        0.75,
        2,
    )
    assert float(totals.sum("absent")) == 0 and np.isnan(totals.mean("absent"))
    assert np.isnan(
        intervals(data, lambda totals: {"absent": totals.mean("absent")})["absent"]
    ).all()


def test_nothing_unpaired_and_impossible_input() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        tally([])
    for clusters, name in ((["a", "b"], "value"), (["a", "a"], "other")):
        with pytest.raises(ValueError, match="same questions"):
            paired_differences(
                tally_of([1.0, 2.0], ["a", "a"]),
                tally([(cluster, {name: 1.0}) for cluster in clusters]),
                mean,
            )
    with pytest.raises(ValueError, match=r"1\.5 is not a p-value"):
        holm([0.1, 1.5])


# Two recipes over their seeds: a difference is found where there is one, and as often as promised
# where there is none.


def accuracy(totals: Totals) -> Mapping[str, np.ndarray]:
    return {"accuracy": 100 * totals.mean("right")}


def train_once(
    rng: np.random.Generator, ease: np.ndarray, shift: float, seeds_spread: float
) -> Tally:
    """One trained model: right with the ease of an image, moved by the recipe and the seed."""
    chance = np.clip(ease + shift + rng.normal(0, seeds_spread), 0, 1)
    right = rng.random((4, len(ease))) < chance
    return tally(
        (image, {"right": float(answer)})
        for answers in right
        for image, answer in enumerate(answers)
    )


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [
        (2.776, 4, 0.05),
        (4.303, 2, 0.05),
        (1.962, 1000, 0.05),
        (12.706, 1, 0.05),
        (0.0, 5, 1.0),
        (-2.776, 4, 0.05),
        (8.610, 4, 0.001),
    ],
)
def test_students_t(t: float, freedom: float, p: float) -> None:
    """The tables of any textbook."""
    assert t_test(t, freedom) == pytest.approx(p, rel=2e-3)
    assert t_quantile(1 - p / 2, freedom) == pytest.approx(abs(t), rel=2e-3)


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_two_identical_recipes_differ_in_about_one_case_of_twenty(spread: float) -> None:
    rng = np.random.default_rng(0)
    ease = rng.uniform(0.4, 0.9, 60)
    found = 0
    for _ in range(300):
        a, b = ([train_once(rng, ease, 0.0, spread) for _ in range(3)] for _ in range(2))
        found += seed_difference(a, b, accuracy, "accuracy", 100).p_value < 0.05
    # Of 300, 5 % are 15, and by chance 1 in 1,600 times fewer than 2 or more than 28. With n = 3
    # Welch's test is a little careful.
    assert 2 <= found <= 28


def test_a_planted_effect_is_found() -> None:
    rng = np.random.default_rng(1)
    ease = rng.uniform(0.5, 0.9, 60)
    worse = [train_once(rng, ease, -0.3, 0.02) for _ in range(3)]
    found = seed_difference(
        [train_once(rng, ease, 0.0, 0.02) for _ in range(3)], worse, accuracy, "accuracy"
    )
    assert found.p_value < 0.01 and found.low > 15 and found.high < 45
    assert found.low < found.difference < found.high and found.num_runs == (3, 3)
    back = seed_difference(
        worse, [train_once(rng, ease, 0.0, 0.02) for _ in range(3)], accuracy, "accuracy"
    )
    assert back.difference < 0


def test_one_run_each_has_a_difference_and_no_p_value() -> None:
    rng = np.random.default_rng(2)
    one, other = (train_once(rng, np.full(10, 0.7), shift, 0.0) for shift in (0.0, -0.5))
    found = seed_difference([one], [other, other], accuracy, "accuracy")
    assert found.difference > 0 and np.isnan(found.p_value) and np.isnan(found.low)


def test_runs_that_all_score_the_same_do_not_differ() -> None:
    same = tally((image, {"right": 1.0}) for image in range(5))
    found = seed_difference([same, same], [same, same], accuracy, "accuracy")
    assert (found.difference, found.p_value) == (0.0, 1.0)


def test_other_questions_are_refused() -> None:
    one, other = tally([(0, {"right": 1.0})]), tally([(1, {"right": 1.0})])
    with pytest.raises(ValueError, match="not asked the same questions"):
        seed_difference([one, one], [other, other], accuracy, "accuracy")
