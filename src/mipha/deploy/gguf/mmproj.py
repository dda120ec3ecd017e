"""Write tower and projector as llama.cpp's multimodal runtime reads them (`mmproj`).

Source: llama.cpp `tools/mtmd/clip.cpp`, `clip-impl.h` and `models/{llava,siglip}.cpp`: names,
    fields, and the computation of the graphs; `conversion/{smolvlm,lfm2}.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from mipha.deploy.gguf.header import PROCESSOR
from mipha.deploy.gguf.language_model import family_of
from mipha.deploy.gguf.writer import Field, Tensor, Weights
from mipha.geometry import Native, Shuffled, Square, read_geometry

_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "post_layernorm": "v.post_ln",
    "linear_1": "mm.0",
    "linear_2": "mm.2",
}
_PREFIXES = (
    *("vision_tower.", "multi_modal_projector."),
    *("model.vision_model.", "model.connector."),
    *("model.vision_tower.", "model.multi_modal_projector."),
)
"""Beginnings of the weights of tower and projector in LLaVA, Idefics3 and LFM2-VL."""

_PREFIX = re.compile(rf"^({'|'.join(map(re.escape, _PREFIXES))})(vision_model\.)?")

_PROJECTOR_TYPES = {"llava": "mlp", "idefics3": "idefics3", "lfm2_vl": "lfm2"}
_PROJECTORS = {
    "idefics3": {"modality_projection.proj": "mm.model.fc"},
    "lfm2_vl": {"linear_1": "mm.1", "linear_2": "mm.2", "layer_norm": "mm.input_norm"},
}
"""Layers of the projector that the other classes name otherwise."""

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

_GELU = tuple(name for name, is_plain in _USES_GELU.items() if is_plain)
"""Activations of a projector."""


def check_mmproj(config: PretrainedConfig) -> None:
    """Refuse a model that the runtime cannot compute.

    Raises:
        ValueError: The tower is neither CLIP nor SigLIP, or the runtime's LLaVA has no place for a
            value of the config.
    """
    vision = config.vision_config
    supported = {"vision_config.hidden_act": (vision.hidden_act, tuple(_USES_GELU))}
    if config.model_type == "lfm2_vl":
        supported |= {
            "projector_hidden_act": (config.projector_hidden_act, _GELU),
            "projector_bias": (config.projector_bias, (True,)),
        }
    elif config.model_type == "llava":
        kind = vision.model_type.removesuffix("_vision_model")
        if kind not in ("clip", "siglip"):
            raise ValueError(
                f"llama.cpp's LLaVA has no {kind!r} tower, only CLIP and SigLIP: "
                "train with one of these, or serve with transformers"
            )
        strategy = "default" if kind == "clip" else "full"
        supported |= {
            "projector_hidden_act": (config.projector_hidden_act, _GELU),
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


def mmproj_fields(config: PretrainedConfig, processor: Mapping[str, Any]) -> dict[str, Field]:
    """Return the fields of tower, projector and images, by llama.cpp's keys.

    Args:
        config: Config of the model.
        processor: Content of its processor_config.json.
    """
    vision, image = config.vision_config, processor["image_processor"]
    fields: dict[str, Field] = {
        "clip.has_vision_encoder": True,
        "clip.projector_type": _PROJECTOR_TYPES[config.model_type],
        "clip.use_gelu": _USES_GELU[vision.hidden_act],
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.projection_dim": config.text_config.hidden_size,
        "clip.vision.block_count": vision.num_hidden_layers,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.layer_norm_eps),
        "clip.vision.image_mean": [float(value) for value in image["image_mean"]],
        "clip.vision.image_std": [float(value) for value in image["image_std"]],
    }
    geometry = read_geometry(processor)
    if not isinstance(geometry, Square):
        fields[PROCESSOR] = json.dumps(processor, sort_keys=True)

    if isinstance(geometry, Shuffled):
        return fields | {
            "clip.vision.image_size": vision.image_size,
            "clip.vision.projector.scale_factor": config.scale_factor,
            # Without it, images are cut by the rule of another model.
            "clip.vision.preproc_image_size": geometry.longest_edge,
        }
    if isinstance(geometry, Native):
        return fields | {
            # Only read, because images keep their size.
            "clip.vision.image_size": math.isqrt(vision.num_patches) * vision.patch_size,
            "clip.vision.projector.scale_factor": config.downsample_factor,
        }
    return fields | {
        "clip.vision.image_size": vision.image_size,
        # The tower ends at the layer that is read. Without this, a LLaVA's last layer is skipped.
        "clip.vision.feature_layer": [vision.num_hidden_layers],
    }


def mmproj_tensors(weights: Weights, config: PretrainedConfig) -> list[Tensor]:
    """Return the weights of tower and projector under llama.cpp's names."""
    kind, vision = config.model_type, config.vision_config
    reads_normed = kind != "llava" or getattr(vision, "tie_last_hidden_states", False)
    scale = config.text_config.hidden_size**-0.5

    def scaled(value: np.ndarray) -> np.ndarray:
        return value * scale

    found = []
    for key in [name for prefix in _PREFIXES for name in weights.names(prefix)]:
        plain = _PREFIX.sub("", key)
        if plain.startswith("head.") or (plain.startswith("post_layernorm.") and not reads_normed):
            continue  # no feature passes through it
        is_last = "linear_2" in plain or "modality_projection" in plain
        change = scaled if is_last and family_of(config.text_config).scales_images else None
        name = _name(plain, _NAMES | _PROJECTORS.get(kind, {}))
        if kind == "lfm2_vl" and name == "v.patch_embd.weight":
            found.append(_as_kernel(weights, key, name, vision.patch_size))
            continue
        found.append(weights.tensor(key, name, change, kept="position_embedding" in plain))
    return _with_positions_in_place({tensor.name: tensor for tensor in found})


def _as_kernel(weights: Weights, key: str, name: str, patch: int) -> Tensor:
    """Return a linear layer over patches, `(width, patch x patch x 3)`, as a convolution."""
    width, _ = weights.shape(key)

    def read() -> np.ndarray:
        blocks = weights.read(key).reshape(width, patch, patch, 3)
        return np.ascontiguousarray(blocks.transpose(0, 3, 1, 2))  # (width, 3, patch, patch)

    return Tensor(name, (width, 3, patch, patch), read, kept=True)


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


def _name(plain: str, names: Mapping[str, str]) -> str:
    """Return llama.cpp's name; the end `.weight` or `.bias` stays."""
    stem, end = re.fullmatch(r"(.*?)(\.weight|\.bias)?", plain).groups()  # type: ignore[union-attr]
    if layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", stem):
        return f"v.blk.{layer[1]}.{_LAYER_NAMES[layer[2]]}{end}"
    return names[stem] + (end or "")
