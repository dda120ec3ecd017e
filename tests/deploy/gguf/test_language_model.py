"""Which language models llama.cpp computes as they are, by their configs alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mipha.deploy.gguf.language_model import family_of, language_model_fields


def config(class_name: str, **facts: Any) -> Any:
    import transformers

    return getattr(transformers, class_name)(
        **{"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6} | facts
    )


@pytest.mark.parametrize(
    ("class_name", "facts", "message"),
    [
        ("PhiConfig", {"qk_layernorm": True}, "norms queries and keys"),
        ("GPTNeoXConfig", {"attention_bias": False}, "has no bias"),
        (
            "Qwen2Config",
            {"use_sliding_window": True, "sliding_window": 64},
            "windows in another rhythm",
        ),
        ("Gemma3TextConfig", {"layer_types": ["full_attention"] * 6}, "windows in another rhythm"),
        (
            "Gemma2Config",
            {"head_dim": 8, "query_pre_attn_scalar": 144},
            "the root of 144 where the width of a head is 8",
        ),
        ("LlamaConfig", {"hidden_act": "gelu"}, "its activation is 'gelu', not 'silu'"),
    ],
)
def test_another_model_than_the_family_s_is_refused(
    class_name: str, facts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        family_of(config(class_name, **facts))
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_squeezed_stay_as_they_are() -> None:
    """llama.cpp squeezes Gemma 2's logits in any case, and by 30 if nothing is said."""
    bound = language_model_fields(
        config("Gemma2Config", head_dim=256, final_logit_softcapping=None)
    )["gemma2.final_logit_softcapping"]
    logits = np.linspace(-60, 60, 1001)
    assert np.abs(bound * np.tanh(logits / bound) - logits).max() < 1e-4
    squeezed = language_model_fields(
        config("Gemma2Config", head_dim=256, final_logit_softcapping=30.0)
    )
    assert squeezed["gemma2.final_logit_softcapping"] == 30.0


def test_a_context_ends_where_a_window_that_llama_cpp_does_not_know_would_begin() -> None:
    phi3 = config(
        "Phi3Config",
        max_position_embeddings=4096,
        sliding_window=2047,
        original_max_position_embeddings=4096,
        pad_token_id=0,
    )
    assert language_model_fields(phi3)["phi3.context_length"] == 2047
    gemma3 = language_model_fields(
        config("Gemma3TextConfig", head_dim=256, max_position_embeddings=4096, sliding_window=512)
    )
    assert (gemma3["gemma3.context_length"], gemma3["gemma3.attention.sliding_window"]) == (
        4096,
        512,
    )
    assert (gemma3["gemma3.rope.freq_base"], gemma3["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)
