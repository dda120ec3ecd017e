"""The price of cost."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipha.alignment.lagrangian import Multiplier


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.floats(-1, 1), st.floats(0.1, 4))
def test_it_grows_exactly_when_the_mean_cost_of_the_window_is_above_the_threshold(
    costs: list[float], threshold: float, initial: float
) -> None:
    multiplier = Multiplier(
        initial, learning_rate=0.005, threshold=threshold, maximum=1e9, window=4
    )
    for step, cost in enumerate(costs, start=1):
        window = costs[max(0, step - 4) : step]
        excess = math.fsum(window) / len(window) - threshold
        before = multiplier.value
        after = multiplier.update(step, [cost])
        if abs(excess) > 1e-9:
            assert (after > before) == (excess > 0)
            assert (after < before) == (excess < 0)


def test_a_step_in_the_logarithm() -> None:
    multiplier = Multiplier(2.0, learning_rate=0.1, maximum=5.0, threshold=-0.5)
    assert multiplier.update(1, [1.0, 2.0]) == pytest.approx(
        2.0 * math.exp(0.1 * 2.0 * (1.5 + 0.5))
    )


def test_it_waits_stays_in_bounds_and_never_leaves_zero() -> None:
    waiting = Multiplier(1.0, delay=2)
    assert [waiting.update(step, [3.0]) for step in (1, 2)] == [1.0, 1.0]
    assert waiting.update(3, []) > 1.0
    bounded = Multiplier(4.0, maximum=5.0)
    assert bounded.update(1, [100.0]) == pytest.approx(5.0)
    assert Multiplier(0.0).update(1, [100.0]) == 0.0


@pytest.mark.parametrize("initial", [0.0, 0.7])
def test_its_state_goes_through_json_exactly(initial: float) -> None:
    one, other = Multiplier(initial, window=3), Multiplier(1.0, window=3)
    one.update(1, [0.1, 0.2, 0.3, 0.7])
    other.load_state(json.loads(json.dumps(one.state())))
    assert [one.update(step, [0.3]) for step in (2, 3)] == [
        other.update(step, [0.3]) for step in (2, 3)
    ]
