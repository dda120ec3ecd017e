"""Turn the config.json of a released checkpoint into configs of transformers.

No name or path decides anything: the family is the config's `model_type`, and the names of the
tensors give the kind of tower.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    GemmaConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    SiglipVisionConfig,
)

from mipha.files import read_json_object


@dataclass(frozen=True)
class Family:
    """A released layout.

    Args:
        architectures: Classes that its config may name.
        config: Config of its language model in transformers.
        causal: Causal class of its language model in transformers.
    """

    architectures: tuple[str, ...]
    config: type[PretrainedConfig]
    causal: str


_LLAVA = Family(("LlavaLlamaForCausalLM",), LlamaConfig, "LlamaForCausalLM")
FAMILIES: dict[str, Family] = {
    # Phi-2 and Phi-1.5 share the type; the tensor names tell the fused projection of Phi-1.5.
    "mipha_phi": Family(
        ("MiphaPhiForCausalLM", "MiphaPhi15ForCausalLM"), PhiConfig, "PhiForCausalLM"
    ),
    "mipha_gemma": Family(("MiphaGemmaForCausalLM",), GemmaConfig, "GemmaForCausalLM"),
    "llava": _LLAVA,
    "llava_llama": _LLAVA,
}
"""Layouts by `model_type`, with `_` for `-`.

Source: Mipha 21dafbf, configuration_mipha.py; LLaVA 1.5, llava_llama.py.
"""

TOWER_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "siglip": SiglipVisionConfig,
    "clip": CLIPVisionConfig,
    "dinov2": Dinov2Config,
}
_TOWER_FACTS = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
}
"""Facts that the config must state: upstream's defaults are those of another tower."""


@dataclass(frozen=True)
class Described:
    """The content of config.json.

    Args:
        text: Config of the language model.
        causal: Causal class of the language model.
        tower: Facts of the tower inside the checkpoint; None where the config only names a tower.
        tower_name: Folder or hub id of the tower that the checkpoint was made with.
        feature_layer: Index of the hidden state that is read.
        features: `patch`, or `cls_patch` with the class token.
        pad_to_square: Whether images are padded; otherwise squashed.
    """

    text: PretrainedConfig
    causal: str
    tower: Mapping[str, Any] | None
    tower_name: str
    feature_layer: int
    features: str
    pad_to_square: bool


@dataclass(frozen=True)
class Pixels:
    """The content of preprocessor_config.json.

    Args:
        size: Pixels a side.
        mean: Mean of the pixels per channel, of values in 0..1.
        std: Deviation of the pixels per channel.
    """

    size: int
    mean: list[float]
    std: list[float]


def describe(config: Mapping[str, Any], folder: Path) -> Described:
    """Read a config, and refuse one that the standard model cannot express.

    Args:
        config: Content of config.json.
        folder: Folder that it comes from, for messages.

    Raises:
        ValueError: Another architecture or projector, images in several crops, or missing facts.
    """
    # Find the family.
    kind = str(config.get("model_type")).replace("-", "_")
    if "text_config" in config:
        raise ValueError(f"{folder} is already a standard {kind} checkpoint: use it as it is")
    if kind not in FAMILIES:
        raise ValueError(
            f"{folder} is a {config.get('model_type')!r}: "
            f"released checkpoints are {', '.join(FAMILIES)}"
        )
    family, named = FAMILIES[kind], config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(
            f"{folder}/config.json sets architectures to {named!r}: give a list with the class"
        )
    if named and not set(named) & set(family.architectures):
        raise ValueError(
            f"{folder} names the class {named[0]!r}, not {' or '.join(family.architectures)}: "
            "fix config.json"
        )

    # Find the tower and the projector: Mipha has a config of its own for each.
    vision = config.get("vision_config") or {}
    if not isinstance(vision, dict):
        raise ValueError(f"{folder}/config.json holds a vision_config that is no object: fix it")
    if kind.startswith("mipha"):
        absent = [
            part
            for part in ("vision_tower", "mm_projector")
            if not isinstance(vision.get(part), dict)
        ]
        if absent:
            raise ValueError(
                f"{folder}/config.json lacks vision_config.{absent[0]}: "
                "give the config that the checkpoint was saved with"
            )
        tower, projector = vision["vision_tower"], vision["mm_projector"]
        name = tower.get("vision_model_name_or_path")
    else:
        tower, projector, name = config, config, config.get("mm_vision_tower")

    _refuse_what_cannot_be_expressed(config, projector, folder)
    layer = tower.get("mm_vision_select_layer", -2)
    if type(layer) is not int:
        raise ValueError(
            f"{folder}/config.json sets mm_vision_select_layer to {layer!r}: give a whole number"
        )
    return Described(
        text=_text_config(family, config, folder),
        causal=family.causal,
        tower=tower if kind.startswith("mipha") else None,
        tower_name=str(name or ""),
        feature_layer=layer,
        features=str(tower.get("mm_vision_select_feature", "patch")),
        pad_to_square=config.get("image_aspect_ratio") == "pad",
    )


def _refuse_what_cannot_be_expressed(
    config: Mapping[str, Any], projector: Mapping[str, Any], folder: Path
) -> None:
    projector_type = projector.get("mm_projector_type", "linear")
    if projector_type != "mlp2x_gelu":
        raise ValueError(
            f"{folder} has a {projector_type!r} projector: "
            "only mlp2x_gelu is a part of the standard model"
        )

    if config.get("mm_use_im_start_end"):
        raise ValueError(
            f"{folder} puts tokens around its images (mm_use_im_start_end), "
            "as no released model does: it cannot be used"
        )
    if config.get("image_aspect_ratio") not in (None, "pad", "square"):
        raise ValueError(
            f"{folder} has image_aspect_ratio={config['image_aspect_ratio']!r}: "
            "only pad and square can be used"
        )


def _text_config(family: Family, config: Mapping[str, Any], folder: Path) -> PretrainedConfig:
    names = (
        set(family.config.__annotations__) | {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    ) - {"use_cache"}
    facts = {name: config[name] for name in sorted(names) if config.get(name) is not None}
    if family.config is GemmaConfig and facts.get("hidden_act") == "gelu":
        # Upstream ran the exact GELU. For Gemma, transformers reads "gelu" as the tanh form and
        # leaves the other name of the exact form alone.
        facts["hidden_act"] = "gelu_python"
    return _checked(family.config, facts, folder)


def tower_family(names: Collection[str]) -> str | None:
    """Return the kind of tower in a checkpoint, by its tensor names; None for no tower."""
    towers = [name for name in names if name.startswith("model.vision_tower.")]
    if not towers:
        return None
    if any(name.startswith("model.vision_tower.dinov2.") for name in towers):
        return "dinov2"
    return (
        "clip" if any(name.endswith(".embeddings.class_embedding") for name in towers) else "siglip"
    )


def tower_config(
    described: Described, family: str, size: int | None, folder: Path
) -> PretrainedConfig:
    """Return the tower's config, without the layers above the one that is read.

    Args:
        described: Content of config.json.
        family: Kind of tower.
        size: Pixels a side that the image processor makes; only DINOv2 can take another size than
            its own. None where there is no image processor.
        folder: Folder of the checkpoint, for messages.

    Raises:
        ValueError: Facts are missing, there is no such layer, or image size and tower do not fit.
    """
    facts = described.tower or {}
    absent = sorted(_TOWER_FACTS - facts.keys())
    if absent:
        raise ValueError(
            f"{folder}/config.json lacks the tower's {absent[0]}: give the config of the checkpoint"
        )

    whole = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    for name in whole:
        if type(facts[name]) is not int or facts[name] < 1:
            raise ValueError(
                f"{folder}/config.json sets the tower's {name} to {facts[name]!r}: "
                "give a whole number above 0"
            )

    # Cut the tower after the layer that is read.
    depth, layer = facts["num_hidden_layers"], described.feature_layer
    kept = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= kept <= depth:
        raise ValueError(
            f"{folder}/config.json reads layer {layer} of a tower with {depth} layers: "
            "fix mm_vision_select_layer"
        )

    config_class = TOWER_CONFIGS[family]
    chosen = {
        name: facts[name] for name in config_class.__annotations__ if facts.get(name) is not None
    }
    unread = {"siglip": {"vision_use_head": False}, "dinov2": {"use_mask_token": False}}
    chosen |= {"num_hidden_layers": kept} | unread.get(family, {})
    config = _checked(config_class, chosen, folder)

    if size and size != config.image_size:
        if family != "dinov2":
            check_size(size, config.image_size, folder)
        config.image_size = size
    return config


def check_size(size: int, wanted: int, folder: Path) -> None:
    """Refuse images of another size than the tower's: they would take another number of tokens.

    Raises:
        ValueError: The sizes differ.
    """
    if size != wanted:
        raise ValueError(
            f"{folder}/preprocessor_config.json makes images of {size} pixels, "
            f"its tower takes {wanted}: give the tower's own"
        )


def read_pixels(folder: Path) -> Pixels | None:
    """Read preprocessor_config.json; None where there is none.

    Raises:
        ValueError: It does not make square images of one size, or lacks mean and deviation.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None

    content = read_json_object(path)
    size = content.get("crop_size") if content.get("do_center_crop") else content.get("size")
    sides = set(size.values()) if isinstance(size, dict) else {size}
    side = sides.pop() if len(sides) == 1 else None
    means = [content.get("image_mean"), content.get("image_std")]
    if not isinstance(side, int) or not all(
        isinstance(mean, list) and len(mean) == 3 for mean in means
    ):
        raise ValueError(
            f"{path} does not give one size for square images, with image_mean and image_std: "
            "copy it from the tower"
        )
    return Pixels(side, *means)


def _checked(
    config_class: type[PretrainedConfig], facts: Mapping[str, Any], folder: Path
) -> PretrainedConfig:
    try:
        return config_class(**facts)
    except (StrictDataclassError, ArithmeticError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder}/config.json is no {config_class.__name__}: "
            f"fix it or copy it again ({reason})"
        ) from error
