"""The bias of the head, and the loss of a batch, whatever is supervised in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, PhiConfig, PreTrainedConfig

from mipha.labels import IGNORE
from mipha.models.modeling import head_bias


@pytest.mark.parametrize(
    ("text", "has_bias"),
    [
        (PhiConfig(), True),  # as stock transformers saves it, which says nothing of a bias
        (LlamaConfig(), False),
        (PhiConfig(lm_head_bias=False), False),
        (LlamaConfig(lm_head_bias=True), True),
    ],
)
def test_a_phi_has_a_bias_unless_its_config_says_otherwise(
    text: PreTrainedConfig, has_bias: bool
) -> None:
    assert head_bias(LlavaConfig(text_config=text)) is has_bias


@pytest.mark.parametrize("num_supervised", [0, 1, 2])
def test_the_loss_is_the_mean_over_supervised_tokens(
    num_supervised: int, tiny_model: Callable
) -> None:
    model, _ = tiny_model()
    ids = torch.arange(10, 18)[None]
    labels = torch.full_like(ids, IGNORE)
    labels[0, 1 : 1 + num_supervised] = ids[0, 1 : 1 + num_supervised]
    with torch.no_grad():
        found = model(input_ids=ids, labels=labels)
    assert found.num_tokens == num_supervised
    assert found.loss == pytest.approx(found.loss_sum / max(1, num_supervised))
