"""Build a model and its processor from a recipe: pretrained parts as one standard LLaVA.

tower           --drop unread layers, resize positions-->  vision_tower     models/vision_tower.py
language model  --image token in an unused row---------->  language_model   models/language_model.py
widths          ---------------------------------------->  multi_modal_projector (new)
                                                           -> LlavaForConditionalGeneration

A recipe may name a finished checkpoint instead: it is loaded, and what it says stays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    Idefics3Config,
    Lfm2VlConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mipha.catalog.full_size import CONFIGS, part_config
from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.catalog.vision_towers import VISION_TOWERS
from mipha.checkpoint_files import (
    CheckpointFiles,
    read_chat_template,
    read_checkpoint,
)
from mipha.checkpoint_files import read_config as read_config_file
from mipha.files import read_json_object, whole_folder, write_whole
from mipha.geometry import count_image_tokens, geometry_of
from mipha.lookup import files_in
from mipha.models.chat_template import trainable_template
from mipha.models.checkpoint_folder import fetch, locate
from mipha.models.language_model import (
    add_image_token,
    end_tokens,
    load_language_model,
    load_tokenizer,
    read_config,
    with_pad_token,
)
from mipha.models.modeling import (
    MODELS,
    LlavaForConditionalGeneration,
    load_saved_model,
    model_skeleton,
)
from mipha.models.processing import (
    IMAGE_TOKEN,
    build_processor,
    grids,
    load_processor,
    load_template,
    marks_of,
    model_type_of,
)
from mipha.models.projector import new_end_of_row, new_projector
from mipha.models.vision_tower import (
    TOWERS,
    as_idefics3,
    as_siglip2,
    check_family,
    fit_tower,
    idefics3_config,
    load_vision_tower,
    num_prefix_tokens,
    read_tower,
    siglip2_config,
)
from mipha.preflight import finished_folder
from mipha.recipe import CheckpointRecipe, ModelRecipe

TRAINABLE = ("llava", "llava_next", "idefics3", "lfm2_vl")
"""Values of `model_type` of the models that can be trained."""


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that a model is composed with.

    Args:
        image: Placeholder of an image.
        ends: Tokens that end generation.
        pad: Padding.
        bos: Beginning of a text; None where there is none.
    """

    image: int
    ends: int | list[int] | None
    pad: int | None
    bos: int | None


def build(
    recipe: ModelRecipe | CheckpointRecipe, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Compose the pretrained parts of a recipe, or load its checkpoint.

    Args:
        recipe: Parts, feature layer and image size; or a checkpoint.
        dtype: Type of all weights.

    Raises:
        FileNotFoundError: A part is neither a catalog name, a folder nor a hub id within reach.
        ValueError: The parts do not go together, or a part is of a kind that cannot be used; the
            checkpoint cannot be trained.
    """
    if isinstance(recipe, CheckpointRecipe):
        processor = load_start_processor(recipe)
        model = load_saved_model(str(checkpoint_folder(recipe)), dtype=dtype)
        tokens = model.generation_config
        if recipe.chat_template is not None:
            tokens.eos_token_id = end_tokens(
                processor.tokenizer, processor.chat_template, tokens.eos_token_id
            )
        if tokens.pad_token_id is None:
            tokens.pad_token_id = processor.tokenizer.pad_token_id
        return model, processor

    # Loading may draw random numbers; the projector's start must depend on the seed alone.
    random = torch.get_rng_state()
    tower, mean, std = load_vision_tower(recipe, dtype)
    language_model, tokenizer, template = load_language_model(recipe, dtype)
    torch.set_rng_state(random)

    model, processor = compose(language_model, tokenizer, template, tower, mean, std, recipe)
    processor.boxes = recipe.boxes
    return model, processor


def compose(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    tower: PreTrainedModel,
    mean: list[float],
    std: list[float],
    recipe: ModelRecipe | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a causal language model and a pruned tower with a new projector.

    Args:
        language_model: Causal language model.
        tokenizer: Its tokenizer; gets the image token.
        template: Its chat template.
        tower: Vision tower that ends at the layer that is read.
        mean: Mean of the pixels per channel, of values in 0..1.
        std: Deviation of the pixels per channel.
        recipe: How images enter; None: padded to a square.

    Raises:
        ValueError: One image is longer than the language model's context or sliding window, or the
            tower cannot be read in that way.
    """
    if recipe is not None:
        check_image(recipe, tower.config, mean)
    image_token_id = add_image_token(tokenizer, language_model, marks_of(recipe))

    tokens = SpecialTokens(
        image=image_token_id,
        ends=end_tokens(tokenizer, template, language_model.generation_config.eos_token_id),
        pad=tokenizer.pad_token_id,
        bos=tokenizer.bos_token_id,
    )

    model = join_parts(language_model, tower, tokens, recipe)
    pad, prefix = recipe is None or recipe.pad_to_square, num_prefix_tokens(tower)
    processor = build_processor(tokenizer, template, tower.config, mean, std, pad, prefix, recipe)
    check_longest(processor, language_model.config)
    return model, processor


def check_longest(processor: LlavaProcessor, text_config: PretrainedConfig) -> None:
    """Refuse images that the language model cannot hold.

    Raises:
        ValueError: One image may take as many tokens as the language model reads.
    """
    longest = getattr(text_config, "max_position_embeddings", None)
    most = geometry_of(processor).longest
    if longest and most >= longest:
        raise ValueError(
            f"one image may take {most} tokens, but the language model reads {longest} in all: "
            "lower model.max_tiles or model.max_image_tokens, or use a smaller model.image_size"
        )


def join_parts(
    language_model: PreTrainedModel,
    tower: PreTrainedModel,
    tokens: SpecialTokens,
    recipe: ModelRecipe | None = None,
) -> LlavaForConditionalGeneration:
    """Put a language model and a tower into one model, with a new projector between them.

    Args:
        language_model: Causal language model, on any device, also meta.
        tower: Vision tower that ends at the layer that is read.
        tokens: Special tokens of the model.
        recipe: How images enter; None: as one square.

    Raises:
        ValueError: One image is longer than the language model's context or sliding window.
    """
    # Describe the language model's head in the config.
    text_config = language_model.config
    text_config.architectures = [type(language_model).__name__]  # llama.cpp and vLLM read it
    head = language_model.get_output_embeddings()
    text_config.lm_head_bias = head.bias is not None
    if text_config.tie_word_embeddings and not hasattr(language_model.base_model, "embed_tokens"):
        # The stock class ties its head to a layer of this name alone: GPT-2 gets a copy.
        head.weight = nn.Parameter(head.weight.detach().clone())
        text_config.tie_word_embeddings = False

    # Make the LLaVA on the meta device: the parts replace everything, so no memory is spent and
    # no random start is drawn for weights that are thrown away.
    config = _config(tower.config, num_prefix_tokens(tower), text_config, tokens.image, recipe)
    config.pad_token_id = tokens.pad
    with torch.device("meta"):
        model = MODELS[config.model_type](config)

    # Insert the parts.
    inner, model.lm_head = model.model, head
    if config.model_type == "idefics3":
        inner.vision_model, inner.text_model = as_idefics3(tower), language_model.base_model
        inner.connector = new_projector(inner.connector, language_model)
    else:
        inner.vision_tower = as_siglip2(tower) if config.model_type == "lfm2_vl" else tower
        inner.language_model = language_model.base_model
        inner.multi_modal_projector = new_projector(inner.multi_modal_projector, language_model)
    if config.model_type == "llava_next":
        inner.image_newline = new_end_of_row(language_model)
    model.tie_weights()
    model.config.tie_word_embeddings = bool(text_config.tie_word_embeddings)

    model.generation_config = GenerationConfig(
        eos_token_id=tokens.ends,
        pad_token_id=tokens.pad,
        bos_token_id=tokens.bos,
        do_sample=False,
    )
    return model.eval()


def checkpoint_folder(recipe: CheckpointRecipe) -> Path:
    """Return the folder of a recipe's checkpoint: of a run, a folder, or a copy of one on the hub.

    Of one on the hub the small files are read first, so a checkpoint that cannot be used is refused
    before gigabytes are downloaded.

    Raises:
        FileNotFoundError: It is neither a finished run, a folder nor a hub id within reach.
        ValueError: It is a model of another class.
    """
    name = recipe.checkpoint
    if Path(name).is_dir():
        return finished_folder(name)

    kind = read_config_file(fetch(name, weights=False)).get("model_type")
    _check_trainable(name, kind)
    return fetch(name, weights=True)


def _check_trainable(name: str, kind: str | None) -> None:
    """Refuse a checkpoint of a class that is answered with, and not trained."""
    if kind not in TRAINABLE:
        raise ValueError(
            f"{name} is a {kind!r}, and {' or '.join(TRAINABLE)} can be trained: give a checkpoint "
            "of that class"
        )


def load_start_processor(recipe: ModelRecipe | CheckpointRecipe) -> LlavaProcessor:
    """Load the processor of the model that a recipe starts from, without its weights.

    Raises:
        FileNotFoundError: A part, or the checkpoint, is not there.
        ValueError: A part is of a kind that cannot be used; or the checkpoint's files do not go
            together, or its chat template cannot be trained on.
    """
    if isinstance(recipe, ModelRecipe):
        return load_parts_processor(recipe)

    folder = checkpoint_folder(recipe)
    files = read_checkpoint(folder, needs_template=recipe.chat_template is None)
    _check_trainable(recipe.checkpoint, files.config["model_type"])
    own, given = read_chat_template(folder), recipe.chat_template
    processor = load_processor(folder, own or "{{ messages[0].content }}")
    tokenizer = with_pad_token(processor.tokenizer)
    _check_tokens(folder, files, processor)

    # The checkpoint's own template stays, unless there is none that can be trained on.
    try:
        if own is None:
            raise ValueError(f"{recipe.checkpoint} has no chat template")
        fitted = trainable_template(
            processor.chat_template,
            tokenizer,
            processor.turn_ends,
            f"of {recipe.checkpoint}",
            processor.image_token,
        )
    except ValueError:
        if given is None:
            raise
        fitted = load_template(given, tokenizer, processor.image_token)
    else:
        if given is not None:
            raise ValueError(
                f"model.chat_template={given} contradicts {recipe.checkpoint}, whose own template "
                "can be trained on and stays: remove that key"
            )
    processor.chat_template = fitted

    # So does its form of boxes.
    if recipe.boxes not in (None, processor.boxes or recipe.boxes):
        raise ValueError(
            f"model.boxes={recipe.boxes} contradicts {recipe.checkpoint}, which was trained to "
            f"write boxes as {processor.boxes}: remove that key"
        )
    processor.boxes = processor.boxes or recipe.boxes
    return processor


def _check_tokens(folder: Path, files: CheckpointFiles, processor: LlavaProcessor) -> None:
    """Refuse a processor whose tokens are not those of the weights."""
    image = files.config.get("image_token_index", files.config.get("image_token_id"))
    if processor.image_token_id != image:
        raise ValueError(
            f"{folder}: the processor writes token {processor.image_token_id} for an image, but "
            f"the model wants {image}: save processor and model from one build"
        )
    embeddings = [
        tensor.shape[0]
        for name, tensor in files.tensors.items()
        if "language_model" in name and name.endswith(("embed_tokens.weight", "embed_in.weight"))
    ]
    if embeddings and len(processor.tokenizer) > max(embeddings):
        raise ValueError(
            f"{folder}: the tokenizer has {len(processor.tokenizer)} tokens, but the model "
            f"{max(embeddings)}: save processor and model from one build"
        )


def skeleton(recipe: ModelRecipe | CheckpointRecipe) -> LlavaForConditionalGeneration:
    """Return the model of a recipe on the meta device: its size, image length and keys, no weights.

    Catalog names are read from the configs that come with them, so nothing is downloaded. The rows
    that a full vocabulary gets for the image token are missing, because no tokenizer is read.

    Raises:
        FileNotFoundError: A part is neither a catalog name, a folder nor a hub id within reach.
        ValueError: The parts do not go together, or a part is of a kind that cannot be used.
    """
    if isinstance(recipe, CheckpointRecipe):
        return model_skeleton(checkpoint_folder(recipe))

    vision_config = _part_config(recipe.vision_tower, "vision tower", list(VISION_TOWERS))
    text_config = _part_config(recipe.language_model, "language model", list(LANGUAGE_MODELS))

    with torch.device("meta"):
        tower = _fitted_tower(recipe, vision_config)
        last_row = text_config.vocab_size - 1
        check_image(recipe, tower.config)
        config = _config(tower.config, num_prefix_tokens(tower), text_config, last_row, recipe)
        return MODELS[config.model_type](config).eval()


def load_parts_processor(recipe: ModelRecipe) -> LlavaProcessor:
    """Load the processor of a recipe's parts without their weights.

    Raises:
        FileNotFoundError: A part is neither a catalog name, a folder nor a hub id within reach.
        ValueError: A part is of a kind that cannot be used.
    """
    _, text_config, tokenizer, template = load_tokenizer(recipe)
    _, vision_config, mean, std = read_tower(recipe.vision_tower)
    add_image_token(tokenizer, marks=marks_of(recipe))

    with torch.device("meta"):
        tower = _fitted_tower(recipe, vision_config)
        prefix = num_prefix_tokens(tower)
    check_image(recipe, tower.config, mean)

    # Making the config refuses an image that is too long.
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    _config(tower.config, prefix, text_config, image_token_id, recipe)
    processor = build_processor(
        tokenizer, template, tower.config, mean, std, recipe.pad_to_square, prefix, recipe
    )
    check_longest(processor, text_config)
    processor.boxes = recipe.boxes
    return processor


def save_checkpoint(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint that stock transformers loads, whole or not at all.

    Args:
        model: Model to save.
        processor: Its processor.
        folder: New folder, or an empty one; it appears when everything is in it.
        weights: Whole state dict, where the model's own is sharded.

    Raises:
        ValueError: The folder is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder, or remove it")

    with whole_folder(folder) as partial:
        for config in (model.config.text_config, model.config.vision_config):
            config._name_or_path = ""  # else a path of this machine goes into a public file
        model.save_pretrained(partial, state_dict=weights)
        processor.save_pretrained(partial)
        if (form := getattr(processor, "boxes", None)) is not None:
            # transformers writes the keys that it knows, and passes over others.
            path = partial / "processor_config.json"
            written = read_json_object(path) | {"boxes": form}
            write_whole(path, json.dumps(written, indent=2) + "\n")


def _part_config(name: str, kind: str, known: list[str]) -> PretrainedConfig:
    if name in known and name in files_in(CONFIGS, ".json"):
        return AutoConfig.for_model(**part_config(name))

    folder = locate(name, name, kind, known)
    return (
        read_config(folder, name)
        if kind == "language model"
        else AutoConfig.from_pretrained(folder)
    )


def _fitted_tower(recipe: ModelRecipe, config: PretrainedConfig) -> PreTrainedModel:
    check_family(recipe, config)
    tower = TOWERS[config.model_type](config)
    return fit_tower(tower, recipe.feature_layer, recipe.image_size, recipe.post_layernorm)


def check_image(
    recipe: ModelRecipe, vision: PretrainedConfig, mean: list[float] | None = None
) -> None:
    """Refuse a size of a tower that the class of `model.image` cannot read.

    Args:
        recipe: How images enter.
        vision: Config of the tower as it is read: pruned, and at its final image size.
        mean: Mean of the pixels per channel, of values in 0..1; None: not checked.

    Raises:
        ValueError: The first reason.
    """
    kind, name = model_type_of(recipe), recipe.vision_tower
    if kind not in ("idefics3", "lfm2_vl"):
        return
    patches, factor = vision.image_size // vision.patch_size, recipe.shuffle or 2
    if kind == "lfm2_vl":
        if factor != 2:
            raise ValueError(
                f"model.shuffle={factor} is not supported with model.image=native: leave it out"
            )
        return
    if patches % factor or vision.image_size % vision.patch_size:
        fits = [number for number in (2, 3, 4) if patches % number == 0]
        fix = f"use {' or '.join(map(str, fits))}" if fits else "use another model.image_size"
        if vision.image_size % vision.patch_size:
            fix = f"use model.image_size={patches * vision.patch_size}"
        raise ValueError(
            f"model.shuffle={factor} does not divide the {patches} x {patches} patches of a tile "
            f"of {vision.image_size} pixels: {fix}"
        )
    if not _has_exact_positions(patches):
        sizes = [
            number * vision.patch_size
            for number in range(max(1, patches - 12), patches + 13)
            if number % factor == 0 and _has_exact_positions(number)
        ]
        nearest = sorted(sorted(sizes, key=lambda size: abs(size - vision.image_size))[:2])
        raise ValueError(
            f"a tower of {patches} x {patches} patches gets wrong positions in transformers' "
            f"Idefics3: use model.image_size={' or '.join(map(str, nearest))}"
        )
    if mean is not None and all(float(255 * value).is_integer() for value in mean):
        raise ValueError(
            f"{name} has the mean colour {mean}, which becomes zero, and Idefics3 takes a tile of "
            "zeros for padding: use a tower with a mean of 0.5"
        )


def _has_exact_positions(patches: int) -> bool:
    """Return whether Idefics3 finds the right position of every patch, by fractions in float32.

    Source: transformers 5.23 `Idefics3VisionEmbeddings`.
    """
    with torch.device("cpu"):  # also where models are made without memory
        places = torch.arange(patches, dtype=torch.float32) * (1.0 / torch.tensor(patches))
        edges = torch.arange(1 / patches, 1.0, 1 / patches)
        found = torch.bucketize(places.clamp(max=1.0 - 1e-6), edges, right=True)
        return torch.equal(found, torch.arange(patches))


def _config(
    vision_config: PretrainedConfig,
    num_prefix_tokens: int,
    text_config: PretrainedConfig,
    image_token_id: int,
    recipe: ModelRecipe | None = None,
) -> PretrainedConfig:
    """Return the stock config that joins two parts.

    Args:
        vision_config: Config of the tower as it is read: pruned, and at its final image size.
        num_prefix_tokens: Tokens before the patches. The stock class leaves out the first of them;
            registers behind it stay.
        text_config: Config of the language model.
        image_token_id: Placeholder of an image.
        recipe: How images enter; None: as one square.
    """
    kind = model_type_of(recipe)
    tied = bool(text_config.tie_word_embeddings)
    if kind == "idefics3":
        assert recipe is not None and recipe.shuffle is not None
        return Idefics3Config(
            vision_config=idefics3_config(vision_config),
            text_config=text_config,
            scale_factor=recipe.shuffle,
            image_token_id=image_token_id,
            tie_word_embeddings=tied,
        )
    if kind == "lfm2_vl":
        return Lfm2VlConfig(
            vision_config=siglip2_config(vision_config),
            text_config=text_config,
            image_token_id=image_token_id,
            downsample_factor=2,
            projector_hidden_size=text_config.hidden_size,
            projector_hidden_act="gelu_pytorch_tanh",
            projector_bias=True,
            projector_use_layernorm=False,
            tie_word_embeddings=tied,
        )

    size = vision_config.image_size
    strategy = "default" if num_prefix_tokens else "full"
    num_tokens = count_image_tokens(
        size, size, vision_config.patch_size, num_prefix_tokens, strategy
    )

    # Refuse an image that the language model cannot hold.
    too_long = f"an image of {size} pixels takes {num_tokens} tokens, but the language model"
    longest = getattr(text_config, "max_position_embeddings", None)
    window = getattr(text_config, "sliding_window", None)
    if longest and num_tokens >= longest:
        raise ValueError(f"{too_long} reads {longest} in all: use a smaller model.image_size")
    # Words behind the image could not see where it begins, and neither packed rows nor batches of
    # questions support a window.
    if window and num_tokens >= window:
        raise ValueError(
            f"{too_long}'s sliding layers see {window} at a time: "
            "use a smaller model.image_size or tower"
        )

    settings = {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_index": image_token_id,
        "vision_feature_layer": -1,  # the tower ends at the layer that is read
        "vision_feature_select_strategy": strategy,
        "projector_hidden_act": "gelu",
        "image_seq_length": num_tokens,
        "tie_word_embeddings": tied,
    }
    if kind == "llava_next":
        assert recipe is not None
        return LlavaNextConfig(**settings, image_grid_pinpoints=grids(size, recipe.tiles))
    return LlavaConfig(**settings)
