"""Write tower and projector as llama.cpp's multimodal runtime reads them (`mmproj`).

Source: llama.cpp `tools/mtmd/clip.cpp`, `clip-impl.h` and `models/llava.cpp`: names, fields, and
    the computation of the graph.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from transformers import LlavaConfig

from mipha.deploy.gguf.language_model import family_of
from mipha.deploy.gguf.writer import Field, Tensor, Weights

_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "post_layernorm": "v.post_ln",
    "linear_1": "mm.0",
    "linear_2": "mm.2",
}
_LAYER_NAMES = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}

_USES_GELU = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True, "gelu_new": True}
"""Activations of a tower: llama.cpp has the quick form, and computes the exact one as tanh."""


def check_mmproj(config: LlavaConfig) -> None:
    """Refuse a model that the runtime cannot compute.

    Raises:
        ValueError: The tower is neither CLIP nor SigLIP, or the runtime's LLaVA has no place for a
            value of the config.
    """
    vision = config.vision_config
    kind = vision.model_type.removesuffix("_vision_model")
    if kind not in ("clip", "siglip"):
        raise ValueError(
            f"llama.cpp's LLaVA has no {kind!r} tower, only CLIP and SigLIP: "
            "train with one of these, or serve with transformers"
        )

    strategy = "default" if kind == "clip" else "full"
    supported = {
        "vision_config.hidden_act": (vision.hidden_act, tuple(_USES_GELU)),
        "projector_hidden_act": (
            config.projector_hidden_act,
            ("gelu", "gelu_pytorch_tanh", "gelu_new"),
        ),
        "multimodal_projector_bias": (config.multimodal_projector_bias, (True,)),
        "vision_feature_layer": (config.vision_feature_layer, (-1, vision.num_hidden_layers)),
        "vision_feature_select_strategy": (config.vision_feature_select_strategy, (strategy,)),
    }
    for key, (found, known) in supported.items():
        if found not in known:
            raise ValueError(
                f"{key} is {found!r}, but llama.cpp's LLaVA computes only "
                f"{' or '.join(map(repr, known))}: build the model with that value"
            )


def mmproj_fields(
    config: LlavaConfig, image_mean: list[float], image_std: list[float]
) -> dict[str, Field]:
    """Return the fields of tower, projector and images, by llama.cpp's keys.

    Args:
        config: Config of the model.
        image_mean: Mean of the pixels per channel, of values in 0..1.
        image_std: Deviation of the pixels per channel.
    """
    vision = config.vision_config
    return {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": _USES_GELU[vision.hidden_act],
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.projection_dim": config.text_config.hidden_size,
        "clip.vision.block_count": vision.num_hidden_layers,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.layer_norm_eps),
        # The tower ends at the layer that is read. Without this, a LLaVA's last layer is skipped.
        "clip.vision.feature_layer": [vision.num_hidden_layers],
        "clip.vision.image_mean": [float(value) for value in image_mean],
        "clip.vision.image_std": [float(value) for value in image_std],
    }


def mmproj_tensors(weights: Weights, config: LlavaConfig) -> list[Tensor]:
    """Return the weights of tower and projector under llama.cpp's names."""
    reads_normed = getattr(config.vision_config, "tie_last_hidden_states", False)
    scale = (
        config.text_config.hidden_size**-0.5
        if family_of(config.text_config).scales_images
        else None
    )

    found = []
    for key in [*weights.names("vision_tower."), *weights.names("multi_modal_projector.")]:
        plain = key.split(".", 1)[1].removeprefix("vision_model.")
        if plain.startswith("head.") or (plain.startswith("post_layernorm.") and not reads_normed):
            continue  # no feature passes through it
        change: Any = (lambda value: value * scale) if scale and "linear_2" in plain else None
        found.append(weights.tensor(key, _name(plain), change, kept="position_embedding" in plain))
    return _with_positions_in_place({tensor.name: tensor for tensor in found})


def _with_positions_in_place(found: dict[str, Tensor]) -> list[Tensor]:
    """Return the tensors with the positions added to the class token and the patches' bias.

    llama.cpp puts the class token behind the patches, but numbers positions as if it stood before
    them (issue 25814), so every patch would get its neighbour's. This way positions are right in
    either order.
    """
    if "v.class_embd" not in found:
        return list(found.values())

    token, table = found["v.class_embd"], found["v.position_embd.weight"]
    assert "v.patch_embd.bias" not in found, "a tower with a class token and a bias of its patches"
    placed = {
        "v.class_embd": Tensor(
            token.name, token.shape, lambda: token.read() + table.read()[0], kept=True
        ),
        "v.patch_embd.bias": Tensor(
            "v.patch_embd.bias",
            (table.shape[0] - 1, table.shape[1]),
            lambda: table.read()[1:],
            kept=True,
        ),
        "v.position_embd.weight": Tensor(
            table.name, table.shape, lambda: np.zeros(table.shape, np.float32), kept=True
        ),
    }
    return list((found | placed).values())


def _name(plain: str) -> str:
    """Return llama.cpp's name; the end `.weight` or `.bias` stays."""
    stem, end = re.fullmatch(r"(.*?)(\.weight|\.bias)?", plain).groups()  # type: ignore[union-attr]
    if layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", stem):
        return f"v.blk.{layer[1]}.{_LAYER_NAMES[layer[2]]}{end}"
    return _NAMES[stem] + (end or "")
