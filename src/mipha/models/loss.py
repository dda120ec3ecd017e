"""Cross entropy over the supervised positions only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mipha.labels import IGNORE

CHUNK = 1024
"""Positions whose logits exist at one time: 1,024 x 51,200 float32 is 0.2 GB."""


def supervised_cross_entropy(
    hidden: Tensor, labels: Tensor, lm_head: nn.Module, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the next-token loss without making the logits of unsupervised positions.

    Most positions are image or prompt, and a row of logits is 51,200 numbers for Phi-2. Leaving
    them out is exact and removes most of the head's work. Chunks are recomputed in the backward
    pass, so that peak memory does not grow with length.

    Args:
        hidden: Last hidden states, `(rows, tokens, width)`.
        labels: Token ids, `IGNORE` where not trained on, `(rows, tokens)`; not shifted.
        lm_head: `(positions, width)` -> `(positions, vocabulary)`.
        positions: `(positions,)`, as `collate` finds them; None: they are searched, and the host
            waits for a GPU to find them.

    Returns:
        The summed loss (float32, nats) and the number of supervised tokens. Without any, the sum is
        0 with a graph, so that a step of sharded training has the same shape on every process.
    """
    # The state at a position predicts the token behind it, if that is of the same row.
    if positions is None:
        supervised = labels[:, 1:] != IGNORE  # (rows, tokens - 1)
        positions = F.pad(supervised, (0, 1)).flatten().nonzero().flatten()
    num_tokens = torch.tensor(len(positions))
    hidden = hidden.flatten(0, 1).index_select(0, positions)  # (positions, width)
    targets = labels.flatten().index_select(0, positions + 1)  # (positions,)

    if not len(targets):
        no_logits = lm_head(hidden.new_zeros(1, hidden.shape[-1]))  # (1, vocabulary)
        return no_logits.float().sum() * 0.0 + hidden.float().sum() * 0.0, num_tokens

    total = hidden.new_zeros((), dtype=torch.float32)
    for states, ids in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(_chunk_loss, states, ids, lm_head, use_reentrant=False)
    return total, num_tokens


def _chunk_loss(hidden: Tensor, targets: Tensor, lm_head: nn.Module) -> Tensor:
    logits = lm_head(hidden).float()  # (positions, vocabulary)
    return F.cross_entropy(logits, targets, reduction="sum")
