"""The losses of PPO, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mipha.alignment.ppo import chosen_log_probs, entropy, policy_loss, value_loss

ONE = torch.ones(1, 1)


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
