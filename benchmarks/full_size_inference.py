"""A full-size checkpoint with random weights, and its GGUF files, for the benchmark of inference.

    python benchmarks/full_size_inference.py FOLDER [--size mipha-3b] [--kinds f16,q8_0,q4_k_m]
        [--image-size 384]

Speed depends on shapes and types alone. No two tensors are equal, because an engine may keep equal
tensors once. The tokenizer is SmolLM2's, which comes with a Python package. The model never writes
a row of the vocabulary that has no word in it.
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
"""Tokenizer of the checkpoint: Phi's own is published with its weights only."""

ARCHITECTURES = {"phi": "PhiForCausalLM"}
"""Name of the transformers class by `model_type` of the language model."""

_NEVER = -10_000.0


def write_random_checkpoint(folder: Path, recipe: ModelRecipe, words: ModelRecipe) -> None:
    """Write a standard checkpoint in bfloat16; only one tensor at a time is in float32.

    Args:
        folder: Folder of the checkpoint, which must not exist.
        recipe: Parts whose configs give the shapes; the head is untied and has a bias.
        words: Recipe whose language model gives the tokenizer and the chat template; its
            vocabulary is no larger.
    """
    model = skeleton(recipe).to(torch.bfloat16)
    _, _, tokenizer, template = load_tokenizer(words)

    # Complete the configs.
    config = model.config
    config.image_token_id = add_image_token(tokenizer)
    assert len(tokenizer) <= config.text_config.vocab_size and not config.tie_word_embeddings
    config.text_config.architectures = [ARCHITECTURES[config.text_config.model_type]]
    config.text_config.lm_head_bias = model.lm_head.bias is not None
    ends = sorted({tokenizer.eos_token_id, end_of_turn(tokenizer, template)} - {None})
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )

    # Write the processor and random weights.
    processor = build_processor(
        tokenizer, template, config.vision_config, [0.5] * 3, [0.5] * 3, recipe.pad_to_square, 0
    )
    torch.manual_seed(0)
    weights = {name: _random(name, weight.shape) for name, weight in model.state_dict().items()}
    weights["lm_head.bias"][_wordless(tokenizer, config.text_config.vocab_size)] = _NEVER
    save_checkpoint(model, processor, folder, weights)


def _random(name: str, shape: torch.Size) -> Tensor:
    """Return weights like a fresh model's: matrices and biases around 0, norms around 1."""
    noise = torch.randn(shape).mul_(0.02)
    return (noise.add_(1) if len(shape) == 1 and name.endswith("weight") else noise).to(
        torch.bfloat16
    )


def _wordless(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> list[int]:
    """Return the rows of the vocabulary that are no text of their own.

    They are special, a part of a letter, or not in the tokenizer.
    """
    texts = tokenizer.batch_decode([[row] for row in range(len(tokenizer))])
    whole = {
        row for row, text in enumerate(texts) if text.isprintable() and "\ufffd" not in text
    } - set(tokenizer.all_special_ids)
    return [row for row in range(num_rows) if row not in whole]


def prepare(folder: Path, size: str, kinds: list[str], image_size: int | None = None) -> None:
    """Write `model` and `gguf` into a folder, each whole or not at all; keep what exists."""
    from mipha.deploy.gguf.export import export_gguf

    recipe = SIZES[size].model_copy(update={"image_size": image_size})
    steps = {"model": lambda: write_random_checkpoint(folder / "model", recipe, TOKENIZER)}
    if kinds:
        steps["gguf"] = lambda: export_gguf(folder / "model", folder / "gguf", kinds)
    for name, write in steps.items():
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
    parser.add_argument("--image-size", type=int, help="pixels of a side; default: the tower's own")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in options.kinds.split(",") if kind]
    prepare(options.folder, options.size, kinds, options.image_size)


if __name__ == "__main__":
    main()
