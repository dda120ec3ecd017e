from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mipha.models.attention import NAME, grouped_sdpa, use_grouped_sdpa


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("num_heads", "num_shared"), [(6, 2), (9, 3), (4, 1), (4, 4)])
def test_it_is_the_hosts_attention(num_heads: int, num_shared: int, additive: bool) -> None:
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
    found, _ = grouped_sdpa(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_model_that_attends_so_says_the_same(tiny_model: Callable[..., Any], family: str) -> None:
    model, _ = tiny_model(family, "siglip")
    model.eval()
    ids = torch.randint(5, 40, (2, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        use_grouped_sdpa(model)
        assert model.config.text_config._attn_implementation == NAME
        assert model.model.language_model.layers[0].self_attn.config._attn_implementation == NAME
        after = model(input_ids=ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(after[seen], before[seen], atol=1e-5, rtol=1e-5)


def test_eager_attention_is_left_alone(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("llama", "siglip")
    model.set_attn_implementation("eager")
    use_grouped_sdpa(model)
    assert model.config.text_config._attn_implementation == "eager"
