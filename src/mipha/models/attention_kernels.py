"""GPU kernels for packed rows: what flex and variable-length attention read, made from spans.

    spans --> describe_flex   --> BlockMask      128 x 128 blocks: none, some or all pairs attend
    spans --> describe_varlen --> VarlenRows     one sequence per prefix and per branch

Both compute only pairs that attend, in one kernel for the whole batch. A row's padding is a sample
of its own, so every query sees a key and its softmax is a number.

Flex computes forward on a CPU too (slowly, no backward); `varlen_attn` of torch needs CUDA and
bfloat16 or float16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

BLOCK = 128
"""Tokens of a block of flex's lists, queries as well as keys."""

Spans = Sequence[Sequence[tuple[bool, int]]]
"""For each row, its spans: whether they are a branch of the group before them, and their tokens."""


def describe_flex(spans: Spans, shape: Sequence[int], device: torch.device) -> BlockMask:
    """Return the block mask of some rows.

    `create_block_mask` tests every pair of tokens: a second for a row of 8,192. Counting pairs
    from the spans takes 10 ms, and gives the same lists.

    Args:
        spans: Spans of each row.
        shape: Shape of the batch, (rows, tokens).
        device: Device of the model.
    """
    num_tokens = shape[1]
    counts = np.stack([count_pairs(_padded(row, num_tokens), num_tokens) for row in spans])
    partial = (counts > 0) & (counts < BLOCK * BLOCK)  # (rows, query blocks, key blocks)
    lists = [
        torch.from_numpy(part[:, None]).to(device)
        for chosen in (partial, counts == BLOCK * BLOCK)
        for part in (
            chosen.sum(-1, dtype=np.int32),
            # The chosen blocks first, in reading order.
            np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32),
        )
    ]

    groups, branches = (part.to(device) for part in number_tokens(spans, num_tokens))

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_group = groups[row, query] == groups[row, key]
        in_sight = (branches[row, key] == 0) | (branches[row, query] == branches[row, key])
        return (query >= key) & same_group & in_sight

    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(num_tokens, num_tokens)
    )


def number_tokens(spans: Spans, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the group and the branch of each token, both `(rows, tokens)` int32.

    Branch 0 is the prefix. The padding of a row is a group of its own.
    """
    group = np.empty((len(spans), num_tokens), dtype=np.int32)
    branch = np.empty((len(spans), num_tokens), dtype=np.int32)
    for row, own in enumerate(spans):
        start, in_group, in_branch = 0, -1, 0
        for is_branch, tokens in _padded(own, num_tokens):
            in_group, in_branch = (in_group, in_branch + 1) if is_branch else (in_group + 1, 0)
            group[row, start : start + tokens] = in_group
            branch[row, start : start + tokens] = in_branch
            start += tokens
    return torch.from_numpy(group), torch.from_numpy(branch)


def count_pairs(spans: Sequence[tuple[bool, int]], num_tokens: int) -> np.ndarray:
    """Return `(query blocks, key blocks)` int64: how many pairs of each two blocks attend.

    Args:
        spans: Spans of one row, padding included.
        num_tokens: Tokens of the row.
    """
    num_blocks = -(-num_tokens // BLOCK)
    counts = np.zeros((num_blocks, num_blocks), dtype=np.int64)
    start = prefix_start = prefix = 0
    for is_branch, tokens in spans:
        if not is_branch:
            prefix_start, prefix = start, tokens
        first, own = _overlaps(start, tokens)
        here = slice(first, first + len(own))

        # A branch sees all of its prefix; a stretch sees itself up to each token.
        if is_branch:
            before, of_prefix = _overlaps(prefix_start, prefix)
            counts[here, before : before + len(of_prefix)] += np.outer(own, of_prefix)
        counts[here, here] += np.tril(np.outer(own, own), -1) + np.diag(own * (own + 1) // 2)
        start += tokens
    return counts


def _overlaps(start: int, tokens: int) -> tuple[int, np.ndarray]:
    """Return the first block that a stretch touches, and its tokens in each block from there."""
    first, last = start // BLOCK, (start + tokens - 1) // BLOCK
    edges = np.arange(first, last + 2) * BLOCK
    edges[0], edges[-1] = start, start + tokens
    return first, np.diff(edges)


def _padded(spans: Sequence[tuple[bool, int]], num_tokens: int) -> list[tuple[bool, int]]:
    """Return the spans of a row with its padding as a sample of its own."""
    padding = num_tokens - sum(tokens for _, tokens in spans)
    return [*spans, (False, padding)] if padding else list(spans)


def attend_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float):
    """Attend by flex; query heads may share key heads.

    Args:
        query: `(rows, heads, tokens, head_dim)`.
        key: `(rows, shared heads, tokens, head_dim)`.
        value: As `key`.

    Returns:
        `(rows, tokens, heads, head_dim)`.
    """
    attend = _compiled_flex() if query.device.type == "cuda" else flex_attention
    # Autocast leaves the query of a rotary embedding in float32 in some models.
    query, key = query.to(value.dtype), key.to(value.dtype)
    shares = query.shape[1] != key.shape[1]
    out = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=shares)
    return out.transpose(1, 2).contiguous()


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    # Static shapes give better kernels; rows come in few lengths (`row_lengths`).
    return torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True, eq=False)
class VarlenRows:
    """Sequences of a batch for a kernel of variable lengths; all rows one behind another.

    A branch is a sequence whose keys are its prefix's and then its own. The causal mask of the
    kernel is aligned at the bottom right: the last query sees all keys.

    Args:
        query_ends: `(sequences + 1,)` int32, where the queries of each begin; the last end.
        key_ends: `(sequences + 1,)` int32, the same of its keys.
        most_queries: Queries of the longest, a number that the kernel needs on the host.
        most_keys: Keys of the longest.
        key_index: `(keys,)` int64, token of each key; None where keys are the tokens as they stand.
    """

    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int
    key_index: Tensor | None


def describe_varlen(spans: Spans, shape: Sequence[int], device: torch.device) -> VarlenRows:
    """Return the sequences of some rows; arguments as for `describe_flex`."""
    queries, keys, index = [], [], []
    for row, own in enumerate(spans):
        start = row * shape[1]
        prefix = range(0)
        for is_branch, tokens in _padded(own, shape[1]):
            stretch = range(start, start + tokens)
            if not is_branch:
                prefix = stretch
            seen = [*prefix, *stretch] if is_branch else stretch
            queries.append(tokens)
            keys.append(len(seen))
            index.append(np.asarray(seen))
            start += tokens

    ends = [
        torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(device)
        for lengths in (queries, keys)
    ]
    has_branches = any(is_branch for row in spans for is_branch, _ in row)
    key_index = torch.from_numpy(np.concatenate(index)).to(device) if has_branches else None
    return VarlenRows(ends[0], ends[1], max(queries), max(keys), key_index)


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, rows: VarlenRows, scaling: float):
    """Attend by torch's kernel of variable lengths; arguments and result as `attend_flex`."""
    batch, heads, num_tokens, head_dim = query.shape
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    queries, keys, values = (tensor.to(value.dtype) for tensor in flat)  # (tokens, heads, head_dim)
    if rows.key_index is not None:
        keys, values = keys.index_select(0, rows.key_index), values.index_select(0, rows.key_index)
    if heads != keys.shape[1]:  # the kernel of torch 2.11 knows no shared heads
        repeats = heads // keys.shape[1]
        keys, values = (tensor.repeat_interleave(repeats, 1) for tensor in (keys, values))

    out = varlen_attn(
        queries,
        keys,
        values,
        rows.query_ends,
        rows.key_ends,
        rows.most_queries,
        rows.most_keys,
        scale=scaling,
        window_size=(-1, 0),  # causal
    )  # (tokens, heads, head_dim)
    return out.view(batch, num_tokens, heads, head_dim)


def row_lengths(row_tokens: int) -> tuple[int, ...]:
    """Return the lengths that rows are padded to: a half, three quarters, all of `row_tokens`.

    Each is a multiple of a block. So a compiled kernel sees three shapes in all.
    """
    blocks = -(-row_tokens // BLOCK)
    return tuple(sorted({-(-blocks * quarters // 4) * BLOCK for quarters in (2, 3, 4)}))
