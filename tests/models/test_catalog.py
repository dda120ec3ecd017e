"""Every part of the catalog at full size on the meta device: parameters, image tokens, keys."""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from mipha.catalog.full_size import part_config
from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.catalog.vision_towers import VISION_TOWERS
from mipha.models.build import skeleton
from mipha.models.modeling import LlavaForConditionalGeneration, parts
from mipha.models.packaged import PACKAGED, packaged_folder
from mipha.models.vision_tower import TOWERS
from mipha.recipe import ModelRecipe

# Parameters as counted in the published safetensors; what is tied counts once.
LANGUAGE_MODEL_PARAMETERS = {
    "phi-2": 2_779_683_840,
    "phi-1.5": 1_418_270_720,
    "gemma-2b": 2_506_172_416,
    "qwen1.5-1.8b": 1_836_828_672,
    "stablelm-2-1.6b": 1_644_515_328,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "smollm2-135m": 134_515_008,
    "smollm2-135m-untrained": 134_515_008,
    "smollm2-360m-instruct": 361_821_120,
    "smollm2-1.7b-instruct": 1_711_376_384,
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen2.5-3b-instruct": 3_085_938_688,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "llama-3.2-1b-instruct": 1_235_814_400,
    "phi-3-mini-4k-instruct": 3_821_079_552,
    "gemma-2-2b-it": 2_614_341_888,
    "gemma-3-270m-it": 268_098_176,
    "gemma-3-1b-it": 999_885_952,
}
# Parameters of the whole tower, and tokens of an image at its own size: the patches, and the four
# registers of DINOv3.
TOWER_FACTS = {
    "siglip-so400m-384": (428_225_600, 27 * 27),
    "siglip-so400m-224": (427_680_704, 16 * 16),
    "siglip-large-384": (316_283_904, 24 * 24),
    "siglip-base-224": (92_884_224, 14 * 14),
    "siglip-base-256": (92_930_304, 16 * 16),
    "clip-large-336": (303_507_456, 24 * 24),
    "clip-large-224": (303_179_776, 16 * 16),
    "clip-base-224": (85_799_424, 14 * 14),
    "dinov2-large": (304_368_640, 37 * 37),
    "dinov2-base": (86_580_480, 37 * 37),
    "dinov2-small-lvd142m": (22_056_576, 37 * 37),
    "dinov2-small": (22_056_576 - 384, 37 * 37),  # the packaged one has no mask token
    "vit-large-in21k": (304_351_232, 14 * 14),
    # a layer is 4 (w w + w) of attention, 2 w m + m + w of MLP and 4 w of norms, w = 192 and
    # m = 768; then patches, 25 positions, the norm
    "siglip-tiny-untrained": (3_232_128, 5 * 5),
    "vit-tiny-untrained": (2_824_896, 5 * 5),
    "siglip2-so400m-384": (428_225_600, 27 * 27),
    "siglip2-so400m-patch16-384": (428_256_704, 24 * 24),
    # as at 384, with 1,024 positions for 576
    "siglip2-so400m-patch16-512": (428_256_704 + 448 * 1152, 32 * 32),
    "siglip2-base-224": (92_884_224, 14 * 14),
    "siglip2-base-512": (92_884_224 + 828 * 768, 32 * 32),
    "dinov3-small": (21_596_544, 14 * 14 + 4),
    "dinov3-base": (85_660_416, 14 * 14 + 4),
    "dinov3-large": (303_129_600, 14 * 14 + 4),
}

# A layer is 4 (w w + w) of attention, 2 w m + m + w of MLP and 4 w of norms, for w = 1152 and
# m = 4304; outside the layers stand the
# patches, 3 x 14 x 14 w + w, the 729 positions and the final norm.
SO400M_WITHOUT_LAYER_AND_HEAD = 26 * 15_239_504 + 1_520_640


def test_nothing_of_the_catalog_is_left_out() -> None:
    assert set(LANGUAGE_MODEL_PARAMETERS) == set(LANGUAGE_MODELS)
    assert set(TOWER_FACTS) == set(VISION_TOWERS)


@cache
def full_size(tower: str, language_model: str, **changes: int) -> LlavaForConditionalGeneration:
    return skeleton(ModelRecipe(vision_tower=tower, language_model=language_model, **changes))


def count(*modules: torch.nn.Module) -> int:
    return sum(
        parameter.numel() for parameter in {p for module in modules for p in module.parameters()}
    )


@cache
def whole_tower(name: str) -> torch.nn.Module:
    config = part_config(name)
    with torch.device("meta"):
        return TOWERS[config["model_type"]](AutoConfig.for_model(**config))


@pytest.mark.parametrize("name", LANGUAGE_MODEL_PARAMETERS)
def test_language_models(name: str) -> None:
    model = full_size("siglip-base-224", name)
    found = parts(model)
    assert count(*found.language_model) == LANGUAGE_MODEL_PARAMETERS[name]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (model.lm_head.bias is not None) == name.startswith("phi-") * (
        not name.startswith("phi-3")
    )
    width = model.config.text_config.hidden_size
    assert count(*found.projector) == 768 * width + width + width * width + width
    with torch.device("meta"):
        alone = AutoModelForCausalLM.from_config(model.config.text_config)
    saved = {
        key.removeprefix("language_model."): value.shape
        for key, value in checkpoint(model).items()
        if "language_model." in key
    }
    own_names = {
        "gpt_neox.": "model.",
        "embed_out.": "lm_head.",
    }  # Pythia's; in a LLaVA all are called alike
    wanted = alone.state_dict()
    for own, common in own_names.items():
        wanted = {key.replace(own, common): value for key, value in wanted.items()}
    assert saved == {key: value.shape for key, value in wanted.items()}


@pytest.mark.weights
@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_weights_are_of_this_architecture(name: str) -> None:
    if PACKAGED[name].package not in {found.name for found in metadata.distributions()}:
        pytest.skip(f"{PACKAGED[name].package} is not installed: make install")
    theirs = AutoConfig.from_pretrained(packaged_folder(name)).to_dict()
    ours = AutoConfig.for_model(**part_config(name)).to_dict()
    named = {"pad_token_id", "rope_parameters"} | set(part_config(name)) & set(theirs)
    assert {key: theirs.get(key) for key in named} == {key: ours.get(key) for key in named}


def checkpoint(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The state dict under the names that a saved checkpoint has."""
    return revert_weight_conversion(model, model.state_dict())


@pytest.mark.parametrize("name", TOWER_FACTS)
def test_vision_towers(name: str) -> None:
    parameters, tokens = TOWER_FACTS[name]
    assert count(whole_tower(name)) == parameters
    model = full_size(name, "qwen2.5-0.5b-instruct")
    assert model.config.image_seq_length == tokens
    config = part_config(name)
    assert model.config.vision_config.num_hidden_layers == config["num_hidden_layers"] - 1
    last = re.compile(rf"\.{config['num_hidden_layers'] - 1}\.|^head\.|mask_token")
    dead = sum(
        parameter.numel()
        for key, parameter in whole_tower(name).named_parameters()
        if last.search(key)
    )
    assert dead > 0.03 * parameters
    kept_mask = (
        config["model_type"] == "dinov3_vit"
    )  # its config has no key to leave the mask token out
    assert count(model.model.vision_tower) == parameters - dead + kept_mask * config["hidden_size"]
    pixels = torch.zeros(2, 3, config["image_size"], config["image_size"], device="meta")
    features = model.get_image_features(pixels, return_dict=True).pooler_output
    assert [feature.shape for feature in features] == [(tokens, 896)] * 2
    assert all(
        key.startswith(("language_model.", "multi_modal_projector.", "vision_tower."))
        for key in checkpoint(model)
    )


@pytest.mark.parametrize(
    ("language_model", "billions", "gigabytes"),
    [("phi-2", 3.2174, 6.435), ("phi-1.5", 1.8531, 3.706), ("gemma-2b", 2.94, 5.88)],
)
def test_the_released_mipha(language_model: str, billions: float, gigabytes: float) -> None:
    """With the layer and the pooling head that the released files hold and no feature passes.

    Source: Mipha-3B on the hub holds 5.00 + 1.44 GB of bfloat16, Mipha-1.6B 3.71 GB; Mipha-2.4B is
        not released.
    """
    model = full_size("siglip-so400m-384", language_model)
    assert count(model.model.vision_tower) == SO400M_WITHOUT_LAYER_AND_HEAD
    assert model.config.image_seq_length == 729
    total = count(model) - count(model.model.vision_tower) + count(whole_tower("siglip-so400m-384"))
    assert round(total / 1e9, len(str(billions).partition(".")[2])) == billions
    assert round(2 * total / 1e9, len(str(gigabytes).partition(".")[2])) == gigabytes


@pytest.mark.parametrize(
    "tower",
    ["clip-large-336", "siglip-so400m-384", "siglip-large-384", "dinov2-large", "vit-large-in21k"],
)
def test_towers_at_equal_tokens(tower: str) -> None:
    """The paper's comparison, at 24 x 24 = 576 patches for each: 336 pixels of 14, 384 of 16."""
    size = 24 * part_config(tower)["patch_size"]
    model = full_size(tower, "qwen2.5-0.5b-instruct", image_size=size)
    assert model.config.image_seq_length == 576
    tables = [
        weight
        for name, weight in model.model.vision_tower.named_parameters()
        if "position_embedding" in name
    ]
    assert [table.shape[-2] for table in tables] == [576 if tower.startswith("siglip") else 577]


@pytest.mark.parametrize(
    ("tower", "size", "tokens"),
    [
        ("clip-large-336", 224, 256),
        ("clip-large-336", 448, 1024),
        ("siglip-so400m-384", 448, 1024),
        ("dinov2-large", 224, 256),
    ],
)
def test_the_resolutions_of_the_paper(tower: str, size: int, tokens: int) -> None:
    assert (
        full_size(tower, "qwen2.5-0.5b-instruct", image_size=size).config.image_seq_length == tokens
    )


def test_the_normed_last_layer_at_full_size() -> None:
    model = full_size(
        "dinov2-large",
        "qwen2.5-0.5b-instruct",
        feature_layer=-1,
        post_layernorm=True,
        image_size=336,
    )
    assert model.config.vision_config.model_type == "vit"
    assert model.config.vision_config.num_hidden_layers == 24
