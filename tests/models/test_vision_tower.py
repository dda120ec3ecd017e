"""A tower is cut after the feature layer and keeps its features; other models are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig

from mipha.assistant import Assistant
from mipha.data.sample import IMAGE, Message
from mipha.models.build import build, save_checkpoint
from mipha.models.modeling import load_model
from mipha.models.vision_tower import (
    TOWERS,
    checked_image_size,
    fit_tower,
    resize_positions,
)

NORM = {"siglip": "post_layernorm", "dinov2": "layernorm", "vit": "layernorm"}


def test_dead_layers_are_dropped_and_the_features_stay(tiny_parts: Callable, tower: str) -> None:
    parts = tiny_parts("llama", tower)
    whole = load_tower(parts.vision_tower)
    pixels, hidden = seen_by(whole)
    seen = []
    for layer in (-2, -1, 1):
        model, _ = build(parts.recipe(feature_layer=layer))
        seen.append(projected_features(model, pixels))
        wanted = hidden[layer] if tower == "siglip" else hidden[layer][:, 1:]
        assert seen[-1].shape == wanted.shape
        assert (seen[-1] - wanted).abs().max() < 1e-5, layer
        assert model.config.vision_config.num_hidden_layers == {-2: 2, -1: 3, 1: 1}[layer]
    names = [name for name, _ in model.model.vision_tower.named_parameters()]
    assert not any("head" in name or "mask_token" in name for name in names)
    assert (seen[0] - seen[1]).abs().max() > 1e-2, "layers that are all the same test nothing"


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("tower", NORM)
def test_the_final_norm_goes_behind_the_layer_that_is_read(
    tiny_parts: Callable, tower: str, layer: int
) -> None:
    parts = tiny_parts("llama", tower)
    whole = load_tower(parts.vision_tower)
    norm = getattr(whole, NORM[tower])
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
        for name, parameter in whole.named_parameters():
            # They start at 1 and at 0, where one that is forgotten changes nothing.
            if "lambda1" in name:
                parameter.uniform_(0.2, 2.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    pixels, hidden = seen_by(whole)
    fitted = fit_tower(whole, layer, post_layernorm=True)
    with torch.no_grad():
        features = fitted(pixels, output_hidden_states=True).hidden_states[-1]
        wanted = norm(hidden[layer])
    assert (features - wanted).abs().max() < 2e-5
    assert (features - hidden[layer]).abs().max() > 1e-1


def test_clip_norms_no_patch(tiny_parts: Callable) -> None:
    with pytest.raises(
        ValueError,
        match=r"is not supported for 'clip_vision_model' towers: "
        r"it norms its class token alone; use false",
    ):
        build(tiny_parts("llama", "clip").recipe(post_layernorm=True))


@pytest.mark.parametrize("layer", [0, 4, -4, 99])
def test_a_layer_that_is_not_there_is_refused(tiny_parts: Callable, layer: int) -> None:
    with pytest.raises(
        ValueError, match=rf"feature_layer={layer} does not exist: this tower has 3 layers"
    ):
        build(tiny_parts().recipe(feature_layer=layer))


REGISTERS = {
    "Dinov2WithRegistersModel": {"num_register_tokens": 2, "mlp_ratio": 2},
    "DINOv3ViTModel": {"num_register_tokens": 4, "num_attention_heads": 2},
}


@pytest.mark.parametrize("kind", REGISTERS)
def test_registers_stay_and_are_counted(
    tiny_parts: Callable, random_part: Callable, kind: str, tmp_path: Path
) -> None:
    """The stock class drops the class token alone; 3 x 3 patches and the registers stay."""
    folder = random_part(kind, **REGISTERS[kind])
    model, processor = build(tiny_parts().recipe(vision_tower=str(folder), image_size=3 * 14))
    tokens = 9 + REGISTERS[kind]["num_register_tokens"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    save_checkpoint(model, processor, tmp_path / "saved")
    stock, reread = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "saved"),
        AutoProcessor.from_pretrained(tmp_path / "saved"),
    )
    inputs = reread(text="<image>\nWhich colour?", images=image, return_tensors="pt")
    assert (
        (inputs["input_ids"] == processor.image_token_id).sum()
        == tokens
        == model.config.image_seq_length
    )
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, stock(**inputs).logits
        whole = load_tower(folder)
        if kind == "DINOv3ViTModel":  # rotary positions: any size goes without a table
            wanted = whole(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][
                :, 1:
            ]
            assert (projected_features(model, inputs["pixel_values"]) - wanted).abs().max() < 1e-5
    assert torch.allclose(ours, theirs, atol=1e-6)
    with pytest.raises(
        ValueError,
        match=r"post_layernorm=true is not supported for 'dino.* "
        r"takes its hidden states before the norm",
    ):
        build(tiny_parts().recipe(vision_tower=str(folder), post_layernorm=True))


@pytest.mark.parametrize("kind", ["Siglip", "CLIP"])
def test_a_tower_is_taken_out_of_a_model_of_images_and_text(
    tiny_parts: Callable, kind: str, tmp_path: Path
) -> None:
    """The layout of google/siglip-so400m-patch14-384 and openai/clip-vit-large-patch14-336."""
    parts = tiny_parts("llama", kind.lower())
    alone = load_tower(parts.vision_tower)
    text = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=alone.config.to_dict()
    )
    both = getattr(transformers, f"{kind}Model")(config)
    getattr(both.vision_model, "vision_model", both.vision_model).load_state_dict(
        alone.state_dict()
    )
    both.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        (parts.vision_tower / "preprocessor_config.json").read_text()
    )
    model, processor = build(parts.recipe(vision_tower=str(tmp_path)))
    wanted, _ = build(parts.recipe())
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    features = [one.model.vision_tower(pixels).last_hidden_state for one in (model, wanted)]
    assert torch.equal(*features)
    save_checkpoint(model, processor, tmp_path / "saved")
    assert (
        load_model(str(tmp_path / "saved")).config.vision_config.model_type
        == f"{kind.lower()}_vision_model"
    )


def test_weights_that_no_feature_passes_may_be_missing_and_no_others(
    tiny_parts: Callable, tmp_path: Path
) -> None:
    """ViTs published as classifiers have no pooler."""
    parts = tiny_parts("llama", "vit")
    for path in parts.vision_tower.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    build(parts.recipe(vision_tower=str(tmp_path)))
    kept.pop("embeddings.cls_token")
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 weights are missing, embeddings\.cls_token first: it is not whole"
    ):
        build(parts.recipe(vision_tower=str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "is a 'llama': a tower is one of clip"),
        ({"model_type": "siglip2"}, "is a 'siglip2': a tower is one of clip"),
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "mine.Tower"}},
            "is a 'mine': a tower is one of clip",
        ),
        ({"hidden_size": 64}, "the weights have other shapes than its config says"),
        (
            {"num_hidden_layers": 9},
            "weights are missing, .*layers.3.*: it is not whole, or its config is another model's",
        ),
    ],
)
def test_a_folder_that_holds_no_tower_is_refused(
    tiny_parts: Callable, config: dict, message: str, tmp_path: Path
) -> None:
    for path in tiny_parts().vision_tower.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | config))
    with pytest.raises(ValueError, match=message):
        build(tiny_parts().recipe(vision_tower=str(tmp_path)))


def test_images_that_are_not_square_are_refused(
    tiny_parts: Callable, random_part: Callable
) -> None:
    folder = random_part("ViTModel", image_size=[28, 42])
    with pytest.raises(
        ValueError,
        match=r"reads images of .28, 42. pixels in patches of 14: only square ones can be used",
    ):
        build(tiny_parts().recipe(vision_tower=str(folder)))


def test_pixels_of_unknown_scale_are_refused(tiny_parts: Callable, tmp_path: Path) -> None:
    for path in tiny_parts().vision_tower.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SiglipImageProcessor"}'
    )
    with pytest.raises(
        ValueError, match="lacks image_mean or image_std: write both into its preprocessor_config"
    ):
        build(tiny_parts().recipe(vision_tower=str(tmp_path)))


def load_tower(folder: Path) -> torch.nn.Module:
    return (
        TOWERS[AutoModel.from_pretrained(folder).config.model_type].from_pretrained(folder).eval()
    )


def seen_by(whole: torch.nn.Module) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Two pictures of noise, and all hidden states that a tower has of them."""
    size = whole.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pixels, whole(pixels, output_hidden_states=True).hidden_states


def projected_features(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What the projector gets."""
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        model.get_image_features(pixels)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("old", "new"), [(16, 24), (24, 16), (24, 32), (27, 32), (37, 24), (14, 24), (3, 7), (1, 4)]
)
def test_a_table_is_resized_as_an_image_is(old: int, new: int) -> None:
    """CLIP L/14 at 224, 336 and 448, SigLIP so400m at 384 and 448, DINOv2 of 518, ViT/16 of 224.

    Pillow resizes an image of one number a pixel by the same rule: cubic convolution with a = -0.5,
    widened where it shrinks.
    """
    table = torch.randn(1 + old * old, 3, generator=torch.Generator().manual_seed(0))
    resized = resize_positions({"position_embedding.weight": table}, old, new)[
        "position_embedding.weight"
    ]
    assert torch.equal(resized[0], table[0]), "the class token has its own position"
    for channel in range(3):
        picture = Image.fromarray(table[1:, channel].reshape(old, old).numpy(), mode="F")
        wanted = np.asarray(picture.resize((new, new), Image.Resampling.BICUBIC))
        assert np.abs(resized[1:, channel].reshape(new, new).numpy() - wanted).max() < 2e-5


def test_what_is_no_position_stays_and_so_does_the_type() -> None:
    weights = {
        "patch.weight": torch.ones(4, 3),
        "position_embeddings": torch.ones(1, 5, 3, dtype=torch.bfloat16),
    }
    resized = resize_positions(weights, 2, 3)
    assert resized["patch.weight"] is weights["patch.weight"]
    assert resized["position_embeddings"].shape == (1, 10, 3)
    assert resized["position_embeddings"].dtype == torch.bfloat16
    assert (resized["position_embeddings"] == 1).all(), "weights of the rule add up to one"
    assert resize_positions(weights, 2, 2) is weights


@pytest.mark.parametrize(
    ("size", "patch", "asked", "got"),
    [
        (384, 14, None, 384),
        (384, 14, 384, 384),
        (384, 14, 448, 448),
        (336, 14, 224, 224),
        (224, 16, 32, 32),
    ],
)
def test_sizes_that_go(size: int, patch: int, asked: int | None, got: int) -> None:
    """384 is no multiple of 14: SigLIP so400m is published so, with 27 patches a side."""
    assert checked_image_size(asked, CLIPVisionConfig(image_size=size, patch_size=patch)) == got


@pytest.mark.parametrize(
    ("asked", "fix"), [(400, "392 or 406"), (385, "378 or 392"), (13, "14 or 28"), (1, "14 or 28")]
)
def test_a_size_between_patches_is_refused_with_the_nearest_two(
    tiny_parts: Callable, asked: int, fix: str
) -> None:
    with pytest.raises(
        ValueError,
        match=f"image_size={asked} is not a multiple of the tower's patch of 14 pixels: use {fix}",
    ):
        build(tiny_parts().recipe(image_size=asked))


def test_an_image_longer_than_the_context_is_refused(tiny_parts: Callable) -> None:
    """The tiny ones read 512 tokens: 22 x 22 = 484 fit, 23 x 23 = 529 do not."""
    build(tiny_parts().recipe(image_size=22 * 14))
    with pytest.raises(
        ValueError,
        match=r"an image of 322 pixels takes 529 tokens, "
        r"but the language model reads 512 in all: use",
    ):
        build(tiny_parts().recipe(image_size=23 * 14))


def test_an_image_longer_than_a_sliding_window_is_refused(
    tiny_parts: Callable, random_part: Callable
) -> None:
    folder = random_part("MistralForCausalLM", sliding_window=16, num_key_value_heads=2)
    build(tiny_parts().recipe(language_model=str(folder), image_size=3 * 14))
    with pytest.raises(
        ValueError,
        match=r"takes 16 tokens, but the language model's sliding layers see 16 at a time: "
        r"use a smaller",
    ):
        build(tiny_parts().recipe(language_model=str(folder), image_size=4 * 14))


def test_another_resolution(tiny_parts: Callable, tower: str) -> None:
    parts = tiny_parts("llama", tower)
    patch = 8 if tower == "vit" else 14
    model, processor = build(parts.recipe(image_size=5 * patch))
    assistant = Assistant(model, processor)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    )
    assert model.config.image_seq_length == 25
    assert (
        assistant.prompt_ids([Message("user", f"{IMAGE}\nWhat?")]).count(processor.image_token_id)
        == 25
    )
    assert assistant.pixels(picture).shape == (1, 3, 5 * patch, 5 * patch)
    assert assistant.answer(picture, "What?", max_new_tokens=2).num_tokens > 0


def test_the_same_resolution_changes_no_weight(tiny_parts: Callable, tower: str) -> None:
    model, _ = build(tiny_parts("llama", tower).recipe(feature_layer=-1))
    whole = model.model.vision_tower
    same = fit_tower(whole, -1, whole.config.image_size).state_dict()
    before = whole.state_dict()
    assert same and all(torch.equal(value, before[name]) for name, value in same.items())


@pytest.mark.parametrize("name", ["siglip-tiny-untrained", "vit-tiny-untrained"])
def test_an_untrained_tower_reads_a_picture(name: str, tiny_parts: Callable) -> None:
    """Two studies rest on them."""
    recipe = tiny_parts().recipe().model_copy(update={"vision_tower": name})
    model, processor = build(recipe)
    picture = Image.new("RGB", (50, 30), (255, 0, 127))
    pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, *[model.config.vision_config.image_size] * 2)
    assert pixels[0, 0].max() == 1 and pixels[0, 1].min() == -1  # of 0..255, by 0.5 and 0.5
    with torch.no_grad():
        features = model.get_image_features(pixels, return_dict=True).pooler_output[0]
    assert features.isfinite().all() and len(features) == model.config.image_seq_length
