"""AdamW with a learning rate for each group of parameters, and the rate over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


class Group(NamedTuple):
    """Parameters that share a learning rate.

    Args:
        name: Name of the group, for metrics.
        parameters: Parameters that train.
        learning_rate: Peak of the learning rate.
    """

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float


def make_adamw(
    groups: Sequence[Group],
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: bool = False,
) -> torch.optim.AdamW:
    """Return AdamW over the groups; a group's name is its key `part`, its peak its key `peak`."""
    return torch.optim.AdamW(
        [
            {"params": group.parameters, "lr": group.learning_rate}
            | {"peak": group.learning_rate, "part": group.name}
            for group in groups
        ],
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        fused=fused or None,
    )


def warmup_cosine(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Return the share of the peak learning rate at a step: linear warmup, then cosine to zero.

    Args:
        step: Number of the step, from 0.
        warmup_ratio: Share of the steps that warm up, rounded up to a whole step.
    """
    warmup = math.ceil(num_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def set_learning_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group to this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
