"""A difference between recipes is found where there is one, and as often as promised where there is none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from mipha.comparison.seeds import seed_difference, t_test
from mipha.comparison.statistics import Tally, Totals, tally


def accuracy(totals: Totals) -> Mapping[str, np.ndarray]:
    return {"accuracy": 100 * totals.mean("right")}


def run(rng: np.random.Generator, ease: np.ndarray, shift: float, seeds_spread: float) -> Tally:
    """One trained model: every image's questions are right with its ease, moved by the recipe and by the seed."""
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


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_two_identical_recipes_differ_in_about_one_case_of_twenty(spread: float) -> None:
    rng = np.random.default_rng(0)
    ease = rng.uniform(0.4, 0.9, 60)
    found = 0
    for _ in range(300):
        a, b = ([run(rng, ease, 0.0, spread) for _ in range(3)] for _ in range(2))
        found += seed_difference(a, b, accuracy, "accuracy", 100).p_value < 0.05
    # Of 300, 5 % are 15, and by chance 1 in 1,000 times fewer than 4 or more than 28. (n = 3 makes Welch's test a little careful.)
    assert 2 <= found <= 28


def test_a_planted_effect_is_found() -> None:
    rng = np.random.default_rng(1)
    ease = rng.uniform(0.5, 0.9, 60)
    worse = [run(rng, ease, -0.3, 0.02) for _ in range(3)]
    found = seed_difference(
        [run(rng, ease, 0.0, 0.02) for _ in range(3)], worse, accuracy, "accuracy"
    )
    assert found.p_value < 0.01 and found.low > 15 and found.high < 45
    assert found.low < found.difference < found.high and found.num_runs == (3, 3)
    back = seed_difference(
        worse, [run(rng, ease, 0.0, 0.02) for _ in range(3)], accuracy, "accuracy"
    )
    assert back.difference < 0


def test_one_run_each_has_a_difference_and_no_p_value() -> None:
    rng = np.random.default_rng(2)
    one, other = (run(rng, np.full(10, 0.7), shift, 0.0) for shift in (0.0, -0.5))
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
