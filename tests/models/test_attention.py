"""Attention by segments gives what a dense mask gives, and grouped SDPA what SDPA gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mipha.data.collate import Batch, collate
from mipha.data.encode import Encoded
from mipha.data.images import grey_image
from mipha.data.packing import make_rows
from mipha.labels import IGNORE
from mipha.models import attention
from mipha.models.attention import (
    SEGMENTS,
    Segment,
    attend_grouped,
    dense_mask,
    split_row,
    use_segments,
)

LENGTHS = (23, 17, 31, 13, 12, 40)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("num_heads", "num_shared"), [(6, 2), (9, 3), (4, 1), (4, 4)])
def test_grouped_sdpa_is_sdpa(num_heads: int, num_shared: int, additive: bool) -> None:
    torch.manual_seed(0)
    rows, queries, keys, dim = 3, 5, 11, 8
    query = torch.randn(rows, num_heads, queries, dim)
    key, value = torch.randn(2, rows, num_shared, keys, dim)
    seen = torch.rand(rows, 1, queries, keys) < 0.6
    seen[..., 0] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if additive else seen
    module = nn.Module().eval()
    module.num_key_value_groups = num_heads // num_shared
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = attend_grouped(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_model_that_attends_so_says_the_same(tiny_model: Callable[..., Any], family: str) -> None:
    model, _ = tiny_model(family, "siglip")
    model.eval()
    ids = torch.randint(5, 40, (2, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        use_segments(model)
        assert model.config.text_config._attn_implementation == SEGMENTS
        assert (
            model.model.language_model.layers[0].self_attn.config._attn_implementation == SEGMENTS
        )
        after = model(input_ids=ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(after[seen], before[seen], atol=1e-5, rtol=1e-5)


def test_eager_attention_is_left_alone(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("llama", "siglip")
    model.set_attn_implementation("eager")
    use_segments(model)
    assert model.config.text_config._attn_implementation == "eager"


def samples_of(processor, prefix: int) -> list[Encoded]:
    """Four image tokens behind a first word, then words; with a prefix, half share the image."""
    random = np.random.default_rng(0)
    samples = []
    for number, length in enumerate(LENGTHS):
        ids = random.integers(5, 300, length)
        images = (grey_image(),) if number < 4 else ()
        if images:
            ids[:5] = [7, *[processor.image_token_id] * 4]
        labels = np.where(np.arange(length) > length // 2, ids, IGNORE)
        samples.append(Encoded(str(number), ids, labels, images, prefix if images else 0))
    return samples


@pytest.mark.parametrize("batching", ["padded", "packed", "shared-image"])
def test_equals_a_dense_mask(
    tiny_model: Callable, family: str, batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_model(family)
    rows = make_rows(
        samples_of(processor, prefix=5 if batching == "shared-image" else 0), 70, batching
    )
    batch = collate(rows, processor)

    def loss_and_gradients(implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        model.set_attn_implementation({"text_config": implementation})
        model.zero_grad()
        loss = model(**batch).loss_sum
        loss.backward()
        return loss.detach(), torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )

    wanted, wanted_gradient = loss_and_gradients("sdpa")
    for most, chunk in (
        (2**23, 256),
        (2**23, 20),
        (0, 256),
    ):  # plain products; branches in two chunks; the fused kernel
        monkeypatch.setattr(attention, "MOST_WEIGHTS", most)
        monkeypatch.setattr(attention, "CHUNK", chunk)
        loss, gradient = loss_and_gradients(SEGMENTS)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-4)


def test_a_row_is_split_into_prefixes_and_chunks_of_branches() -> None:
    spans = [(False, 9), (True, 3), (True, 4), (True, 250), (False, 5), (True, 300), (True, 2)]
    assert split_row(spans, row=1) == [
        Segment(1, 0, 0, 0, (9,)),
        Segment(1, 0, 9, 9, (3, 4)),
        Segment(1, 0, 9, 16, (250,)),
        Segment(1, 266, 0, 266, (5,)),
        Segment(1, 266, 5, 271, (300,)),
        Segment(1, 266, 5, 571, (2,)),
    ]


layouts = st.lists(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)
"""Rows of groups of branch lengths; a group's first is its prefix."""


@given(layout=layouts)
def test_a_token_sees_its_own_past_and_nothing_else(layout: list[list[list[int]]]) -> None:
    length = max(sum(map(sum, row)) for row in layout)
    group = torch.full((len(layout), length), -1)
    branch = torch.zeros(len(layout), length, dtype=torch.int64)
    for number, row in enumerate(layout):
        start = 0
        for which, branches in enumerate(row):
            for part, size in enumerate(branches):
                group[number, start : start + size] = which
                branch[number, start : start + size] = part
                start += size
    spans = [
        [(part > 0, size) for branches in row for part, size in enumerate(branches)]
        for row in layout
    ]
    mask = dense_mask(spans, length)
    assert mask.shape == (len(layout), 1, length, length)
    for row in range(len(layout)):
        for query in range(length):
            for key in range(length):
                apart = group[row, query] != group[row, key]
                other_branch = branch[row, key] not in (0, branch[row, query])
                sees = mask[row, 0, query, key] == 0
                assert sees == (key <= query and not apart and not other_branch)
                assert sees or mask[row, 0, query, key] == torch.finfo(torch.float32).min
            assert mask[row, 0, query, query] == 0, (
                "no row of the mask is empty: its softmax would not be a number"
            )


def test_the_host_never_waits_for_a_number_of_the_rows(tiny_model: Callable, family: str) -> None:
    """On a GPU every `.item()` or `.tolist()` makes the CPU wait for the device."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*arguments, **(options or {}))

    model, processor = tiny_model(family)
    use_segments(model)
    samples = samples_of(processor, prefix=0)
    batch = collate(make_rows(samples, 60, "packed"), processor)
    assert "pixel_values" in batch
    with Refuse():
        model(**batch)
    with Refuse(), pytest.raises(AssertionError):
        model(**{key: value for key, value in batch.items() if key != "spans"})


def _two_batches(processor: Any) -> list[Batch]:
    """Rows of the same shape whose samples lie differently."""
    rows = [make_rows(samples_of(processor, prefix), 60, "shared-image") for prefix in (5, 0)]
    return [collate(own, processor) for own in rows]


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_recomputed_layer_knows_its_own_rows(
    tiny_model: Callable, family: str, recomputed: bool
) -> None:
    """Two forward passes before their backward passes, which recompute long after both."""
    model, processor = tiny_model(family)
    batches = _two_batches(processor)
    assert batches[0]["spans"] != batches[1]["spans"]

    model.set_attn_implementation({"text_config": "sdpa"})
    wanted = torch.autograd.grad(sum(model(**batch).loss_sum for batch in batches), _key(model))

    use_segments(model)
    if recomputed:
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.language_model.layers:
            layer.training = True  # this flag alone: no dropout
    losses = [model(**batch).loss_sum for batch in batches]
    found = torch.autograd.grad(sum(losses), _key(model))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_compiled_layers_are_not_compiled_anew_for_every_row(
    tiny_model: Callable, family: str
) -> None:
    model, processor = tiny_model(family)
    use_segments(model)
    compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        compiled.append(len(inputs))
        return graph

    batches = [
        collate(make_rows(samples_of(processor, prefix), size, "shared-image")[:1], processor)
        for prefix, size in ((5, 70), (0, 60), (5, 140), (0, 90), (0, 40))
    ]
    assert len({batch["spans"] for batch in batches}) == 5
    wanted = [model(**batch).loss_sum.item() for batch in batches]
    torch._dynamo.reset()
    try:
        for layer in model.model.language_model.layers:
            layer.compile(backend=count, dynamic=True)
        losses, numbers = [], []
        for batch in batches:
            losses.append(model(**batch).loss_sum.item())
            numbers.append(len(compiled))
    finally:
        torch._dynamo.reset()
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert numbers[0] > 0, "the layers were compiled"
    assert numbers == numbers[:1] * 5


def _key(model: Any) -> torch.nn.Parameter:
    """A weight that attention reads, in the first layer."""
    return next(
        weight
        for name, weight in model.model.language_model.layers[0].named_parameters()
        if name.endswith(("k_proj.weight", "query_key_value.weight"))
    )
