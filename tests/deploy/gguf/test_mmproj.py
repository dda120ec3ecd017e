"""What is written of tower and projector, by config and names alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, SiglipVisionConfig

from mipha.deploy.gguf.mmproj import check_mmproj, mmproj_fields, mmproj_tensors
from mipha.deploy.gguf.writer import Weights

FIXTURES = Path(__file__).parents[2] / "fixtures" / "images"
CLIP = CLIPVisionConfig(
    hidden_size=8, num_attention_heads=2, image_size=28, patch_size=14, num_hidden_layers=2
)


def config(vision: CLIPVisionConfig | SiglipVisionConfig, **changes: object) -> LlavaConfig:
    strategy = "default" if vision.model_type.startswith("clip") else "full"
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(hidden_size=16, num_attention_heads=2),
        **{"vision_feature_select_strategy": strategy, "vision_feature_layer": -1} | changes,
    )


@pytest.mark.parametrize(
    ("vision", "uses_gelu"),
    [
        (CLIP, False),
        (CLIPVisionConfig(hidden_act="gelu"), True),
        (SiglipVisionConfig(), True),
    ],
)
def test_the_activation_of_the_tower_is_said(
    vision: CLIPVisionConfig | SiglipVisionConfig, uses_gelu: bool
) -> None:
    check_mmproj(config(vision))
    processor = json.loads(
        (FIXTURES / "llava-siglip-llama-several/processor_config.json").read_text()
    )
    processor["image_processor"] |= {"image_std": [0.25] * 3}
    fields = mmproj_fields(config(vision), processor)
    assert fields["clip.use_gelu"] is uses_gelu
    assert fields["clip.vision.image_std"] == [0.25] * 3


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"vision_config": SiglipVisionConfig(hidden_act="relu")}, "vision_config.hidden_act"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"vision_feature_layer": -2}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_named(changes: dict[str, object], key: str) -> None:
    vision = changes.pop("vision_config", SiglipVisionConfig())
    with pytest.raises(ValueError, match=f"{key} is .*llama.cpp's LLaVA computes only"):
        check_mmproj(config(vision, **changes))  # type: ignore[arg-type]


def test_class_token_and_positions_keep_their_bits_in_every_file(tmp_path: Path) -> None:
    embeddings = "vision_tower.vision_model.embeddings."
    tensors = {
        f"{embeddings}class_embedding": torch.full((8,), 3.0),
        f"{embeddings}patch_embedding.weight": torch.ones(8, 3, 14, 14),
        f"{embeddings}position_embedding.weight": torch.arange(40.0).reshape(5, 8),
    }
    save_file(tensors, tmp_path / "tower.safetensors")
    with safe_open(tmp_path / "tower.safetensors", framework="pt") as file:
        found = {
            t.name: t for t in mmproj_tensors(Weights(dict.fromkeys(tensors, file)), config(CLIP))
        }
        kept = {name for name, tensor in found.items() if tensor.kept}
        assert kept == {"v.class_embd", "v.patch_embd.bias", "v.position_embd.weight"}
        assert found["v.class_embd"].read().tolist() == [3.0 + n for n in range(8)]

    # A table of a tower without a class token stays where it is.
    siglip = {f"{embeddings}position_embedding.weight": torch.ones(4, 8)}
    save_file(siglip, tmp_path / "siglip.safetensors")
    with safe_open(tmp_path / "siglip.safetensors", framework="pt") as file:
        (table,) = mmproj_tensors(
            Weights(dict.fromkeys(siglip, file)), config(SiglipVisionConfig())
        )
        assert table.kept and table.read().sum() == 32
