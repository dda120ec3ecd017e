"""Small random checkpoints of any family, tower and tokenizer, and llama.cpp to read them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

WIDTHS = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
TEXT = {"vocab_size": 512, "max_position_embeddings": 512}

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="session")
def image() -> Image.Image:
    """Noise of the size that the tiny towers want, so that nobody resizes it."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def checkpoint(
    tiny_parts: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`checkpoint("Qwen3ForCausalLM", "clip", head_dim=16)`: a saved model without zero vectors."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(
        class_name: str = "LlamaForCausalLM",
        tower: str = "siglip",
        recipe: dict[str, Any] | None = None,
        **facts: Any,
    ) -> Path:
        import torch
        import transformers

        from mipha.models.build import build, save_checkpoint
        from mipha.models.modeling import parts as model_parts

        folder = root / str(len(list(root.iterdir())))
        parts = tiny_parts(
            "gemma" if class_name == "GemmaForCausalLM" else "llama", tower
        )  # Gemma's tokenizer begins with a BOS
        tokenizer = transformers.AutoTokenizer.from_pretrained(parts.language_model)
        ids = {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
            for name in ("bos", "eos", "pad")
        }
        torch.manual_seed(0)
        model_class = getattr(transformers, class_name)
        language_model = model_class(
            model_class.config_class(**WIDTHS | TEXT | ids | {"initializer_range": 0.15} | facts)
        )
        _fill(language_model)
        # Never the likeliest: llama.cpp's server gives no numbers for an answer that is empty or
        # half a letter.
        silent = {
            *tokenizer.all_special_ids,
            *(i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])),
        }
        with torch.no_grad():
            language_model.get_output_embeddings().weight[sorted(silent)] = 0
        language_model.save_pretrained(folder / "language_model")
        for path in parts.language_model.glob("tokenizer*"):
            shutil.copy(path, folder / "language_model")
        wish = {
            "vision_tower": str(parts.vision_tower),
            "language_model": str(folder / "language_model"),
            "chat_template": "chatml",
        }
        model, processor = build(type(parts.recipe())(**wish | (recipe or {})))
        for module in model_parts(model).projector:
            _fill(module)
        save_checkpoint(model, processor, folder / "checkpoint")
        return folder / "checkpoint"

    return make


def _fill(module: Any) -> None:
    """Biases and norms of a fresh model are nothing and one, and hide where they are misplaced."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "linear_2" in name or "modality_projection" in name:
                parameter.mul_(4)  # a fresh projector whispers
