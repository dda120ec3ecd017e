"""ModelRecipe -> (model, processor): pretrained parts composed into one standard LLaVA.

tower  --prune dead layers, resize positions-->  vision_tower
LM     --image token in an unused row-------->   language_model, lm_head        -> LlavaForConditionalGeneration
widths --------------------------------------->  multi_modal_projector (new)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    Dinov2Model,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
    ViTModel,
)

from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.catalog.vision_towers import VISION_TOWERS
from mipha.lookup import did_you_mean
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.packaged import packaged_folder
from mipha.models.processing import IMAGE_TOKEN, build_processor, checked_template, load_template
from mipha.models.projector import new_projector
from mipha.recipe import ModelRecipe

TOWERS: dict[str, type[PreTrainedModel]] = {
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "dinov2": Dinov2Model,
    "vit": ViTModel,
}
"""By `model_type`: the class that holds the vision tower alone."""


def build(recipe: ModelRecipe, dtype: torch.dtype = torch.float32) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Compose pretrained parts.

    Args:
        recipe: Which parts, which feature layer, which image size.
        dtype: Of all weights.

    Raises:
        FileNotFoundError: A part is neither a catalog name, a folder nor a hub id that can be reached.
        ValueError: The parts do not go together, or a part is of a kind that cannot be used.
    """
    random = torch.get_rng_state()
    language_model, tokenizer, template = load_language_model(recipe, dtype)
    tower, mean, std = load_vision_tower(recipe, dtype)
    torch.set_rng_state(random)  # loading may draw numbers: the projector's start is to depend on the seed alone
    return compose(language_model, tokenizer, template, tower, mean, std, recipe.pad_to_square)


def compose(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    tower: PreTrainedModel,
    mean: list[float],
    std: list[float],
    pad_to_square: bool = True,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a causal language model and a pruned tower with a new projector."""
    image_token_id = _add_image_token(tokenizer, language_model)
    has_cls = _has_cls(tower)
    text_config = language_model.config
    text_config.architectures = [type(language_model).__name__]  # llama.cpp and vLLM read it
    head = language_model.get_output_embeddings()
    text_config.lm_head_bias = head.bias is not None
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=image_token_id,
        vision_feature_layer=-1,  # pruned to the layer that is read
        vision_feature_select_strategy="default" if has_cls else "full",
        projector_hidden_act="gelu",
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    with torch.device("meta"):  # the parts replace everything: no memory, no random start for what is thrown away
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language_model.base_model
    model.lm_head = head
    model.model.multi_modal_projector = new_projector(model.model.multi_modal_projector, language_model)
    model.tie_weights()
    model.config.tie_word_embeddings = bool(text_config.tie_word_embeddings)
    eos = sorted({tokenizer.eos_token_id, *_as_ids(language_model.generation_config.eos_token_id)} - {None})
    # The tokenizer knows the end of a turn; configs in the wild do not (the released Mipha-3B says id 2).
    model.generation_config = GenerationConfig(
        eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, do_sample=False
    )
    return model.eval(), build_processor(tokenizer, template, tower.config, mean, std, pad_to_square, has_cls)


def load_language_model(recipe: ModelRecipe, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The causal language model, its tokenizer (with a pad token) and the chat template with the loss mask."""
    name = recipe.language_model
    entry = LANGUAGE_MODELS.get(name)
    folder = _locate(name, entry.path if entry else name, "language model", list(LANGUAGE_MODELS))
    with _reading(folder, "language model", name):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so the pad token is never mistaken for an EOS
    wanted = recipe.chat_template or (entry.chat_template if entry else None)
    if wanted:
        template = load_template(wanted, tokenizer)
    elif tokenizer.chat_template:
        template = checked_template(tokenizer.chat_template, tokenizer, source=f"of {name}")
    else:
        raise ValueError(f"language model {name!r} has no chat template: set model.chat_template, for example to vicuna")
    with _reading(folder, "language model", name):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, tokenizer, template


def load_vision_tower(recipe: ModelRecipe, dtype: torch.dtype) -> tuple[PreTrainedModel, list[float], list[float]]:
    """The tower, pruned to the layer that is read and sized to the image, with the mean and deviation of its pixels."""
    name = recipe.vision_tower
    entry = VISION_TOWERS.get(name)
    folder = _locate(name, entry.path if entry else name, "vision tower", list(VISION_TOWERS))
    with _reading(folder, "vision tower", name):
        config = AutoConfig.from_pretrained(folder)
    if config.model_type not in TOWERS:
        raise ValueError(f"vision tower {name!r} is a {config.model_type!r}: a tower is one of {', '.join(sorted(set(TOWERS)))}")
    with _reading(folder, "vision tower", name):
        pixels = AutoImageProcessor.from_pretrained(folder)
        tower = TOWERS[config.model_type].from_pretrained(folder, dtype=dtype)
    return fit_tower(tower, recipe.feature_layer, recipe.image_size), list(pixels.image_mean), list(pixels.image_std)


def fit_tower(tower: PreTrainedModel, feature_layer: int = -2, image_size: int | None = None) -> PreTrainedModel:
    """Drop the layers above the one that is read, and resize the position embeddings to another image size.

    The last layer and pooling head of a tower read at -2 cost 4-7 % of its work and get no gradient.

    Args:
        tower: A vision model of the host.
        feature_layer: Index into its hidden states: 0 is the patch embedding, n the last layer's output, -1 the same.
        image_size: Pixels a side, null for the tower's own.

    Raises:
        ValueError: The tower has no such layer, or the size is smaller than a patch.
    """
    depth = tower.config.num_hidden_layers
    layer = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if not 1 <= layer <= depth:
        raise ValueError(f"feature_layer={feature_layer} does not exist: this tower has {depth} layers, so 1 to {depth} or -1 to -{depth}")
    size = image_size or tower.config.image_size
    if size < tower.config.patch_size:
        raise ValueError(f"image_size={size} is smaller than the tower's patch of {tower.config.patch_size} pixels")
    facts = tower.config.to_dict() | {"num_hidden_layers": layer, "image_size": size}
    if "vision_use_head" in facts:
        facts["vision_use_head"] = False
    backbone_outputs = ("out_features", "out_indices", "stage_names")  # as many as the whole tower had layers; not used here
    config = type(tower.config)(**{key: value for key, value in facts.items() if key not in backbone_outputs})
    weights = {key: _resize_positions(key, value, tower.config, size) for key, value in tower.state_dict().items()}
    fitted = type(tower)._from_config(config, dtype=tower.dtype)
    missing, _ = fitted.load_state_dict({k: v for k, v in weights.items() if k in fitted.state_dict()}, strict=False)
    assert not missing, f"the pruned tower wants weights that the whole one lacks: {missing}"
    return fitted


def _resize_positions(key: str, value: Tensor, config: PretrainedConfig, size: int) -> Tensor:
    """Bicubic with antialias, on the grid of patches; a class token's position stays."""
    old, new = config.image_size // config.patch_size, size // config.patch_size
    if "position_embedding" not in key or old == new:
        return value
    if value.dtype == torch.int64:  # SigLIP's and CLIP's list of positions
        return torch.arange(value.shape[-1] - old * old + new * new, dtype=torch.int64).expand(1, -1)
    table = value.reshape(-1, value.shape[-1])
    extra = len(table) - old * old
    grid = table[extra:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(new * new, -1)
    table = torch.cat([table[:extra], grid.to(table.dtype)])
    return table.reshape(*value.shape[:-2], *table.shape) if value.dim() == 3 else table


def _has_cls(tower: PreTrainedModel) -> bool:
    size = tower.config.image_size
    with torch.no_grad():
        hidden = tower(torch.zeros(1, 3, size, size, dtype=tower.dtype)).last_hidden_state
    patches = (size // tower.config.patch_size) ** 2
    if hidden.shape[1] - patches not in (0, 1):
        raise ValueError(
            f"the tower gives {hidden.shape[1]} tokens for {patches} patches: only towers with no or one class token can be used"
        )
    return hidden.shape[1] == patches + 1


def _add_image_token(tokenizer: PreTrainedTokenizerBase, language_model: PreTrainedModel) -> int:
    """Id of the image placeholder: an unused row of the vocabulary where there is one, else 64 new rows."""
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if token_id >= language_model.config.vocab_size:
        language_model.resize_token_embeddings(token_id + 1, pad_to_multiple_of=64, mean_resizing=False)
    return token_id


def _as_ids(value: int | list[int] | None) -> list[int | None]:
    return value if isinstance(value, list) else [value]


def _locate(name: str, path: str, kind: str, known: list[str]) -> str:
    """Folder or hub id of a part."""
    if path.startswith("packaged:"):
        return str(packaged_folder(path.removeprefix("packaged:")))
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"{kind} folder {path} has no config.json: give the folder that save_pretrained wrote")
        return path
    if "/" not in path or path.startswith((".", "/")):
        raise FileNotFoundError(f"no {kind} {name!r}: {did_you_mean(name, known)}, or give a folder or a hub id")
    return path


@contextmanager
def _reading(folder: str, kind: str, name: str) -> Iterator[None]:
    """One sentence for what the host says in many when a file is not there, or a hub cannot be reached."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        mend = "its folder is not whole" if Path(folder).is_dir() else "check the name and the network, or give a folder"
        raise FileNotFoundError(f"{kind} {name!r} cannot be read from {folder}: {mend} ({reason})") from error


def save_checkpoint(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a checkpoint that stock transformers loads, whole or not at all.

    Args:
        folder: Must not exist; it appears when everything is in it.
        weights: The whole state dict where the model's own is sharded.
    """
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, state_dict=weights)
    processor.save_pretrained(beside)
    beside.rename(folder)
