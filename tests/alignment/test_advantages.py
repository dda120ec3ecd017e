"""Token rewards, generalised advantages and their combination, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from mipha.alignment.advantages import combined_advantages, generalized_advantages, token_rewards


def test_generalized_advantages_of_a_hand_worked_example() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [1.0, 4.0, 9.0]])
    values = torch.tensor([[0.5, 1.0, 1.5], [2.0, 1.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    # surprises of row 1: 1 + .5*1 - .5 = 1;  0 + .5*1.5 - 1 = -.25;  2 - 1.5 = .5
    # and from behind, each a quarter of the next: .5;  -.25 + .125 = -.125;  1 - .03125 = .96875
    # row 2 ends after two tokens, whatever stands behind: 4 - 1 = 3;  1 + .5*1 - 2 = -.5, plus a quarter of 3
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
