"""The optimizer: one group for each part, and the learning rate over time."""

from __future__ import annotations

import math

import torch

from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import part_parameters
from mipha.recipe import PARTS, StageRecipe


def make_optimizer(model: LlavaForConditionalGeneration, stage: StageRecipe) -> torch.optim.AdamW:
    """AdamW with a parameter group for each trained part, at that part's own learning rate."""
    groups = []
    for part in PARTS:
        trained = [
            parameter
            for parameter in part_parameters(model, part).values()
            if parameter.requires_grad
        ]
        if trained:
            peak = stage.peak_learning_rate(part)
            groups.append({"params": trained, "lr": peak, "peak": peak, "part": part})
    return torch.optim.AdamW(
        groups,
        betas=stage.adam_betas,
        eps=stage.adam_eps,
        weight_decay=stage.weight_decay,
        fused=True,
    )


def schedule(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step: linear warmup, then a cosine to zero.

    Args:
        step: 0 is the first.
    """
    warmup = math.ceil(num_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def set_learning_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Put every group at this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
