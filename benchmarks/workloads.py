"""Data of the training benchmarks: made-up conversations of chosen lengths, and the models' parts.

Words and images are noise, because time depends on lengths alone, and losses on noise show as well
as any whether two ways are equal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mipha.recipe import ModelRecipe, Recipe, StageRecipe, TuningRecipe

_WORDS = (
    "what",
    "is",
    "the",
    "color",
    "of",
    "that",
    "small",
    "red",
    "car",
    "near",
    "two",
    "old",
    "trees",
    "on",
    "this",
    "green",
    "hill",
)

TUNING = {
    "pretrain": TuningRecipe(vision_tower="frozen", projector="full", language_model="frozen"),
    "finetune": TuningRecipe(vision_tower="frozen", projector="full", language_model="full"),
}
"""Stage 1 trains the projector alone; stage 2 also the language model, as the quickstart does."""

FEATURE_LAYER = 9
"""Layer of DINOv2-small's 12 that the quickstart reads; an unpruned tower computes all 12."""


@dataclass(frozen=True)
class Workload:
    """Conversations of one shape.

    Args:
        name: Name in reports.
        image_size: Side in pixels; a patch is 14, so 112 makes 64 image tokens and 196 makes 196.
        questions: Number of questions about each image; each is a sample.
        words: Least and greatest number of words of a question.
        answer: Least and greatest number of words of an answer.
        batch_size: Number of samples of a step.
        row_tokens: Length of packed rows in tokens.
        micro_batch: Number of samples of a padded forward pass.
        dataset: Packaged data set to read; None for made-up conversations.
    """

    name: str
    image_size: int = 112
    questions: int = 1
    words: tuple[int, int] = (8, 98)
    answer: tuple[int, int] = (1, 19)
    batch_size: int = 8
    row_tokens: int = 2048
    micro_batch: int = 8
    dataset: str | None = None

    @property
    def image_tokens(self) -> int:
        """Number of tokens of an image."""
        return (self.image_size // 14) ** 2


# SmolLM2's template takes 31 tokens a conversation: 8 to 98 words of question and 1 to 19 of answer
# are 40 to 148 tokens of text.
SINGLE = Workload("single questions, 64 image tokens")
SHARED = Workload(
    "8 questions an image, 196 image tokens",
    image_size=196,
    questions=8,
    words=(4, 20),
    answer=(1, 4),
)
EASY_VQA = Workload(
    "easy-VQA, 25 image tokens", image_size=70, questions=8, batch_size=16, dataset="easy_vqa"
)


def quickstart_parts(workload: Workload) -> ModelRecipe:
    """Return DINOv2-small and SmolLM2-135M, real weights, at the size of the workload's images."""
    sizes = {"image_size": workload.image_size, "feature_layer": FEATURE_LAYER}
    return ModelRecipe(vision_tower="dinov2-small", language_model="smollm2-135m", **sizes)


def small_parts(folder: Path, workload: Workload, width: int = 128, depth: int = 4) -> ModelRecipe:
    """Save a SigLIP, whose last layer is not read, and a Llama with random weights.

    Args:
        folder: Folder of both.
        workload: Conversations whose image size the tower takes.
        width: Hidden size of both.
        depth: Number of layers of both.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 32,
    }

    # Save the tower.
    torch.manual_seed(0)
    SiglipVisionModel(
        SiglipVisionConfig(**sizes, image_size=workload.image_size, patch_size=14)
    ).save_pretrained(folder / "tower")
    pixels = {
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps(pixels))

    # Train and save the tokenizer.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(_WORDS), "user assistant system"] * 3, trainer)
    names = {"eos_token": special[2], "pad_token": special[0]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(
        folder / "language_model"
    )

    # Save the language model.
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=1,
        vocab_size=512,
        max_position_embeddings=16384,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "language_model")
    return small_parts_in(folder)


def small_parts_in(folder: Path) -> ModelRecipe:
    """Return the parts that `small_parts` saved."""
    return ModelRecipe(
        vision_tower=str(folder / "tower"),
        language_model=str(folder / "language_model"),
        chat_template="chatml",
    )


def write_samples(
    folder: Path, workload: Workload, num_samples: int, side: int | None = None
) -> Path:
    """Write a messages file with its images beside it.

    Args:
        folder: Folder of the files.
        workload: Conversations to write.
        num_samples: Number of samples.
        side: Side of the images in their files, pixels; None for the tower's.

    Returns:
        The file, `num_samples` lines.
    """
    side = side or workload.image_size
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)

    lines = []
    for number in range(num_samples):
        image = f"{number // workload.questions}.jpg"
        if number % workload.questions == 0:
            Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
                folder / image
            )

        question, answer = (_words(random, *bounds) for bounds in (workload.words, workload.answer))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns, "images": [image]}) + "\n")

    file = folder / "samples.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def stage_recipe(
    file: Path | None, workload: Workload, stage: str, batching: str, **changes: object
) -> StageRecipe:
    """Return a stage of this workload: upstream's optimizer settings, no warmup, one epoch."""
    values = {
        "data": {"dataset": workload.dataset or "messages", "root": file},
        "tuning": TUNING[stage],
        # Source: scripts/mipha/{pretrain,finetune}.sh of upstream for the learning rates.
        "learning_rate": 1e-3 if stage == "pretrain" else 2e-5,
        "batch_size": workload.batch_size,
        "batching": batching,
        "row_tokens": workload.row_tokens,
        "warmup_ratio": 0.0,
    }

    if batching == "shared-image":
        values["samples_per_image"] = workload.questions
    return StageRecipe.model_validate(values | changes)


def whole_recipe(parts: ModelRecipe, stage: StageRecipe) -> Recipe:
    """Return a whole recipe whose two stages are both this one."""
    return Recipe(name="benchmark", model=parts, stages={"pretrain": stage, "finetune": stage})


def _words(random: np.random.Generator, least: int, most: int) -> str:
    return " ".join(random.choice(_WORDS, int(random.integers(least, most + 1))))
