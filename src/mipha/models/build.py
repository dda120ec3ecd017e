"""ModelRecipe -> (model, processor): pretrained parts composed into one standard LLaVA.

tower  --prune dead layers, resize positions-->  vision_tower              models/vision_tower.py
LM     --image token in an unused row-------->   language_model, lm_head   models/language_model.py
widths --------------------------------------->  multi_modal_projector (new)
                                                 -> LlavaForConditionalGeneration
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mipha.catalog.full_size import CONFIGS, part_config
from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.catalog.vision_towers import VISION_TOWERS
from mipha.lookup import files_in
from mipha.models.folders import locate
from mipha.models.language_model import (
    add_image_token,
    end_of_turn,
    load_language_model,
    load_tokenizer,
    read_config,
)
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.processing import IMAGE_TOKEN, build_processor
from mipha.models.projector import new_projector
from mipha.models.vision_tower import (
    TOWERS,
    fit_tower,
    load_vision_tower,
    num_prefix_tokens,
    read_tower,
)
from mipha.recipe import ModelRecipe


def build(
    recipe: ModelRecipe, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Compose pretrained parts.

    Args:
        recipe: Which parts, which feature layer, which image size.
        dtype: Of all weights.

    Raises:
        FileNotFoundError: A part is neither a catalog name, a folder nor a hub id that can be reached.
        ValueError: The parts do not go together, or a part is of a kind that cannot be used.
    """
    random = torch.get_rng_state()
    tower, mean, std = load_vision_tower(recipe, dtype)
    language_model, tokenizer, template = load_language_model(recipe, dtype)
    torch.set_rng_state(
        random
    )  # loading may draw numbers: the projector's start is to depend on the seed alone
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
    """Join a causal language model and a pruned tower with a new projector.

    Raises:
        ValueError: One image is longer than what the language model reads, or sees at a time.
    """
    image_token_id = add_image_token(tokenizer, language_model)
    text_config = language_model.config
    text_config.architectures = [type(language_model).__name__]  # llama.cpp and vLLM read it
    head = language_model.get_output_embeddings()
    text_config.lm_head_bias = head.bias is not None
    if text_config.tie_word_embeddings and not hasattr(language_model.base_model, "embed_tokens"):
        # The stock class ties its head to a layer of this name alone: GPT-2's head gets a copy of its own.
        head.weight = nn.Parameter(head.weight.detach().clone())
        text_config.tie_word_embeddings = False
    prefix = num_prefix_tokens(tower)
    config = _llava_config(tower.config, prefix, text_config, image_token_id)
    with torch.device(
        "meta"
    ):  # the parts replace everything: no memory, no random start for what is thrown away
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language_model.base_model
    model.lm_head = head
    model.model.multi_modal_projector = new_projector(
        model.model.multi_modal_projector, language_model
    )
    model.tie_weights()
    model.config.tie_word_embeddings = bool(text_config.tie_word_embeddings)
    # The tokenizer and the template know the end of a turn; configs in the wild do not (the released Mipha-3B says id 2).
    ends = {
        tokenizer.eos_token_id,
        end_of_turn(tokenizer, template),
        *_as_ids(language_model.generation_config.eos_token_id),
    }
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(ends - {None}),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        do_sample=False,
    )
    processor = build_processor(tokenizer, template, tower.config, mean, std, pad_to_square, prefix)
    return model.eval(), processor


def skeleton(recipe: ModelRecipe) -> LlavaForConditionalGeneration:
    """The model of a recipe on the meta device, without weights: what it will weigh, how long an image is, its checkpoint's keys.

    Catalog names are read from the configs that come with them, so nothing is fetched. The rows that a full vocabulary gets
    for the image token are not there: no tokenizer is read.

    Raises:
        FileNotFoundError: A part is neither a catalog name, a folder nor a hub id that can be reached.
        ValueError: The parts do not go together, or a part is of a kind that cannot be used.
    """
    vision_config = _part_config(recipe.vision_tower, "vision tower", list(VISION_TOWERS))
    text_config = _part_config(recipe.language_model, "language model", list(LANGUAGE_MODELS))
    with torch.device("meta"):
        tower = TOWERS[vision_config.model_type](vision_config)
        tower = fit_tower(tower, recipe.feature_layer, recipe.image_size, recipe.post_layernorm)
        config = _llava_config(
            tower.config,
            num_prefix_tokens(tower),
            text_config,
            image_token_id=text_config.vocab_size - 1,
        )
        return LlavaForConditionalGeneration(config).eval()


def load_parts_processor(recipe: ModelRecipe) -> LlavaProcessor:
    """The processor of a recipe's model, without its weights: for looking at samples, and for their lengths.

    Raises:
        FileNotFoundError: A part is neither a catalog name, a folder nor a hub id that can be reached.
        ValueError: A part is of a kind that cannot be used.
    """
    _, text_config, tokenizer, template = load_tokenizer(recipe)
    _, vision_config, mean, std = read_tower(recipe.vision_tower)
    add_image_token(tokenizer)
    with torch.device("meta"):
        tower = TOWERS[vision_config.model_type](vision_config)
        tower = fit_tower(tower, recipe.feature_layer, recipe.image_size, recipe.post_layernorm)
        prefix = num_prefix_tokens(tower)
    _llava_config(
        tower.config, prefix, text_config, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    )  # refuses an image that is too long
    return build_processor(
        tokenizer, template, tower.config, mean, std, recipe.pad_to_square, prefix
    )


def _part_config(name: str, kind: str, known: list[str]) -> PretrainedConfig:
    if name in known and name in files_in(CONFIGS, ".json"):
        return AutoConfig.for_model(**part_config(name))
    folder = locate(name, name, kind, known)
    return (
        read_config(folder, name)
        if kind == "language model"
        else AutoConfig.from_pretrained(folder)
    )


def _llava_config(
    vision_config: PretrainedConfig,
    num_prefix_tokens: int,
    text_config: PretrainedConfig,
    image_token_id: int,
) -> LlavaConfig:
    """The stock config that joins two parts.

    Args:
        vision_config: Of the tower as it is read: pruned, and at its final image size.
        num_prefix_tokens: Tokens before the patches. The stock class leaves out the first; registers behind it stay.
    """
    num_tokens = (vision_config.image_size // vision_config.patch_size) ** 2 + max(
        0, num_prefix_tokens - 1
    )
    too_long = f"an image of {vision_config.image_size} pixels takes {num_tokens} tokens, but"
    longest, window = (
        getattr(text_config, key, None) for key in ("max_position_embeddings", "sliding_window")
    )
    if longest and num_tokens >= longest:
        raise ValueError(
            f"{too_long} the language model reads {longest} in all: use a smaller model.image_size"
        )
    # Words behind the image could not see where it begins; and packed rows and batches of questions know no window.
    if window and num_tokens >= window:
        raise ValueError(
            f"{too_long} the language model's sliding layers see {window} at a time: use a smaller model.image_size or tower"
        )
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        vision_feature_layer=-1,  # pruned to the layer that is read
        vision_feature_select_strategy="default" if num_prefix_tokens else "full",
        projector_hidden_act="gelu",
        image_seq_length=num_tokens,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )


def _as_ids(value: int | list[int] | None) -> list[int | None]:
    return value if isinstance(value, list) else [value]


def save_checkpoint(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint that stock transformers loads, whole or not at all.

    Args:
        folder: Must not exist; it appears when everything is in it.
        weights: The whole state dict where the model's own is sharded.
    """
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    for part in (model.config.text_config, model.config.vision_config):
        part._name_or_path = (
            ""  # else the folder on this machine that it was read from goes into a public file
        )
    model.save_pretrained(beside, state_dict=weights)
    processor.save_pretrained(beside)
    beside.rename(folder)
