"""Attention of training rows, sample by sample: nothing is computed for pairs of tokens that never see one another.

A row is groups one behind another; a group is a prefix and its branches (`data/packing.py`). With a mask, the host computes all pairs of
the row. And on a CPU its fused kernel is slow in bfloat16: of a layer of SmolLM2-135M (rows of 12 samples of 170 tokens, one thread of an
EPYC with AVX-512 BF16, forward and backward) the matrices take 125 ms, attention through a dense mask 390, through the fused kernel sample
by sample 75, and through two plain products with a softmax between them 19. These keep the attention weights for the backward pass, so that
long samples go through the fused kernel after all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mipha.models.attention import grouped_sdpa

NAME = "packed_sdpa"

CHUNK = 256
"""Tokens of branches that look back on their prefix together: what they waste on one another stays small."""

MOST_WEIGHTS = 2**23
"""Attention weights of one product that are kept for the backward pass: 16 MB in bfloat16, times the layers."""

Group = tuple[int, tuple[int, ...]]
"""The row, and the tokens of the prefix and of each branch; a sample by itself is a prefix."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each group, where the mask is `spans_as_mask`; else `grouped_sdpa`.

    Args:
        query: `(rows, heads, tokens, head_dim)`.
        key: `(rows, shared heads, tokens, head_dim)`.
        value: As `key`.
        attention_mask: `(1, 1, spans, 3)`, integers, or what `grouped_sdpa` takes.

    Returns:
        `(rows, tokens, heads, head_dim)`, and no weights; zeros behind a row's last group, where its padding is.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return grouped_sdpa(module, query, key, value, attention_mask, dropout, scaling, **options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows: list[list[Tensor]] = [[] for _ in query]
    starts = [0] * len(query)
    for row, lengths in groups_of(attention_mask[0, 0]):
        start, tokens = starts[row], sum(lengths)
        own = (tensor[row].narrow(1, start, tokens) for tensor in (query, key, value))
        rows[row] += _group(*own, lengths, scaling, dropout)
        starts[row] = start + tokens
    for row, end in enumerate(starts):
        rows[row].append(query.new_zeros(query.shape[1], query.shape[2] - end, value.shape[-1]))
    return torch.stack([torch.cat(pieces, 1) for pieces in rows]).transpose(1, 2).contiguous(), None


def spans_as_mask(spans: Tensor) -> Tensor:
    """Spans in the shape of a mask.

    The host hands a mask of four axes to every layer as it is, in all families; other arguments, some (StableLM) drop without a word.
    """
    return spans.cpu()[None, None]


def groups_of(spans: Tensor) -> list[Group]:
    """Groups from `(spans, 3)`: the row, whether it is a branch of the group before it, and its tokens."""
    groups: list[tuple[int, list[int]]] = []
    for row, is_branch, tokens in spans.tolist():
        if is_branch:
            groups[-1][1].append(tokens)
        else:
            groups.append((row, [tokens]))
    return [(row, tuple(lengths)) for row, lengths in groups]


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let the language model of a LLaVA attend this way, if it attends by SDPA now."""
    if model.config.text_config._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": NAME})


def _group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scaling: float,
    dropout: float,
) -> list[Tensor]:
    """Outputs `(heads, tokens, head_dim)` of a group's prefix and branches, in their order."""
    prefix, *branches = lengths
    pieces = [
        _attend(
            query[:, :prefix], key[:, :prefix], value[:, :prefix], 0, (prefix,), scaling, dropout
        )
    ]
    start = prefix
    while branches:
        taken = [branches.pop(0)]
        while branches and sum(taken) + branches[0] <= CHUNK:
            taken.append(branches.pop(0))
        end = start + sum(taken)
        keys, values = (
            torch.cat([tensor[:, :prefix], tensor[:, start:end]], 1) for tensor in (key, value)
        )
        pieces.append(
            _attend(query[:, start:end], keys, values, prefix, tuple(taken), scaling, dropout)
        )
        start = end
    return pieces


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: int,
    own: tuple[int, ...],
    scaling: float,
    dropout: float,
) -> Tensor:
    """Queries that see the first `seen` keys, and each its own stretch of the others causally."""
    heads, queries, dim = query.shape
    shared = heads // key.shape[0]
    if query.device.type != "cpu" or heads * queries * key.shape[1] > MOST_WEIGHTS:
        mask = None if not seen else _visible(seen, own, query.device).repeat(shared, 1)
        options: dict[str, Any] = (
            {"is_causal": True, "enable_gqa": shared > 1} if mask is None else {"attn_mask": mask}
        )
        query = query if mask is None else query.reshape(key.shape[0], shared * queries, dim)
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], dropout_p=dropout, scale=scaling, **options
        )
        return out[0].reshape(heads, queries, value.shape[-1])
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    # Query heads that share a key head lie one behind another as more queries of one head.
    scores = torch.baddbmm(
        _bias(seen, own, shared, dtype),
        query.reshape(key.shape[0], shared * queries, dim),
        key.transpose(1, 2),
        alpha=scaling,
    )
    weights = F.dropout(torch.softmax(scores, -1), dropout, training=dropout > 0)
    return torch.bmm(weights, value).reshape(heads, queries, value.shape[-1])


def _visible(seen: int, own: tuple[int, ...], device: torch.device | str) -> Tensor:
    """`(queries, keys)`, boolean."""
    causal = torch.block_diag(
        *(torch.ones(tokens, tokens, device=device).tril() for tokens in own)
    ).bool()
    return torch.cat([causal.new_ones(len(causal), seen), causal], 1)


@lru_cache(maxsize=64)
def _bias(seen: int, own: tuple[int, ...], shared: int, dtype: torch.dtype) -> Tensor:
    """`(1, shared x queries, keys)`: 0 where seen; the same in all layers, and for many samples."""
    visible = _visible(seen, own, "cpu")
    return (
        torch.zeros(visible.shape, dtype=dtype)
        .masked_fill_(~visible, float("-inf"))
        .repeat(shared, 1)[None]
    )


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
