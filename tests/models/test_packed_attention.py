"""Attention span by span gives what a dense mask gives, losses and gradients, in every family."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mipha.data.collate import collate
from mipha.data.encode import IGNORE, Encoded
from mipha.data.images import grey_image
from mipha.data.packing import make_rows
from mipha.models import packed_attention
from mipha.models.packed_attention import NAME, groups_of

LENGTHS = (23, 17, 31, 13, 12, 40)


def _samples(processor, prefix: int) -> list[Encoded]:
    """Four image tokens behind a first word, then words: half of them share image and prefix, where a prefix is wanted."""
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
        _samples(processor, prefix=5 if batching == "shared-image" else 0), 70, batching
    )
    batch = collate(rows, processor)

    def loss_and_gradients(attention: str) -> tuple[torch.Tensor, torch.Tensor]:
        model.set_attn_implementation({"text_config": attention})
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
        monkeypatch.setattr(packed_attention, "MOST_WEIGHTS", most)
        monkeypatch.setattr(packed_attention, "CHUNK", chunk)
        loss, gradient = loss_and_gradients(NAME)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-4)


def test_groups() -> None:
    spans = torch.tensor([[0, 0, 9], [0, 1, 3], [0, 1, 4], [0, 0, 5], [1, 0, 8]])
    assert groups_of(spans) == [(0, (9, 3, 4)), (0, (5,)), (1, (8,))]
