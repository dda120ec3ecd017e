"""The losses of PPO, each a sum over tokens so that micro-batches weigh every token the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped objective, as a loss.

    Args:
        log_probs: `(samples, tokens)` under the policy that learns.
        old_log_probs: The same under the policy that wrote the responses.
        advantages: `(samples, tokens)`.
        mask: `(samples, tokens)` true for a response's tokens.
        clip: How far the ratio of probabilities may pay off.

    Returns:
        The loss and the number of tokens whose gradient the clip cut, both sums over the mask.

    Source: Schulman et al., arXiv:1707.06347, equation 7.
    """
    ratio = torch.exp((log_probs - old_log_probs) * mask)
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -(torch.minimum(free, clipped) * mask).sum(), ((clipped < free) & mask.bool()).sum()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """Half the squared error of a critic, the worse of as it is and as it would be if it had moved no further than `clip`.

    Args:
        values, old_values, returns: `(samples, tokens)`.
        mask: `(samples, tokens)` true for a response's tokens.

    Returns:
        Sum over the mask.

    Source: `ppo2` of OpenAI Baselines.
    """
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    worse = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * (worse * mask).sum()


def chosen_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token written, float32.

    Args:
        logits: `(samples, tokens, vocabulary)`, divided by the temperature.
        tokens: `(samples, tokens)`.
    """
    return -cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view(
        tokens.shape
    )


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    """Entropy of each token's distribution in nats, `(samples, tokens)`; arguments as of `chosen_log_probs`."""
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
