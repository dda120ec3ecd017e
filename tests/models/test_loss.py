"""The loss over supervised positions is the full cross entropy, in value and in every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mipha.models import loss as module
from mipha.models.loss import IGNORE, supervised_cross_entropy


def full_cross_entropy(hidden: Tensor, labels: Tensor, lm_head: nn.Module) -> Tensor:
    logits = lm_head(hidden)[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def problem(
    rows: int, tokens: int, share: float, seed: int, bias: bool = True
) -> tuple[Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 30, (rows, tokens), generator=generator)
    labels[torch.rand(rows, tokens, generator=generator) > share] = IGNORE
    torch.manual_seed(seed)
    return hidden, labels, nn.Linear(8, 30, bias=bias)


@settings(max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(2, 20),
    st.floats(0, 1),
    st.sampled_from([1, 3, 1024]),
    st.integers(0, 99),
)
def test_equal_to_the_full_cross_entropy(
    rows: int, tokens: int, share: float, chunk: int, seed: int
) -> None:
    hidden, labels, head = problem(rows, tokens, share, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        total, count = supervised_cross_entropy(hidden, labels, head)
        mine = torch.autograd.grad(total, (hidden, head.weight, head.bias))
    wanted = full_cross_entropy(hidden, labels, head)
    theirs = torch.autograd.grad(wanted, (hidden, head.weight, head.bias))
    assert count == (labels[:, 1:] != IGNORE).sum()
    assert torch.allclose(total, wanted, rtol=1e-6, atol=1e-6)
    for gradient, other in zip(mine, theirs, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-5, atol=1e-5)


def test_logits_of_one_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    hidden, labels, head = problem(2, 20, 0.7, 0)
    sizes = []
    head.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    total, count = supervised_cross_entropy(hidden, labels, head)
    forward = list(sizes)
    total.backward()
    assert sum(forward) == count and max(forward) == 4
    assert sorted(sizes) == sorted(forward * 2), "each chunk once more in the backward pass"


def test_nothing_supervised_is_zero_with_a_graph() -> None:
    hidden, labels, head = problem(2, 5, 1.0, 0)
    labels[:] = IGNORE
    labels[:, 0] = 3  # the first token is predicted by nothing
    total, count = supervised_cross_entropy(hidden, labels, head)
    assert (total.item(), count.item()) == (0.0, 0)
    total.backward()
    for gradient in (hidden.grad, head.weight.grad, head.bias.grad):
        assert gradient is not None and not gradient.any()


def test_the_loss_is_float32_whatever_the_weights() -> None:
    hidden, labels, head = problem(3, 40, 0.9, 0)
    exact = full_cross_entropy(hidden, labels, head)
    total, _ = supervised_cross_entropy(hidden.bfloat16(), labels, head.bfloat16())
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=1e-2)


def test_the_model_returns_it(tiny_model: Callable, family: str) -> None:
    """`loss_sum`, `num_tokens` and their quotient, equal to what stock LLaVA calls its loss."""
    model, _ = tiny_model(family)
    ids = torch.randint(4, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(
        torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5, IGNORE
    )
    output = model(input_ids=ids, labels=labels)
    logits = model(input_ids=ids).logits
    wanted = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
    )
    assert torch.allclose(output.loss, wanted, rtol=1e-6)
    assert output.num_tokens == (labels[:, 1:] != IGNORE).sum()
    assert torch.allclose(output.loss_sum, wanted * output.num_tokens, rtol=1e-6)
    assert output.logits is None
