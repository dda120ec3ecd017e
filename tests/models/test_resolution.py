"""Another image size: the positions are resized by the stated rule, and everything that counts tokens follows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig

from mipha.assistant import Assistant
from mipha.data.sample import IMAGE, Message
from mipha.models.build import build
from mipha.models.resolution import checked_image_size, resize_positions
from mipha.models.vision_tower import fit_tower


@pytest.mark.parametrize(
    ("old", "new"), [(16, 24), (24, 16), (24, 32), (27, 32), (37, 24), (14, 24), (3, 7), (1, 4)]
)
def test_a_table_is_resized_as_a_picture_is(old: int, new: int) -> None:
    """CLIP L/14 at 224, 336 and 448, SigLIP so400m at 384 and 448, DINOv2 from 518 and ViT/16 from 224 to 576 patches.

    Pillow resizes a picture of one number a pixel by the same rule: cubic convolution with a = -0.5, widened where it shrinks.
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
    ("asked", "mend"), [(400, "392 or 406"), (385, "378 or 392"), (13, "14 or 28"), (1, "14 or 28")]
)
def test_a_size_between_patches_is_refused_with_the_nearest_two(
    tiny_parts: Callable, asked: int, mend: str
) -> None:
    with pytest.raises(
        ValueError,
        match=f"image_size={asked} is not a multiple of the tower's patch of 14 pixels: use {mend}",
    ):
        build(tiny_parts().recipe(image_size=asked))


def test_an_image_longer_than_the_context_is_refused(tiny_parts: Callable) -> None:
    """The tiny ones read 512 tokens: 22 x 22 = 484 fit, 23 x 23 = 529 do not."""
    build(tiny_parts().recipe(image_size=22 * 14))
    with pytest.raises(
        ValueError,
        match=r"an image of 322 pixels takes 529 tokens, but the language model reads 512 in all: use",
    ):
        build(tiny_parts().recipe(image_size=23 * 14))


def test_an_image_longer_than_a_sliding_window_is_refused(
    tiny_parts: Callable, random_part: Callable
) -> None:
    folder = random_part("MistralForCausalLM", sliding_window=16, num_key_value_heads=2)
    build(tiny_parts().recipe(language_model=str(folder), image_size=3 * 14))
    with pytest.raises(
        ValueError,
        match=r"takes 16 tokens, but the language model's sliding layers see 16 at a time: use a smaller",
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
