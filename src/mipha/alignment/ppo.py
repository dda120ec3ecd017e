"""The formulas of PPO and PPO-Lagrangian: token rewards, advantages, losses and the multiplier.

    scores, KL --token_rewards--> rewards --generalized_advantages--> advantages, returns
    advantages of reward and cost, Multiplier --combined_advantages--> one advantage a token
    advantages --policy_loss--> the policy's loss
    returns --value_loss--> a critic's loss

Every tensor is `(samples, tokens)` unless its line says otherwise. `mask` is true for a response's
tokens, including the one that ends its turn; every row begins with one. Losses are sums over
tokens, so micro-batches weigh every token the same.

Source: Safe RLHF, arXiv:2310.12773; without costs it is PPO with a reward model, arXiv:2203.02155.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def chosen_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of each token, float32.

    Args:
        logits: Scores `(samples, tokens, vocabulary)`, divided by the temperature.
        tokens: Ids of the tokens that were written.
    """
    flat = logits.float().flatten(0, 1)  # (samples * tokens, vocabulary)
    return -cross_entropy(flat, tokens.flatten(), reduction="none").view(tokens.shape)


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each token's distribution in nats.

    Args:
        logits: Scores `(samples, tokens, vocabulary)`, divided by the temperature.
    """
    log_probs = logits.float().log_softmax(-1)  # (samples, tokens, vocabulary)
    return -(log_probs.exp() * log_probs).sum(-1)  # (samples, tokens)


def token_rewards(
    scores: Tensor, log_ratio: Tensor, mask: Tensor, kl_weight: float, score_clip: float
) -> Tensor:
    """Return the reward of each token: half of the KL penalty, and the score at the last token.

    For costs, pass `-kl_weight`. Leaving the reference then raises the cost by as much as it lowers
    the reward, and `(rewards - multiplier * costs) / (1 + multiplier)` holds `kl_weight / 2` of the
    penalty for every multiplier.

    Args:
        scores: Score of each response, `(samples,)`.
        log_ratio: Log-probability under the policy minus that under the reference.
        mask: True for a response's tokens.
        kl_weight: Weight of the KL penalty, beta.
        score_clip: Largest absolute value of a score.

    Returns:
        Rewards, zero outside the mask.

    Source: Safe RLHF, arXiv:2310.12773, appendix on the token-wise rewards and costs.
    """
    rewards = -0.5 * kl_weight * log_ratio * mask  # (samples, tokens)
    last = mask.sum(1) - 1  # (samples,) column of each response's last token
    rewards[torch.arange(len(scores)), last] += scores.clamp(-score_clip, score_clip)
    return rewards


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return generalized advantage estimates.

    After a response's last token nothing is earned, whether it ended its turn or was cut off.

    Args:
        rewards: Reward of each token.
        values: Values that the critic gave before each token was written.
        mask: True for a response's tokens.
        gamma: Discount.
        lam: Weight of longer sums; 1: the whole rest of the response, 0: one token.

    Returns:
        Advantages, and the returns that the critic should have predicted; zero outside the mask.

    Source: Schulman et al., arXiv:1506.02438, equation 16.
    """
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(values)
    zero = torch.zeros_like(values[:, 0])  # (samples,)

    # Walk from the last token to the first, and carry the discounted sum of what follows.
    following = zero
    for token in reversed(range(values.shape[1])):
        next_value = values[:, token + 1] if token + 1 < values.shape[1] else zero
        error = rewards[:, token] + gamma * next_value - values[:, token]  # (samples,)
        following = (error + gamma * lam * following) * mask[:, token]
        advantages[:, token] = following
    return advantages, advantages + values


def combined_advantages(
    reward_advantages: Tensor, cost_advantages: Tensor | None, multiplier: float
) -> Tensor:
    """Return one advantage for both aims: `(A_reward - multiplier * A_cost) / (1 + multiplier)`.

    Without costs it is the reward's own.

    Source: Safe RLHF, arXiv:2310.12773.
    """
    if cost_advantages is None:
        assert multiplier == 0.0, "a multiplier without costs"
        return reward_advantages
    return (reward_advantages - multiplier * cost_advantages) / (1.0 + multiplier)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped objective as a loss.

    Args:
        log_probs: Log-probabilities under the policy that learns.
        old_log_probs: Log-probabilities under the policy that wrote the responses.
        advantages: Advantage of each token.
        mask: True for a response's tokens.
        clip: Distance from 1 up to which the ratio of probabilities pays off.

    Returns:
        The loss, and the number of tokens whose gradient the clip removed; both sums over the mask.

    Source: Schulman et al., arXiv:1707.06347, equation 7.
    """
    ratio = torch.exp((log_probs - old_log_probs) * mask)
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages

    loss = -(torch.minimum(free, clipped) * mask).sum()  # ()
    num_clipped = ((clipped < free) & mask.bool()).sum()  # ()
    return loss, num_clipped


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """Return half the squared error of a critic's values, clipped.

    The error counts as it is, or as if the value had moved by at most `clip`, whichever is larger.

    Args:
        values: Values of the critic that learns.
        old_values: Values of the critic when the responses were written.
        returns: Values that it should predict.
        mask: True for a response's tokens.
        clip: Largest move of a value that pays off.

    Returns:
        Sum over the mask.

    Source: `ppo2` of OpenAI Baselines.
    """
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    larger = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * (larger * mask).sum()  # ()


class Multiplier:
    """Lambda, the price of cost: it grows while the mean cost is above its threshold.

    Gradient ascent on the logarithm: `ln l <- ln l + rate * l * (mean cost - threshold)`. Zero is a
    fixed point: costs then have no price and never get one.

    Args:
        initial: Value at the start.
        learning_rate: Rate of the ascent.
        maximum: Largest value.
        threshold: Mean cost at which lambda stays as it is.
        window: Number of latest episodes in the mean.
        delay: Number of steps before lambda first moves.

    Source: Dai et al. 2023, "Safe RLHF", arXiv:2310.12773; the logarithm is that of its released
    program.
    """

    def __init__(
        self,
        initial: float = 0.0,
        learning_rate: float = 0.1,
        maximum: float = 5.0,
        threshold: float = 0.0,
        window: int = 128,
        delay: int = 0,
    ) -> None:
        self._log = math.log(initial) if initial > 0 else -math.inf
        self._learning_rate = learning_rate
        self._log_maximum = math.log(maximum)
        self._threshold = threshold
        self._delay = delay
        self._costs: deque[float] = deque(maxlen=window)

    @property
    def value(self) -> float:
        """The current lambda."""
        return math.exp(self._log)

    @property
    def mean_cost(self) -> float:
        """Mean cost of the episodes in the window."""
        return math.fsum(self._costs) / len(self._costs)

    def update(self, step: int, costs: Iterable[float]) -> float:
        """Add the costs of a step's episodes to the window, and move lambda.

        Args:
            step: Number of the step, from 1; up to `delay` lambda stays as it is.
            costs: Cost of each episode.

        Returns:
            The new lambda.
        """
        self._costs.extend(costs)
        if step > self._delay and self.value > 0:
            excess = self.mean_cost - self._threshold
            moved = self._log + self._learning_rate * self.value * excess
            self._log = min(moved, self._log_maximum)
        return self.value

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs; it fits JSON."""
        return {"multiplier_log": self._log if self.value > 0 else None, "costs": list(self._costs)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._log = -math.inf if state["multiplier_log"] is None else state["multiplier_log"]
        self._costs.clear()
        self._costs.extend(state["costs"])
