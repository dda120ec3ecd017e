"""The vision tower of a recipe: read, cut to the layer whose features are used, sized to the image."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    BaseImageProcessor,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mipha.catalog.full_size import part_config
from mipha.catalog.vision_towers import VISION_TOWERS
from mipha.models.folders import load_weights, locate, model_type, reading
from mipha.models.resolution import checked_image_size, resize_positions
from mipha.recipe import ModelRecipe

TOWERS: dict[str, type[PreTrainedModel]] = {
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3_vit": DINOv3ViTModel,
    "vit": ViTModel,
}
"""By `model_type`: the class that holds the vision tower alone."""

_UNREAD = ("head.", "pooler.", "embeddings.mask_token")
"""Weights that no feature passes: published files may lack them, and what a config can leave out is left out."""


def load_vision_tower(
    recipe: ModelRecipe, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[float], list[float]]:
    """The tower as the recipe wants it, with the mean and the deviation of its pixels, per channel, of values in 0..1.

    Raises:
        FileNotFoundError: It is nowhere, or its folder is not whole.
        ValueError: It is of a kind that cannot be a tower, or cannot be fitted.
    """
    folder, config, mean, std = read_tower(recipe.vision_tower)
    tower_class = TOWERS[config.model_type]
    if folder is None:
        tower = tower_class._from_config(config, dtype=dtype)
    else:
        with reading(folder, "vision tower", recipe.vision_tower):
            tower = load_weights(tower_class, folder, dtype, optional=_UNREAD)
    return (
        fit_tower(tower, recipe.feature_layer, recipe.image_size, recipe.post_layernorm),
        mean,
        std,
    )


def read_tower(name: str) -> tuple[str | None, PretrainedConfig, list[float], list[float]]:
    """What there is to know of a tower before its weights: its folder (null for one that nobody trained), config, mean and deviation.

    Raises:
        FileNotFoundError: It is nowhere, or its folder is not whole.
        ValueError: It is of a kind that cannot be a tower.
    """
    entry = VISION_TOWERS.get(name)
    if entry and entry.path == "untrained":
        return None, AutoConfig.for_model(**part_config(name)), [0.5] * 3, [0.5] * 3
    folder = locate(name, entry.path if entry else name, "vision tower", list(VISION_TOWERS))
    with reading(folder, "vision tower", name):
        kind = model_type(folder)
    if kind not in TOWERS:
        raise ValueError(
            f"vision tower {name!r} is a {kind!r}: a tower is one of {', '.join(sorted(TOWERS))}"
        )
    with reading(folder, "vision tower", name):
        # Only two numbers of it are used; the class itself may want torchvision (DINOv3).
        pixels, _ = BaseImageProcessor.get_image_processor_dict(folder)
    if not pixels.get("image_mean") or not pixels.get("image_std"):
        raise ValueError(
            f"vision tower {name!r} does not say how its pixels are scaled: write image_mean and image_std into its image processor"
        )
    with reading(folder, "vision tower", name):
        config = TOWERS[kind].config_class.from_pretrained(folder)
    return folder, config, list(pixels["image_mean"]), list(pixels["image_std"])


def fit_tower(
    tower: PreTrainedModel,
    feature_layer: int = -2,
    image_size: int | None = None,
    post_layernorm: bool = False,
) -> PreTrainedModel:
    """Drop the layers above the one that is read, and resize the position embeddings to another image size.

    The last layer and pooling head of a tower read at -2 cost 4-7 % of its work and get no gradient.

    Args:
        tower: A vision model of the host.
        feature_layer: Index into its hidden states: 0 is the patch embedding, n the last layer's output, -1 the same.
        image_size: Pixels a side, null for the tower's own.
        post_layernorm: Put the tower's final norm behind the layer that is read.

    Raises:
        ValueError: The tower has no such layer or cannot have this size, or its norm has no place in the stock format.
    """
    depth = tower.config.num_hidden_layers
    layer = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if not 1 <= layer <= depth:
        raise ValueError(
            f"feature_layer={feature_layer} does not exist: this tower has {depth} layers, so 1 to {depth} or -1 to -{depth}"
        )
    size = checked_image_size(image_size, tower.config)
    facts = tower.config.to_dict() | {"num_hidden_layers": layer, "image_size": size}
    facts |= {key: False for key in ("vision_use_head", "use_mask_token") if key in facts}
    backbone_outputs = (
        "out_features",
        "out_indices",
        "stage_names",
    )  # as many as the whole tower had layers; not used here
    config = type(tower.config)(
        **{key: value for key, value in facts.items() if key not in backbone_outputs}
    )
    patch = config.patch_size
    weights = resize_positions(tower.state_dict(), tower.config.image_size // patch, size // patch)
    fitted = _with_weights(type(tower), config, weights, tower)
    return _with_post_layernorm(fitted) if post_layernorm else fitted


def num_prefix_tokens(tower: PreTrainedModel) -> int:
    """Tokens that a tower puts before its patches: its class token and its registers."""
    tokens = _outputs(tower).last_hidden_state.shape[1]
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    assert tokens >= patches, f"{tokens} tokens for {patches} patches"
    return tokens - patches


def _with_post_layernorm(tower: PreTrainedModel) -> PreTrainedModel:
    """The tower with its normed output as last hidden state, which is what the stock LLaVA reads.

    SigLIP and ViT do so by a key of their config, which every host in the range of `pyproject.toml` reads; it is the host that
    computes the norm, so nothing has to be folded. (Folding would not do: the norm's scale and shift go into the projector's
    first layer, the division by each token's deviation does not.) A DINOv2 takes its hidden states inside its encoder, before
    the norm: it becomes the ViT that computes the same. CLIP was trained with a norm on its class token alone.
    """
    refused = f"post_layernorm=true cannot be had of a {tower.config.model_type!r} tower"
    outputs = _outputs(tower)
    if outputs.hidden_states[-1] is outputs.last_hidden_state:
        raise ValueError(
            f"{refused}: it norms its class token alone; use false, or a SigLIP, DINOv2 or ViT"
        )
    if isinstance(tower.config, Dinov2Config) and not tower.config.use_swiglu_ffn:
        tower = _as_vit(tower)
    tower.config.tie_last_hidden_states = True
    outputs = _outputs(tower)
    if outputs.hidden_states[-1] is not outputs.last_hidden_state:
        raise ValueError(
            f"{refused}: the stock class takes its hidden states before the norm; use false, or a SigLIP, DINOv2 or ViT"
        )
    return tower


def _as_vit(tower: PreTrainedModel) -> ViTModel:
    """A DINOv2 as a ViT: the same layers, once each branch's scale is multiplied into the linear layer that ends the branch."""
    own = tower.config
    shared = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "image_size",
        "patch_size",
        "num_channels",
    )
    facts = {
        key: getattr(own, key)
        for key in (*shared, "layer_norm_eps", "qkv_bias", "initializer_range")
    }
    config = ViTConfig(**facts, intermediate_size=own.hidden_size * own.mlp_ratio)
    weights = tower.state_dict()
    for layer in range(own.num_hidden_layers):
        prefix = f"encoder.layer.{layer}."
        for scale, linear in (("layer_scale1", "attention.o_proj"), ("layer_scale2", "mlp.fc2")):
            factor = weights.pop(f"{prefix}{scale}.lambda1")
            weights[f"{prefix}{linear}.weight"] = (
                weights[f"{prefix}{linear}.weight"] * factor[:, None]
            )
            weights[f"{prefix}{linear}.bias"] = weights[f"{prefix}{linear}.bias"] * factor
    names = {
        "encoder.layer.": "layers.",
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
    }
    return _with_weights(
        ViTModel, config, {_renamed(key, names): value for key, value in weights.items()}, tower
    )


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


def _with_weights(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    like: PreTrainedModel,
) -> PreTrainedModel:
    """A tower of this config with these weights; what is left over was pruned."""
    with torch.device(like.device):
        model = model_class._from_config(config, dtype=like.dtype)
    wanted = model.state_dict()
    missing, _ = model.load_state_dict(
        {key: value for key, value in weights.items() if key in wanted}, strict=False
    )
    assert all(key.startswith(_UNREAD) for key in missing), (
        f"the pruned tower wants weights that the whole one lacks: {missing}"
    )
    return model.eval()


@torch.no_grad()
def _outputs(tower: PreTrainedModel) -> BaseModelOutputWithPooling:
    size = tower.config.image_size
    pixels = torch.zeros(
        1, tower.config.num_channels, size, size, dtype=tower.dtype, device=tower.device
    )
    return tower(pixels, output_hidden_states=True)
