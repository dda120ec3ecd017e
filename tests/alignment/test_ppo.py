"""The formulas of PPO and PPO-Lagrangian, against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mipha.alignment.ppo import (
    Multiplier,
    chosen_log_probs,
    combined_advantages,
    entropy,
    generalized_advantages,
    policy_loss,
    token_rewards,
    value_loss,
)

ONE = torch.ones(1, 1)


def test_generalized_advantages_of_a_hand_worked_example() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [1.0, 4.0, 9.0]])
    values = torch.tensor([[0.5, 1.0, 1.5], [2.0, 1.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    # errors of row 1: 1 + .5*1 - .5 = 1;  0 + .5*1.5 - 1 = -.25;  2 - 1.5 = .5
    # from the end, each plus a quarter of the next: .5;  -.25 + .125 = -.125;  1 - .03125 = .96875
    # row 2 ends after two tokens, and what follows does not count:
    # 4 - 1 = 3;  1 + .5*1 - 2 = -.5, plus a quarter of 3
    assert advantages.tolist() == [[0.96875, -0.125, 0.5], [0.25, 3.0, 0.0]]
    assert returns.tolist() == [[1.46875, 0.875, 2.0], [2.25, 4.0, 0.0]]


def test_scores_are_earned_at_the_last_token_and_cut() -> None:
    mask = torch.tensor([[True, False, False], [True, True, True], [True, True, False]])
    rewards = token_rewards(
        torch.tensor([3.0, 80.0, -80.0]), torch.zeros(3, 3), mask, kl_weight=0.1, score_clip=50.0
    )
    assert rewards.tolist() == [[3.0, 0.0, 0.0], [0.0, 0.0, 50.0], [0.0, -50.0, 0.0]]


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 1.0, 20.0])
def test_half_of_the_kl_weight_acts_whatever_the_multiplier(multiplier: float) -> None:
    log_ratio, mask = torch.tensor([[0.2, -0.4, 9.0]]), torch.tensor([[True, True, False]])
    reward = token_rewards(torch.zeros(1), log_ratio, mask, 0.1, 50.0)
    cost = token_rewards(torch.zeros(1), log_ratio, mask, -0.1, 50.0)
    both = combined_advantages(reward, cost, multiplier)
    torch.testing.assert_close(both, torch.tensor([[-0.01, 0.02, 0.0]]))


def test_combination_weighs_reward_against_cost() -> None:
    reward, cost = torch.tensor([[4.0]]), torch.tensor([[1.0]])
    assert combined_advantages(reward, cost, 3.0).item() == (4.0 - 3.0) / 4.0
    assert combined_advantages(reward, None, 0.0) is reward


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "cut"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.5, 2.0, -2.4, 1),
        (1.5, -2.0, 3.0, 0),
        (0.5, -2.0, 1.6, 1),
        (0.5, 2.0, -1.0, 0),
    ],
)
def test_the_ratio_pays_off_only_inside_the_clip(
    ratio: float, advantage: float, loss: float, cut: int
) -> None:
    log_probs = torch.full((1, 1), math.log(ratio), requires_grad=True)
    got, num_cut = policy_loss(log_probs, torch.zeros(1, 1), ONE * advantage, ONE.bool(), clip=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert num_cut.item() == cut
    assert (log_probs.grad.item() == 0) == bool(cut)


def test_what_is_masked_counts_nowhere() -> None:
    log_probs = torch.tensor([[0.0, 500.0]], requires_grad=True)
    loss, _ = policy_loss(
        log_probs, torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[True, False]]), clip=0.2
    )
    loss.backward()
    assert loss.item() == -1.0
    assert log_probs.grad.tolist() == [[-1.0, 0.0]]
    assert (
        value_loss(
            torch.ones(1, 2),
            torch.ones(1, 2),
            torch.tensor([[3.0, 9.0]]),
            torch.tensor([[True, False]]),
            5.0,
        ).item()
        == 2.0
    )


def test_a_critic_gains_nothing_beyond_its_clip() -> None:
    values = torch.tensor([[4.0]], requires_grad=True)
    loss = value_loss(
        values, torch.zeros(1, 1), torch.full((1, 1), 5.0), ONE.bool(), clip=2.0
    )  # near: 2, error 3; free: error 1
    loss.backward()
    assert loss.item() == 4.5
    assert values.grad.item() == 0.0


def test_log_probs_and_entropy_of_a_known_distribution() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(1, 2, 3)
    torch.testing.assert_close(
        chosen_log_probs(logits, torch.tensor([[0, 2]])).exp(), torch.tensor([[0.5, 0.25]])
    )
    torch.testing.assert_close(entropy(logits), torch.full((1, 2), 1.5 * math.log(2)))


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


def test_entropy_is_that_of_each_token() -> None:
    logits = torch.zeros(2, 3, 8)
    logits[0, 1, 5] = 100.0  # certain
    found = entropy(logits)
    assert found.shape == (2, 3)
    assert found[0, 1].item() == pytest.approx(0, abs=1e-6)
    assert found[1].tolist() == pytest.approx([math.log(8)] * 3)
