"""A checkpoint of full size with random weights, and its GGUF files: what the speed of inference is measured on.

    python benchmarks/full_size_inference.py FOLDER [--size mipha-3b] [--kinds f16,q8_0,q4_k_m]

Speed depends on shapes and types alone. Each tensor has numbers of its own, for an engine may keep equal ones once; the tokenizer is
SmolLM2's, which comes with a Python package, and the rows of the vocabulary that it has no word for are never the likeliest.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mipha.models.build import save_checkpoint, skeleton
from mipha.models.language_model import add_image_token, end_of_turn, load_tokenizer
from mipha.models.processing import build_processor
from mipha.recipe import ModelRecipe

SIZES = {
    "mipha-3b": ModelRecipe(vision_tower="siglip-so400m-384", language_model="phi-2"),
    "mipha-1.6b": ModelRecipe(vision_tower="siglip-so400m-384", language_model="phi-1.5"),
}
"""The paper's models."""

TOKENIZER = ModelRecipe(vision_tower="siglip-so400m-384", language_model="smollm2-135m")
"""Phi's is published with its weights only."""

ARCHITECTURES = {"phi": "PhiForCausalLM"}
"""The class that a language model of this `model_type` would have been saved by."""

_NEVER = -10_000.0


def write_random_checkpoint(folder: Path, recipe: ModelRecipe, words: ModelRecipe) -> None:
    """Write a standard checkpoint in bfloat16, no more than one tensor in float32 at a time.

    Args:
        folder: Must not exist.
        recipe: The parts, by whose configs it is made; an untied head with a bias.
        words: Whose language model gives tokenizer and chat template; its vocabulary is no larger.
    """
    model = skeleton(recipe).to(torch.bfloat16)
    _, _, tokenizer, template = load_tokenizer(words)
    config = model.config
    config.image_token_id = add_image_token(tokenizer)
    assert len(tokenizer) <= config.text_config.vocab_size and not config.tie_word_embeddings
    config.text_config.architectures = [ARCHITECTURES[config.text_config.model_type]]
    config.text_config.lm_head_bias = model.lm_head.bias is not None
    ends = sorted({tokenizer.eos_token_id, end_of_turn(tokenizer, template)} - {None})
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    processor = build_processor(
        tokenizer, template, config.vision_config, [0.5] * 3, [0.5] * 3, recipe.pad_to_square, 0
    )
    torch.manual_seed(0)
    weights = {name: _random(name, weight.shape) for name, weight in model.state_dict().items()}
    weights["lm_head.bias"][_wordless(tokenizer, config.text_config.vocab_size)] = _NEVER
    save_checkpoint(model, processor, folder, weights)


def _random(name: str, shape: torch.Size) -> Tensor:
    """As a fresh model has them: matrices of noise, norms around one, biases around nothing."""
    noise = torch.randn(shape).mul_(0.02)
    return (noise.add_(1) if len(shape) == 1 and name.endswith("weight") else noise).to(
        torch.bfloat16
    )


def _wordless(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> list[int]:
    """Rows of the vocabulary that are no whole text: special, half a letter, or not in the tokenizer."""
    texts = tokenizer.batch_decode([[row] for row in range(len(tokenizer))])
    whole = {
        row for row, text in enumerate(texts) if text.isprintable() and "\ufffd" not in text
    } - set(tokenizer.all_special_ids)
    return [row for row in range(num_rows) if row not in whole]


def prepare(folder: Path, size: str, kinds: list[str]) -> None:
    """Write `model` and `gguf` into a folder, each whole or not at all; what is there already is kept."""
    from mipha.deploy.gguf.export import export_gguf

    for name, write in (
        ("model", lambda: write_random_checkpoint(folder / "model", SIZES[size], TOKENIZER)),
        ("gguf", lambda: export_gguf(folder / "model", folder / "gguf", kinds)),
    ):
        started = time.perf_counter()
        if not (folder / name).exists():
            write()
            print(f"{folder / name}: written in {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="mipha-3b")
    parser.add_argument("--kinds", default="f16,q8_0,q4_k_m")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    prepare(options.folder, options.size, options.kinds.split(","))


if __name__ == "__main__":
    main()
