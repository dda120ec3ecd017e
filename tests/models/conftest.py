"""Random parts of any kind, for tests that ask what can be composed and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WIDTHS = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
TEXT = {
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PIXELS = {"num_channels": 3, "image_size": 28, "patch_size": 14}


@pytest.fixture
def random_part(tiny_parts: Callable, tmp_path: Path) -> Callable[..., Path]:
    """`random_part("Qwen3ForCausalLM", head_dim=8)`: a folder with tokenizer or processor."""

    def part(class_name: str, **facts: Any) -> Path:
        import torch
        import transformers

        torch.manual_seed(0)
        model_class = getattr(transformers, class_name)
        text = class_name.endswith(("CausalLM", "LMHeadModel", "Generation"))
        config: PretrainedConfig = model_class.config_class(
            **WIDTHS | {"initializer_range": 0.15} | (TEXT if text else PIXELS) | facts
        )
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if (
                parameter.dim() > 1 and "cls" not in name
            ):  # some classes start at nothing, or at one
                torch.nn.init.normal_(parameter, std=0.15)
            elif "lambda1" in name or "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        folder = tmp_path / class_name
        model.save_pretrained(folder)
        parts = tiny_parts()
        source, files = (
            (parts.language_model, "tokenizer*")
            if text
            else (parts.vision_tower, "preprocessor_config.json")
        )
        for path in source.glob(files):
            shutil.copy(path, folder)
        return folder

    return part
