"""From scores of whole responses to an advantage for every token."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(
    scores: Tensor, log_ratio: Tensor, mask: Tensor, kl_weight: float, score_clip: float
) -> Tensor:
    """What each token earns: half the price of leaving the reference, and at the response's last token the score.

    For costs, give `-kl_weight`: leaving the reference then costs as much as it takes from the reward, and
    `(rewards - multiplier * costs) / (1 + multiplier)` holds `kl_weight / 2` of it whatever the multiplier is.

    Args:
        scores: `(samples,)`.
        log_ratio: `(samples, tokens)` log-probability under the policy minus that under the reference.
        mask: `(samples, tokens)` true for a response's tokens, the one that ends its turn included; each row begins with one.
        kl_weight: Beta.
        score_clip: Scores are cut to plus or minus this.

    Returns:
        `(samples, tokens)`; zero outside the mask.

    Source: Safe RLHF, arXiv:2310.12773, appendix on the token-wise rewards and costs.
    """
    rewards = -0.5 * kl_weight * log_ratio * mask
    last = mask.sum(1) - 1
    rewards[torch.arange(len(scores)), last] += scores.clamp(-score_clip, score_clip)
    return rewards


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation; behind a response's last token nothing is earned, ended or cut off alike.

    Args:
        rewards: `(samples, tokens)`.
        values: `(samples, tokens)` of the critic, before each token is written.
        mask: `(samples, tokens)` as of `token_rewards`.
        gamma: Discount.
        lam: Weight of longer sums; 1: the whole rest of the response, 0: one token.

    Returns:
        Advantages and returns (what the critic should have said), both `(samples, tokens)` and zero outside the mask.

    Source: Schulman et al., arXiv:1506.02438, equation 16.
    """
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    for token in reversed(range(values.shape[1])):
        next_value = (
            values[:, token + 1] if token + 1 < values.shape[1] else torch.zeros_like(following)
        )
        surprise = rewards[:, token] + gamma * next_value - values[:, token]
        following = (surprise + gamma * lam * following) * mask[:, token]
        advantages[:, token] = following
    return advantages, advantages + values


def combined_advantages(
    reward_advantages: Tensor, cost_advantages: Tensor | None, multiplier: float
) -> Tensor:
    """One advantage for both aims: `(A_reward - multiplier * A_cost) / (1 + multiplier)`; without costs, the reward's own.

    Source: Safe RLHF, arXiv:2310.12773.
    """
    if cost_advantages is None:
        assert multiplier == 0.0, "a multiplier without costs"
        return reward_advantages
    return (reward_advantages - multiplier * cost_advantages) / (1.0 + multiplier)
