"""Attention within packed rows: which tokens see which, and no other pair is computed.

A training row holds several samples that must not see one another. `spans` describe it: the tokens
of each group's prefix and of its branches, in reading order. A token sees the earlier tokens of its
group's prefix and of its own branch:

    tokens   [prefix ......][branch 1][branch 2]  [prefix ...]
    spans    (False, 8)     (True, 3) (True, 4)   (False, 6)

One description, several implementations; `describe_rows` gives each what it reads:

    segments      `Segments`: attention sample by sample (this module; for CPUs)
    flex, varlen  one kernel for all rows (`attention_kernels`; for GPUs)
    sdpa, eager   a dense mask, `(rows, 1, tokens, tokens)`: every pair of a row is computed

The handling of packed rows in transformers is never used: it finds samples by position ids that
restart, and then one question about a shared image sees another or loses the image.

Speed of one layer of SmolLM2-135M in bfloat16 (rows of 12 samples of 170 tokens, one thread of an
EPYC with AVX-512 BF16, forward and backward): the matrix products of the weights take 125 ms.
Attention takes 390 ms with a dense mask, 75 ms sample by sample with the fused kernel, and 19 ms
with two plain products and a softmax between them. The plain products keep the attention weights
for the backward pass, so long samples use the fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mipha.models.attention_kernels import (
    Spans,
    VarlenRows,
    attend_flex,
    attend_varlen,
    describe_flex,
    describe_varlen,
    number_tokens,
)

SEGMENTS, FLEX, VARLEN = "mipha_segments", "mipha_flex", "mipha_varlen"
"""The names under which transformers knows attention that reads spans."""

DENSE = ("sdpa", "eager")
"""Attention that reads a dense mask."""

CHUNK = 256
"""Most tokens of branches that attend together: few pairs between branches are wasted."""

MOST_WEIGHTS = 2**23
"""Attention weights of one product that are kept for the backward pass.

16 MB in bfloat16, times the layers.
"""


class Segment(NamedTuple):
    """Tokens side by side in one row that attend together.

    Args:
        row: Number of the row.
        prefix_start: First token of the prefix that all of them see.
        prefix: Tokens of that prefix; 0 where these tokens are the prefix.
        start: First token of the segment.
        stretches: Tokens of each stretch; a token sees its own stretch up to itself.
    """

    row: int
    prefix_start: int
    prefix: int
    start: int
    stretches: tuple[int, ...]

    @property
    def end(self) -> int:
        """The token behind the last one."""
        return self.start + sum(self.stretches)


class Segments:
    """The segments of a batch in reading order, worked out once for all layers.

    The layers get it instead of a mask. It is opaque to torch on purpose: activation
    checkpointing keeps it for the recomputation, sharding hands it on, and `torch.compile` does not
    look into it, so that rows of new lengths compile nothing anew.
    """

    def __init__(self, spans: Spans) -> None:
        self.of_rows = [split_row(row, number) for number, row in enumerate(spans)]


def split_row(spans: Sequence[tuple[bool, int]], row: int = 0) -> list[Segment]:
    """Return the segments of a row: each prefix, and its branches by as many as fit in a chunk."""
    segments: list[Segment] = []
    prefix_start = prefix = start = 0
    for is_branch, tokens in spans:
        last = segments[-1] if segments else None
        if not is_branch:
            prefix_start, prefix = start, tokens
            segments.append(Segment(row, start, 0, start, (tokens,)))
        elif last and last.prefix and sum(last.stretches) + tokens <= CHUNK:
            segments[-1] = last._replace(stretches=(*last.stretches, tokens))
        else:
            segments.append(Segment(row, prefix_start, prefix, start, (tokens,)))
        start += tokens
    return segments


def is_packed(spans: Spans) -> bool:
    """Return whether a row holds several samples, so that causal attention alone mixes them."""
    return any(len(row) > 1 for row in spans)


def dense_mask(spans: Spans, num_tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the dense mask of some spans.

    Args:
        spans: Spans of each row; tokens behind the last span are padding, which sees padding.
        num_tokens: Tokens of a row, padding included.

    Returns:
        `(rows, 1, tokens, tokens)` float32, added to the scores: 0 where a query sees a key, the
        lowest number elsewhere. Every query sees a key, else its softmax would not be a number.
    """
    group, branch = (part.to(device) for part in number_tokens(spans, num_tokens))

    place = torch.arange(num_tokens, device=device)
    causal = place[:, None] >= place  # (queries, keys)
    same_group = group[:, :, None] == group[:, None, :]  # (rows, queries, keys)
    in_sight = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    allowed = (causal & same_group & in_sight)[:, None]  # (rows, 1, queries, keys)
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(allowed.shape, device=device).masked_fill_(~allowed, lowest)


Described = Segments | BlockMask | VarlenRows
"""What a layer reads instead of a mask: made once from the spans, for all layers."""

_described: ContextVar[Described | None] = ContextVar("what describes the rows", default=None)


@contextmanager
def describe_rows(
    spans: Spans, implementation: str, shape: Sequence[int], device: torch.device
) -> Iterator[Tensor | None]:
    """Tell the attention which tokens see which while a model runs on packed rows.

    The language model asks for its mask once in a forward pass (`_make_mask`), while this context
    is open, and hands the answer to every layer as an argument. So a layer that is recomputed in
    the backward pass has it, although the context is closed by then.

    Args:
        spans: Spans of each row.
        implementation: Name of the language model's attention.
        shape: Shape of the batch, (rows, tokens).
        device: Device of the model.

    Yields:
        The `attention_mask` to give the model; None where causal attention is all that is needed.

    Raises:
        ValueError: The spans are not of this batch, or this attention cannot keep samples apart.
    """
    lengths = [sum(tokens for _, tokens in row) for row in spans]
    if len(spans) != shape[0] or max(lengths, default=0) > shape[1]:
        raise ValueError(
            f"the spans describe {len(spans)} rows of up to {max(lengths, default=0)} tokens, "
            f"but the batch has {shape[0]} rows of {shape[1]}: "
            "give the spans that `collate` made for it"
        )

    described: Described
    if implementation == SEGMENTS:
        described = Segments(spans)
    elif implementation == FLEX:
        described = describe_flex(spans, shape, device)
    elif implementation == VARLEN:
        described = describe_varlen(spans, shape, device)
    elif implementation in DENSE or not is_packed(spans):
        yield dense_mask(spans, shape[1], device) if is_packed(spans) else None
        return
    else:
        raise ValueError(
            f"attention {implementation!r} cannot keep the samples of a packed row apart: "
            f"choose {', '.join((*DENSE, SEGMENTS, FLEX))} or {VARLEN}"
        )

    token = _described.set(described)
    try:
        # With a mask of ones, transformers does not search position ids for packed samples, so the
        # CPU does not wait for a GPU. `_make_mask` replaces that mask by the description.
        yield torch.ones(tuple(shape), dtype=torch.bool, device=device)  # (rows, tokens)
    finally:
        _described.reset(token)


def check_described(position_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse packed rows that come without their spans.

    Args:
        position_ids: `(rows, tokens)`; a restart begins another sample.
        attention_mask: `(rows, tokens)`, 0 where there is padding.

    Raises:
        ValueError: A row holds several samples.
    """
    restarts = position_ids.diff(dim=-1) != 1  # (rows, tokens - 1)
    if attention_mask is not None:
        real = attention_mask[:, -position_ids.shape[-1] :].bool()  # (rows, tokens)
        restarts = restarts & real[:, 1:] & real[:, :-1]
    if restarts.any():
        raise ValueError(
            "position_ids restart within a row, so it holds several samples, but nothing says "
            "which tokens see which: give the model the `spans` that `collate` made, or a mask of "
            "four axes"
        )


def use_segments(model: PreTrainedModel) -> None:
    """Switch the language model of a LLaVA from SDPA to attention by segments."""
    use_attention(model, SEGMENTS)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the language model of a LLaVA from SDPA to an attention that reads spans.

    Args:
        name: `SEGMENTS`, `FLEX` or `VARLEN`. A model whose attention is not SDPA keeps it.

    Raises:
        ValueError: The model drops attention weights in training, and a kernel has no dropout.
    """
    config = model.config.text_config
    dropout = getattr(config, "attention_dropout", 0.0) or 0.0
    if dropout and name != SEGMENTS:
        raise ValueError(
            f"the language model has attention_dropout={dropout}, and the kernels flex and varlen "
            "have none: use attention=segments"
        )
    if config._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": name})


def choose_attention(name: str, device: torch.device, dtype: torch.dtype | None) -> str:
    """Return the attention that a recipe's `attention` stands for.

    Args:
        name: auto, flex, varlen or segments; auto is flex on a CUDA GPU, else segments.
        device: Device that trains.
        dtype: Type of matrix products; None for float32.

    Raises:
        ValueError: The kernel does not run on this device, or in this type.
    """
    if name == "auto":
        name = "flex" if device.type == "cuda" else "segments"
    if name != "segments" and device.type != "cuda":
        raise ValueError(
            f"attention={name} needs a CUDA GPU to train on, and the device is {device.type}: "
            "use attention=auto or segments"
        )
    if name == "varlen" and dtype is None:
        raise ValueError(
            "attention=varlen computes in bfloat16 or float16, and precision is float32: "
            "use precision=bfloat16, or attention=flex"
        )
    return {"segments": SEGMENTS, "flex": FLEX, "varlen": VARLEN}[name]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Described | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as the description of packed rows says; with any other mask, as SDPA does.

    Args:
        query: `(rows, heads, queries, head_dim)`.
        key: `(rows, shared heads, keys, head_dim)`.
        value: As `key`.
        attention_mask: What `describe_rows` made; or `(rows, 1, queries, keys)`, boolean or added
            to the scores.

    Returns:
        `(rows, queries, heads, head_dim)`, and no weights. With segments, zeros in the padding.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(attention_mask, Segments):
        return _attend_by_segments(query, key, value, attention_mask, scale, dropout), None
    if isinstance(attention_mask, BlockMask):
        return attend_flex(query, key, value, attention_mask, scale), None
    if isinstance(attention_mask, VarlenRows):
        return attend_varlen(query, key, value, attention_mask, scale), None
    return attend_grouped(module, query, key, value, attention_mask, dropout, scaling, **options)


def attend_grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend by SDPA; where heads share keys and a mask is given, without repeating the keys.

    With a mask, transformers repeats keys and values for each query head. Many short questions that
    look back on a long image then spend most of their time copying it: 16 questions of 23 tokens
    behind 732 cached ones took 1.6 s that way and take 1.0 s this way (SmolLM2-135M, 2 CPU cores).
    Here the query heads that share a key head lie one behind another as more queries of one head,
    which gives the same sum.

    Args, Returns: As `attend`.
    """
    rows, heads, queries, head_dim = query.shape
    shared_heads = key.shape[1]
    repeats = heads // shared_heads
    # Transformers does not repeat keys for a single query or without a mask. Training may pass
    # options that only transformers knows.
    if (
        repeats == 1
        or queries == 1
        or attention_mask is None
        or attention_mask.shape[1] != 1
        or module.training
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )

    stacked = query.reshape(rows, shared_heads, repeats * queries, head_dim)
    mask = attention_mask.repeat(1, 1, repeats, 1)  # (rows, 1, repeats x queries, keys)
    out = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    out = out.reshape(rows, heads, queries, head_dim)
    return out.transpose(1, 2).contiguous(), None  # (rows, queries, heads, head_dim)


@torch.compiler.disable  # every row has other segments: traced, each would be compiled anew
def _attend_by_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float, dropout: float
) -> Tensor:
    """Return `(rows, tokens, heads, head_dim)`; shapes of the arguments as in `attend`."""
    # Rotary embeddings leave float32, which each product of each segment would round by itself.
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    _, heads, tokens, _ = query.shape
    rows = []
    # Split, do not slice: the gradient of a slice is as large as what it was cut from.
    for own, *of_row in zip(
        segments.of_rows, query.unbind(), key.unbind(), value.unbind(), strict=True
    ):
        padding = tokens - own[-1].end
        lengths = [*(segment.end - segment.start for segment in own), padding]
        queries, keys, values = (tensor.split(lengths, 1) for tensor in of_row)
        number = {segment.start: number for number, segment in enumerate(own)}

        pieces = []
        for at, segment in enumerate(own):
            seen_keys, seen_values = keys[at], values[at]  # (shared heads, keys, head_dim)
            if segment.prefix:
                prefix = number[segment.prefix_start]
                seen_keys = torch.cat([keys[prefix], seen_keys], 1)
                seen_values = torch.cat([values[prefix], seen_values], 1)
            pieces.append(
                _attend_one(queries[at], seen_keys, seen_values, segment, scaling, dropout)
            )  # (heads, queries, head_dim)
        pieces.append(query.new_zeros(heads, padding, value.shape[-1]))
        rows.append(torch.cat(pieces, 1))  # (heads, tokens, head_dim)
    return torch.stack(rows).transpose(1, 2).contiguous()  # (rows, tokens, heads, head_dim)


def _attend_one(
    query: Tensor, key: Tensor, value: Tensor, segment: Segment, scaling: float, dropout: float
) -> Tensor:
    """Return the `(heads, queries, head_dim)` of one segment.

    Args:
        query: `(heads, queries, head_dim)`.
        key: `(shared heads, prefix + queries, head_dim)`.
        value: As `key`.
    """
    heads, queries, head_dim = query.shape
    shared_heads, keys, value_dim = value.shape
    repeats = heads // shared_heads

    # Query heads that share a key head lie one behind another as more queries of one head.
    stacked = query.reshape(shared_heads, repeats * queries, head_dim)

    # Use the fused kernel for long segments and on GPUs: it keeps no weights for the backward pass.
    if query.device.type != "cpu" or heads * queries * keys > MOST_WEIGHTS:
        if segment.prefix:
            seen = _sight(segment.prefix, segment.stretches, query.device)  # (queries, keys)
            out = F.scaled_dot_product_attention(
                stacked[None],
                key[None],
                value[None],
                attn_mask=seen.repeat(repeats, 1),  # (repeats x queries, keys)
                dropout_p=dropout,
                scale=scaling,
            )  # (1, shared heads, repeats x queries, value_dim)
        else:
            out = F.scaled_dot_product_attention(
                query[None],
                key[None],
                value[None],
                is_causal=True,
                enable_gqa=repeats > 1,
                dropout_p=dropout,
                scale=scaling,
            )  # (1, heads, queries, value_dim)
        return out[0].reshape(heads, queries, value_dim)

    # Use two plain products with a softmax between them for short segments on a CPU.
    bias = _bias(segment.prefix, segment.stretches, repeats, query.dtype)
    scores = torch.baddbmm(bias, stacked, key.transpose(1, 2), alpha=scaling)
    weights = F.dropout(torch.softmax(scores, -1), dropout, training=dropout > 0)
    out = torch.bmm(weights, value)  # (shared heads, repeats x queries, value_dim)
    return out.reshape(heads, queries, value_dim)


def _sight(prefix: int, stretches: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Return `(queries, keys)` booleans: a query sees the prefix, and its stretch up to itself."""
    causal = [torch.ones(tokens, tokens, device=device).tril() for tokens in stretches]
    own = torch.block_diag(*causal).bool()  # (queries, queries)
    return torch.cat([own.new_ones(len(own), prefix), own], 1)


@lru_cache(maxsize=64)
def _bias(prefix: int, stretches: tuple[int, ...], repeats: int, dtype: torch.dtype) -> Tensor:
    """Return `(1, repeats x queries, keys)`: 0 where seen, minus infinity elsewhere.

    It is the same in all layers, and for many samples.
    """
    seen = _sight(prefix, stretches, "cpu")  # (queries, keys)
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return bias.repeat(repeats, 1)[None]


def _make_mask(*args: Any, **options: Any) -> Described | Tensor | None:
    """Return what `attend` reads as its mask: the described rows, else SDPA's mask."""
    described = _described.get()
    return sdpa_mask(*args, **options) if described is None else described


for _name in (SEGMENTS, FLEX, VARLEN):
    AttentionInterface.register(_name, attend)
    AttentionMaskInterface.register(_name, _make_mask)
