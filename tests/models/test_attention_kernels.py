"""What GPU kernels read of packed rows is what the dense mask says, on a CPU with references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

from mipha.data.collate import Batch, collate
from mipha.data.packing import make_rows
from mipha.models import attention_kernels
from mipha.models.attention import (
    FLEX,
    SEGMENTS,
    VARLEN,
    attend,
    choose_attention,
    dense_mask,
    use_attention,
)
from mipha.models.attention_kernels import (
    BLOCK,
    Spans,
    count_pairs,
    describe_flex,
    describe_varlen,
    row_lengths,
)
from tests.models.test_attention import samples_of

CPU = torch.device("cpu")
SPANS: Spans = [
    [(False, 100), (True, 30), (True, 200), (False, 7), (False, 140), (True, 1)],
    [(False, 300), (True, 80)],
]
"""Two rows, the second with padding behind it; stretches begin and end within blocks of 128."""

layouts = st.lists(
    st.lists(st.integers(1, 180), min_size=1, max_size=4).map(
        lambda lengths: [(number > 0, tokens) for number, tokens in enumerate(lengths)]
    ),
    min_size=1,
    max_size=4,
).map(lambda groups: [span for group in groups for span in group])
"""Rows of groups: a prefix and its branches."""


def batch_of(processor: Any, batching: str, lengths: tuple[int, ...] = ()) -> Batch:
    prefix = 5 if batching == "shared-image" else 0
    rows = make_rows(samples_of(processor, prefix), 70, batching)
    return collate(rows, processor, lengths=lengths)


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """Attend as flash attention states: causal, aligned at the bottom right of each sequence."""
    assert window_size == (-1, 0)
    pieces = []
    for number in range(len(query_ends) - 1):
        own = slice(query_ends[number], query_ends[number + 1])
        seen = slice(key_ends[number], key_ends[number + 1])
        queries, keys = query[own].transpose(0, 1), key[seen].transpose(0, 1)
        num_queries, num_keys = queries.shape[1], keys.shape[1]
        assert num_queries <= most_queries and num_keys <= most_keys
        mask = torch.ones(num_queries, num_keys).tril(num_keys - num_queries).bool()
        out = F.scaled_dot_product_attention(
            queries, keys, value[seen].transpose(0, 1), attn_mask=mask, scale=scale
        )
        pieces.append(out.transpose(0, 1))
    return torch.cat(pieces)


@given(spans=layouts, padding=st.integers(0, 150))
def test_block_lists_are_those_of_create_block_mask(
    spans: list[tuple[bool, int]], padding: int
) -> None:
    num_tokens = sum(tokens for _, tokens in spans) + padding
    mine = describe_flex([spans], (1, num_tokens), CPU)
    made = create_block_mask(mine.mask_mod, 1, 1, num_tokens, num_tokens, CPU, BLOCK)

    for part in ("kv", "full_kv", "q", "full_q"):
        numbers = getattr(mine, f"{part}_num_blocks")
        assert torch.equal(numbers, getattr(made, f"{part}_num_blocks"))
        lists, wanted = (getattr(mask, f"{part}_indices") for mask in (mine, made))
        for block, number in enumerate(numbers[0, 0]):
            assert torch.equal(lists[0, 0, block, :number], wanted[0, 0, block, :number])


@given(spans=layouts)
def test_pairs_are_counted_as_the_dense_mask_allows_them(spans: list[tuple[bool, int]]) -> None:
    num_tokens = sum(tokens for _, tokens in spans)
    allowed = dense_mask([spans], num_tokens)[0, 0] == 0  # (queries, keys)
    counts = count_pairs(spans, num_tokens)
    blocks = F.pad(allowed, (0, -num_tokens % BLOCK, 0, -num_tokens % BLOCK))
    blocks = blocks.unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK)).sum((1, 3))
    assert counts.tolist() == blocks.tolist()


@pytest.mark.parametrize("num_shared", [4, 2])
@pytest.mark.parametrize("name", ["flex", "varlen"])
def test_a_kernel_attends_as_the_dense_mask_does(
    name: str, num_shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "varlen_attn", varlen_reference)
    torch.manual_seed(0)
    shape = (2, 500)
    query = torch.randn(2, 4, 500, 16)
    key, value = torch.randn(2, 2, num_shared, 500, 16)
    module = nn.Module().eval()
    module.num_key_value_groups = 4 // num_shared

    describe = describe_flex if name == "flex" else describe_varlen
    found, _ = attend(module, query, key, value, describe(SPANS, shape, CPU))
    wanted, _ = attend(module, query, key, value, dense_mask(SPANS, 500))
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)

    # Another sample of the row changes no bit: 487 tokens, and the second group begins at 330.
    key[:, :, :330], value[:, :, :330] = torch.randn(2, 2, num_shared, 330, 16)
    other, _ = attend(module, query, key, value, describe(SPANS, shape, CPU))
    assert torch.equal(other[0, 330:], found[0, 330:])
    assert not torch.equal(other[0, :330], found[0, :330])


@pytest.mark.parametrize("batching", ["padded", "packed", "shared-image"])
def test_flex_in_a_model_gives_what_a_dense_mask_gives(
    tiny_model: Callable, family: str, batching: str
) -> None:
    model, processor = tiny_model(family)
    batch = batch_of(processor, batching)
    losses = {}
    for name in ("sdpa", FLEX):
        model.set_attn_implementation({"text_config": name})
        with torch.no_grad():
            losses[name] = model(**batch).loss_sum
    torch.testing.assert_close(losses[FLEX], losses["sdpa"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batching", ["packed", "shared-image"])
def test_varlen_in_a_model_gives_the_loss_and_gradients_of_a_dense_mask(
    tiny_model: Callable, family: str, batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "varlen_attn", varlen_reference)
    model, processor = tiny_model(family)
    batch = batch_of(processor, batching)

    def run(name: str) -> tuple[Tensor, Tensor]:
        model.set_attn_implementation({"text_config": name})
        model.zero_grad()
        loss = model(**batch).loss_sum
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return loss.detach(), torch.cat(gradients)

    wanted, wanted_gradient = run("sdpa")
    loss, gradient = run(VARLEN)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-4)


def test_rows_without_branches_need_no_gathered_keys() -> None:
    rows = describe_varlen([[(False, 5), (False, 4)]], (1, 12), CPU)
    assert rows.key_index is None
    assert rows.query_ends.tolist() == rows.key_ends.tolist() == [0, 5, 9, 12]
    branches = describe_varlen([[(False, 3), (True, 2), (True, 1)]], (1, 6), CPU)
    assert branches.key_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert (branches.most_queries, branches.most_keys) == (3, 5)


@pytest.mark.parametrize(
    ("row_tokens", "lengths"), [(2048, (1024, 1536, 2048)), (100, (128,)), (1000, (512, 768, 1024))]
)
def test_rows_come_in_three_lengths(row_tokens: int, lengths: tuple[int, ...]) -> None:
    assert row_lengths(row_tokens) == lengths


@pytest.mark.parametrize("batching", ["packed", "shared-image"])
def test_rows_of_a_few_lengths_have_the_loss_of_rows_of_any(
    tiny_model: Callable, batching: str
) -> None:
    model, processor = tiny_model()
    exact, padded = batch_of(processor, batching), batch_of(processor, batching, row_lengths(70))
    assert padded["input_ids"].shape[1] == 128 > exact["input_ids"].shape[1]
    with torch.no_grad():
        found, wanted = model(**padded).loss_sum, model(**exact).loss_sum
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_a_kernel_that_cannot_run_is_refused(tiny_model: Callable) -> None:
    cuda = torch.device("cuda")
    assert choose_attention("auto", CPU, None) == SEGMENTS
    assert choose_attention("auto", cuda, None) == FLEX
    assert choose_attention("varlen", cuda, torch.bfloat16) == VARLEN
    with pytest.raises(ValueError, match=r"attention=varlen needs a CUDA GPU .* device is cpu"):
        choose_attention("varlen", CPU, torch.bfloat16)
    with pytest.raises(ValueError, match=r"attention=varlen .* precision is float32"):
        choose_attention("varlen", cuda, None)

    model, _ = tiny_model("llama")
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout=0.1.*attention=segments"):
        use_attention(model, FLEX)
