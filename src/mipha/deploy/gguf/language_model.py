"""Write the language model as llama.cpp reads it: families, fields and weights.

Source: llama.cpp `conversion/{phi,qwen,stablelm,gemma,gpt_neox,llama}.py` and `src/models/*.cpp`,
    for names, layouts and the computation of each graph; b11549 was run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from mipha.deploy.gguf.writer import Field, Tensor, Weights, gguf

# The last one is exact in the checkpoint, and tanh in llama.cpp.
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")
_SILU = ("silu", "swish")

UNCAPPED = 1e5
"""A bound of the logits that has no effect: llama.cpp always applies Gemma 2's bound, and
c * tanh(x / c) is x where c is large."""


@dataclass(frozen=True)
class Family:
    """Facts about the language models of one `model_type`.

    Args:
        architecture: llama.cpp's name.
        activations: Activations of the config that its graph computes.
        tied: Whether it takes the word embeddings as head where there is none.
        window: Period of the layers that see a window; the last of each period sees all. 0 means
            that all layers see all.
        scales_images: Whether its graph multiplies image features, like words, by the root of the
            width.
    """

    architecture: str
    activations: tuple[str, ...] = _SILU
    tied: bool = True
    window: int = 0
    scales_images: bool = False


FAMILIES = {
    "llama": Family("llama"),
    "mistral": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi": Family("phi2", _TANH, tied=False),
    "phi3": Family("phi3"),
    "stablelm": Family("stablelm", tied=False),
    "gpt_neox": Family("gptneox", _TANH, tied=False),
    "gemma": Family("gemma", _TANH, scales_images=True),
    "gemma2": Family("gemma2", _TANH, window=2, scales_images=True),
    "gemma3_text": Family("gemma3", _TANH, window=6),
}


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a language model.

    Args:
        config: Text config of the checkpoint.

    Raises:
        ValueError: llama.cpp has no such family, or computes another model than this one.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"a {kind!r} language model cannot be exported to GGUF, only {', '.join(FAMILIES)}: "
            "serve it with transformers"
        )

    # Read the facts that llama.cpp's graph fixes.
    family = FAMILIES[kind]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    rope = _ropes(config)["full_attention"]
    types = getattr(config, "layer_types", None) or []
    rhythm = [
        f"{'sliding' if family.window and (layer + 1) % family.window else 'full'}_attention"
        for layer in range(len(types))
    ]
    scalar = getattr(config, "query_pre_attn_scalar", None)

    # Compare them with the config.
    reason = None
    if activation not in family.activations:
        reason = f"its activation is {activation!r}, not {family.activations[0]!r}"
    elif rope["rope_type"] not in ("default", "linear", "llama3"):
        reason = f"its positions are stretched by the rule {rope['rope_type']!r}"
    elif kind == "phi" and config.qk_layernorm:
        reason = "it norms queries and keys"
    elif kind == "gpt_neox" and not config.attention_bias:
        reason = "its attention has no bias"
    elif getattr(config, "use_sliding_window", False) or (
        types and kind.startswith("gemma") and types != rhythm
    ):
        reason = "its layers see windows in another rhythm"
    elif scalar is not None and scalar != config.head_dim:
        reason = (
            f"it divides by the root of {scalar} where the width of a head is {config.head_dim}"
        )
    if reason:
        raise ValueError(
            f"this {kind!r} language model cannot be exported to GGUF, because {reason}, "
            "which llama.cpp does not compute: serve it with transformers"
        )
    return family


def language_model_fields(config: PretrainedConfig) -> dict[str, Field]:
    """Return the fields of the language model, without its tokenizer, by llama.cpp's keys."""
    family = family_of(config)
    head_dim = _head_dim(config)
    rope = _ropes(config)
    window = getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    if window and not family.window:
        # In llama.cpp all layers of a Phi-3 or Mistral see the whole context, which is the same in
        # a context that is no longer than the window.
        context = min(context, window)

    fields: dict[str, Any] = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None)
        or config.num_attention_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(
            head_dim * (rope["full_attention"].get("partial_rotary_factor") or 1.0)
        ),
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
        "vocab_size": config.vocab_size,
    }

    # Add the fields that only some families have.
    if hasattr(config, "rms_norm_eps"):
        fields["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    else:
        fields["attention.layer_norm_epsilon"] = float(config.layer_norm_eps)
    if rope["full_attention"]["rope_type"] == "linear":
        fields |= {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(rope["full_attention"]["factor"]),
        }
    if config.model_type in ("gpt_neox", "stablelm"):
        fields["use_parallel_residual"] = bool(config.use_parallel_residual)
    if family.window:
        fields |= {
            "attention.sliding_window": window,
            "attention.sliding_window_pattern": family.window,
        }
        fields["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    if config.model_type == "gemma2":
        fields["attn_logit_softcapping"] = float(config.attn_logit_softcapping or UNCAPPED)
        fields["final_logit_softcapping"] = float(config.final_logit_softcapping or UNCAPPED)
    return {f"{family.architecture}.{key}": value for key, value in fields.items()}


def language_model_tensors(weights: Weights, config: PretrainedConfig) -> list[Tensor]:
    """Return the language model's weights under llama.cpp's names, in its layouts.

    Raises:
        ValueError: llama.cpp has no place for a weight of this name.
    """
    family = family_of(config)
    architecture = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture
    )
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    # Name the weights, and collect the norms that StableLM has for each head.
    found, norms = [], {}
    for key, plain in _names(weights).items():
        if config.model_type == "gpt_neox":
            plain = plain.replace("model.", "gpt_neox.", 1)  # the name of its layers outside LLaVA
        if one_head := re.fullmatch(r"(.*)\.norms\.(\d+)\.weight", plain):
            norms.setdefault(one_head[1], {})[int(one_head[2])] = key
            continue
        name = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(
                f"{key} has no place in llama.cpp's {family.architecture!r}: "
                "export the checkpoint as mipha saved it"
            )
        found.append(weights.tensor(key, name, _change(config, plain)))
    found += [
        _stack(weights, f"{names.get_name(norm)}.weight", [keys[head] for head in sorted(keys)])
        for norm, keys in norms.items()
    ]

    # Add the tensors that llama.cpp needs and the checkpoint lacks.
    if config.tie_word_embeddings and not family.tied:
        (words,) = (tensor for tensor in found if tensor.name == "token_embd.weight")
        found.append(Tensor("output.weight", words.shape, words.read, words.kept))
    if config.model_type == "phi" and not any(tensor.name == "output.bias" for tensor in found):
        zeros = np.zeros(config.vocab_size, np.float32)  # the stock classes save none
        found.append(Tensor("output.bias", zeros.shape, lambda: zeros, kept=True))
    if _ropes(config)["full_attention"]["rope_type"] == "llama3":
        factors = _llama3_factors(config)
        found.append(Tensor("rope_freqs.weight", factors.shape, lambda: factors, kept=True))
    return found


_PREFIXES = {
    "language_model.": "",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "lm_head.": "lm_head.",
}
"""Beginnings of a language model's weights in LLaVA, LFM2-VL and Idefics3, and outside of them."""


def _names(weights: Weights) -> dict[str, str]:
    """Return the names of the language model's weights, and those that it has outside a LLaVA."""
    return {
        key: alone + key.removeprefix(prefix)
        for prefix, alone in _PREFIXES.items()
        for key in weights.names(prefix)
    }


def _change(config: PretrainedConfig, name: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return how one weight changes from transformers' layout to llama.cpp's."""
    kind, heads = config.model_type, config.num_attention_heads
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return lambda weight: weight + 1
    if kind in ("llama", "mistral") and ".q_proj." in name:
        return partial(_pairs_together, heads)
    if kind in ("llama", "mistral") and ".k_proj." in name:
        return partial(_pairs_together, config.num_key_value_heads)
    if kind == "gpt_neox" and ".query_key_value." in name:
        return partial(_projections_together, heads)
    return None


def _pairs_together(heads: int, weight: np.ndarray) -> np.ndarray:
    """Put the two rows of a head that rotate together side by side.

    llama.cpp's Llama rotates neighbours, transformers rotates halves.
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _projections_together(heads: int, weight: np.ndarray) -> np.ndarray:
    """Put all queries first, then all keys, then all values.

    Transformers has the three of a head side by side.
    """
    return weight.reshape(heads, 3, -1, *weight.shape[1:]).swapaxes(0, 1).reshape(weight.shape)


def _stack(weights: Weights, name: str, keys: list[str]) -> Tensor:
    """Return StableLM's norms of queries or keys, one a head, as rows of one tensor."""
    return Tensor(
        name,
        (len(keys), *weights.shape(keys[0])),
        lambda: np.stack([weights.read(key) for key in keys]),
        kept=True,
    )


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _ropes(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Return the position rule of each kind of layer."""
    rope = config.rope_parameters
    return rope if "full_attention" in rope else {"full_attention": rope, "sliding_attention": rope}


def _llama3_factors(config: PretrainedConfig) -> np.ndarray:
    """Return the divisor of each frequency, which tells positions apart beyond the trained length.

    Source: the rule of rope type `llama3` in transformers `modeling_rope_utils.py`.
    """
    rope, dim = _ropes(config)["full_attention"], _head_dim(config)
    lengths = 2 * np.pi * float(rope["rope_theta"]) ** (np.arange(0, dim, 2) / dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip(
        (rope["original_max_position_embeddings"] / lengths - low) / (high - low), 0, 1
    )
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
