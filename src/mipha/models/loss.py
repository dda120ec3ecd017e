"""Cross entropy over the supervised positions only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Label of a position that is not trained on."""

CHUNK = 1024
"""Positions whose logits exist at one time: 1,024 x 51,200 float32 is 0.2 GB."""


def supervised_cross_entropy(
    hidden: Tensor, labels: Tensor, lm_head: nn.Module
) -> tuple[Tensor, Tensor]:
    """Next-token loss without the logits of unsupervised positions.

    Most positions are image or prompt, and a row of logits is 51,200 numbers for Phi-2: leaving them out is exact and
    removes most of the head's work. Chunks are recomputed in the backward pass, so peak memory does not grow with length.

    Args:
        hidden: Last hidden states, `(rows, tokens, width)`.
        labels: Token ids, `IGNORE` where not trained on, `(rows, tokens)`; not shifted.
        lm_head: `(positions, width)` -> `(positions, vocabulary)`.

    Returns:
        The summed loss (float32, nats) and the number of supervised tokens. The sum is 0, with a graph, when there are none,
        so that a step of sharded training has the same shape on every process.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE
    hidden, targets = hidden[:, :-1][supervised], targets[supervised]
    if not len(targets):
        return lm_head(
            hidden.new_zeros(1, hidden.shape[-1])
        ).float().sum() * 0.0 + hidden.float().sum() * 0.0, supervised.sum()
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, ids in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(_chunk_loss, rows, ids, lm_head, use_reentrant=False)
    return total, supervised.sum()


def _chunk_loss(hidden: Tensor, targets: Tensor, lm_head: nn.Module) -> Tensor:
    return F.cross_entropy(lm_head(hidden).float(), targets, reduction="sum")
