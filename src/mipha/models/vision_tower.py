"""Load the vision tower of a recipe, cut it after the feature layer, and fit it to the image size.

Another image size needs another table of position embeddings. The table is an image of patches, one
pixel a patch, and is resized like one: cubic convolution with a = -0.5, widened by the ratio where
it shrinks (antialias), in float32. The positions of class tokens stay as they are. This happens
once, when the model is built; the checkpoint holds the new table and names the new size.

Source: `resample_abs_pos_embed` of timm, bicubic with antialias; the BICUBIC of Pillow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
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
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from mipha.catalog.full_size import part_config
from mipha.catalog.vision_towers import VISION_TOWERS
from mipha.models.checkpoint_folder import load_weights, locate, model_type, reading
from mipha.models.processing import model_type_of
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
"""The class that holds the vision tower alone, by `model_type`."""

_UNREAD = ("head.", "pooler.", "embeddings.mask_token")
"""Weights that no feature passes: published files may lack them, and configs leave them out."""


def load_vision_tower(
    recipe: ModelRecipe, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[float], list[float]]:
    """Load the tower of a recipe.

    Returns:
        Tower, and mean and deviation of its pixels per channel, of values in 0..1.

    Raises:
        FileNotFoundError: It is not found, or its folder is not whole.
        ValueError: It is of a kind that cannot be a tower, or cannot be fitted.
    """
    folder, config, mean, std = read_tower(recipe.vision_tower)
    check_family(recipe, config)
    tower_class = TOWERS[config.model_type]
    if folder is None:
        tower = tower_class._from_config(config, dtype=dtype)
    else:
        with reading(folder, "vision tower", recipe.vision_tower):
            tower = load_weights(tower_class, folder, dtype, optional=_UNREAD)

    tower = fit_tower(tower, recipe.feature_layer, recipe.image_size, recipe.post_layernorm)
    return tower, mean, std


def check_family(recipe: ModelRecipe, vision: PretrainedConfig) -> None:
    """Refuse a kind of tower that the class of `model.image` cannot read.

    Args:
        recipe: How images enter.
        vision: Config of the tower, before anything is cut.

    Raises:
        ValueError: The tower is of another kind.
    """
    kind, name = model_type_of(recipe), recipe.vision_tower
    family = str(vision.model_type).removesuffix("_vision_model")
    if kind == "llava_next" and family == "dinov3_vit":
        raise ValueError(
            "model.image=anyres cannot take a dinov3 tower: its registers are counted as patches; "
            "use dinov2-... or model.image=tiles"
        )
    if kind in ("idefics3", "lfm2_vl") and family != "siglip":
        shuffled = kind == "idefics3"
        how = f" with model.shuffle={recipe.shuffle}" if shuffled else ""
        fix = "or leave model.shuffle out" if shuffled else "or model.image=tiles"
        raise ValueError(
            f"model.image={recipe.image}{how} takes a SigLIP tower, and {name} is a {family}: "
            f"use a SigLIP tower, {fix}"
        )


def read_tower(name: str) -> tuple[str | None, PretrainedConfig, list[float], list[float]]:
    """Read the config and the pixel scaling of a tower, without its weights.

    Returns:
        Folder or hub id (None for an untrained tower), config, and mean and deviation of its pixels
        per channel, of values in 0..1.

    Raises:
        FileNotFoundError: It is not found, or its folder is not whole.
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
        # The image processor's class may need torchvision (DINOv3); only two values are used.
        pixels, _ = BaseImageProcessor.get_image_processor_dict(folder)
    if not pixels.get("image_mean") or not pixels.get("image_std"):
        raise ValueError(
            f"the image processor of vision tower {name!r} lacks image_mean or image_std: "
            "write both into its preprocessor_config.json"
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
    """Drop the layers above the feature layer, and resize the positions to another image size.

    The last layer and pooling head of a tower read at -2 are 4-7 % of its work and have no effect.

    Args:
        tower: Vision model of transformers.
        feature_layer: Index into its hidden states: 0 is the patch embedding, n the last layer's
            output, -1 the same.
        image_size: Pixels a side; None for the tower's own.
        post_layernorm: Whether the tower's final norm is applied to the layer that is read.

    Raises:
        ValueError: The tower has no such layer, cannot have this size, or its norm has no place in
            the stock format.
    """
    depth = tower.config.num_hidden_layers
    layer = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if not 1 <= layer <= depth:
        raise ValueError(
            f"feature_layer={feature_layer} does not exist: "
            f"this tower has {depth} layers, so 1 to {depth} or -1 to -{depth}"
        )
    size = checked_image_size(image_size, tower.config)

    # Describe the tower that is left.
    facts = tower.config.to_dict() | {"num_hidden_layers": layer, "image_size": size}
    facts |= {key: False for key in ("vision_use_head", "use_mask_token") if key in facts}
    # Outputs of a backbone name as many layers as the whole tower had; nothing here uses them.
    for key in ("out_features", "out_indices", "stage_names"):
        facts.pop(key, None)
    config = type(tower.config)(**facts)

    # Make it, with the weights that it keeps.
    patch = config.patch_size
    weights = resize_positions(tower.state_dict(), tower.config.image_size // patch, size // patch)
    fitted = _with_weights(type(tower), config, weights, tower)
    return _with_post_layernorm(fitted) if post_layernorm else fitted


def checked_image_size(image_size: int | None, config: PretrainedConfig) -> int:
    """Return the size that a tower gets.

    A tower's own size is never refused: SigLIP so400m at 384 pixels reads 27 patches of 14 and
    leaves 6 pixels out, as published.

    Args:
        image_size: Pixels a side; None for the tower's own.
        config: The tower's.

    Raises:
        ValueError: The tower is not square, or the size is no multiple of its patch.
    """
    own, patch = config.image_size, config.patch_size
    if not isinstance(own, int) or not isinstance(patch, int):
        raise ValueError(
            f"the tower reads images of {own} pixels in patches of {patch}: "
            "only square ones can be used"
        )

    if image_size in (None, own):
        return own
    if image_size % patch:
        below = max(1, image_size // patch) * patch
        raise ValueError(
            f"image_size={image_size} is not a multiple of the tower's patch of {patch} pixels: "
            f"use {below} or {below + patch}"
        )
    return image_size


def resize_positions(weights: dict[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """Return a tower's weights with its table of positions on another grid.

    A tower with rotary positions has no table.

    Args:
        weights: State dict. The table is `(positions, width)` or `(1, positions, width)`; its last
            old x old rows are the patches.
        old: Patches a side that the table was made for.
        new: Patches a side.
    """
    if old == new:
        return weights
    return {
        name: _resized_table(table, old, new) if "position_embedding" in name else table
        for name, table in weights.items()
    }


def _resized_table(table: Tensor, old: int, new: int) -> Tensor:
    rows = table.flatten(0, -2)  # (positions, width)
    extra = len(rows) - old * old
    grid = rows[extra:].float().unflatten(0, (old, old)).permute(2, 0, 1)  # (width, old, old)
    grid = F.interpolate(grid[None], size=(new, new), mode="bicubic", antialias=True)[0]
    rows = torch.cat([rows[:extra], grid.flatten(1).T.to(rows.dtype)])
    return rows.reshape(*table.shape[:-2], *rows.shape)


def as_idefics3(tower: PreTrainedModel) -> PreTrainedModel:
    """Return a fitted SigLIP tower as the one of Idefics3, whose weights have the same names.

    Source: transformers 5.23 `Idefics3VisionTransformer`; features of both are equal.
    """
    config = idefics3_config(tower.config)
    return _with_weights(Idefics3VisionTransformer, config, tower.state_dict(), tower)


def as_siglip2(tower: PreTrainedModel) -> PreTrainedModel:
    """Return a fitted SigLIP tower as the one of LFM2-VL, which reads images of any shape.

    The convolution over patches becomes a linear layer; the table of positions stays, and the class
    resizes it for each image. Features at the tower's own size are equal.
    """
    weights = tower.state_dict()
    name = "embeddings.patch_embedding.weight"
    kernel = weights[name]  # (width, 3, patch, patch)
    weights[name] = kernel.permute(0, 2, 3, 1).flatten(1)  # (width, patch x patch x 3)
    return _with_weights(Siglip2VisionModel, siglip2_config(tower.config), weights, tower)


def idefics3_config(config: PretrainedConfig) -> Idefics3VisionConfig:
    """Return the config of a SigLIP as Idefics3 has it."""
    return Idefics3VisionConfig(**_shared(config), image_size=config.image_size)


def siglip2_config(config: PretrainedConfig) -> Siglip2VisionConfig:
    """Return the config of a SigLIP as LFM2-VL has it."""
    patches = (config.image_size // config.patch_size) ** 2
    return Siglip2VisionConfig(**_shared(config), num_patches=patches, vision_use_head=False)


def _shared(config: PretrainedConfig) -> dict[str, Any]:
    """Return what the relatives of a SigLIP have in common with it."""
    keys = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("patch_size", "num_channels", "hidden_act", "layer_norm_eps", "attention_dropout"),
    )
    return {key: getattr(config, key) for key in keys}


def num_prefix_tokens(tower: PreTrainedModel) -> int:
    """Return how many tokens a tower puts before its patches: its class token and its registers."""
    tokens = _outputs(tower).last_hidden_state.shape[1]
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    assert tokens >= patches, f"{tokens} tokens for {patches} patches"
    return tokens - patches


def _with_post_layernorm(tower: PreTrainedModel) -> PreTrainedModel:
    """Return the tower with its normed output as last hidden state, the one that LLaVA reads.

    SigLIP and ViT do so by a key of their config, which every transformers in the range of
    `pyproject.toml` reads; transformers computes the norm, so no weights are folded. (Folding
    cannot work: the projector's first layer can take the norm's scale and shift, but not the
    division by each token's deviation.) A DINOv2 takes its hidden states before the norm, inside
    its encoder, so it becomes the ViT that computes the same. CLIP was trained with a norm on its
    class token alone.
    """
    refused = f"post_layernorm=true is not supported for {tower.config.model_type!r} towers"
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
            f"{refused}: the stock class takes its hidden states before the norm; "
            "use false, or a SigLIP, DINOv2 or ViT"
        )
    return tower


def _as_vit(tower: PreTrainedModel) -> ViTModel:
    """Return a DINOv2 as a ViT: the scale of each branch is folded into its last linear layer."""
    own = tower.config
    shared = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "image_size"),
        *("patch_size", "num_channels", "layer_norm_eps", "qkv_bias", "initializer_range"),
    )
    facts = {key: getattr(own, key) for key in shared}
    config = ViTConfig(**facts, intermediate_size=own.hidden_size * own.mlp_ratio)

    # Fold the scales.
    weights = tower.state_dict()
    for layer in range(own.num_hidden_layers):
        prefix = f"encoder.layer.{layer}."
        for scale, linear in (("layer_scale1", "attention.o_proj"), ("layer_scale2", "mlp.fc2")):
            factor = weights.pop(f"{prefix}{scale}.lambda1")  # (width,)
            weight, bias = f"{prefix}{linear}.weight", f"{prefix}{linear}.bias"
            weights[weight] = weights[weight] * factor[:, None]
            weights[bias] = weights[bias] * factor

    # Give the rest the names of a ViT.
    renamed = {}
    for key, value in weights.items():
        key = key.replace("encoder.layer.", "layers.")
        key = key.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        renamed[key] = value
    return _with_weights(ViTModel, config, renamed, tower)


def _with_weights(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    like: PreTrainedModel,
) -> PreTrainedModel:
    """Return a tower of this config with these weights; weights that are left over were pruned."""
    with torch.device(like.device):
        model = model_class._from_config(config, dtype=like.dtype)

    wanted = model.state_dict()
    kept = {key: value for key, value in weights.items() if key in wanted}
    missing, _ = model.load_state_dict(kept, strict=False)
    assert all(key.startswith(_UNREAD) for key in missing), (
        f"the pruned tower needs weights that the whole one lacks: {missing}"
    )
    return model.eval()


@torch.no_grad()
def _outputs(tower: PreTrainedModel) -> BaseModelOutputWithPooling:
    """Run the tower on one black image."""
    size = tower.config.image_size
    pixels = torch.zeros(
        1, tower.config.num_channels, size, size, dtype=tower.dtype, device=tower.device
    )
    return tower(pixels, output_hidden_states=True)
