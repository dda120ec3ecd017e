"""Make the parts of the study `image-tokens` at mini scale: a small tower that reads, and words.

    python benchmarks/reading_parts.py -o runs/reading-parts    # a few minutes on one core

No Python package ships a SigLIP, and a tower that has to learn reading behind a language model
takes hours. This one learns it from labels of every patch: which digit stands here, and of which
colour. It sees quarters of `written_page_mini` at full size and whole pages squeezed to its 48
pixels alike, so it favours neither tiles nor squares.

    runs/reading-parts/vision-tower     a SigLIP, for model.vision_tower
                       language-model   an untrained Llama of a few hundred words
"""

from __future__ import annotations

import argparse
import io
import itertools
import random
import string
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mipha.data.datasets import easy_vqa_steps, written_page_mini
from mipha.data.datasets.written_page import COLOURS, draw, page_of
from mipha.data.datasets.written_page_mini import PAGES
from mipha.files import whole_folder
from mipha.models.packaged import packaged_folder
from mipha.terminal import echo

SIDE, PATCH, WIDTH, LAYERS = 48, 8, 96, 2
GRID = SIDE // PATCH
NONE = 10
"""The label of a place without a digit."""

VOCABULARY = 1024
"""Most tokens of the language model; its texts have fewer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/reading-parts"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args()

    make_language_model(options.out / "language-model")
    train_tower(options)


def train_tower(options: argparse.Namespace) -> None:
    """Train the tower, say what it reads of held-out pages, and write it."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    tower, heads = SiglipVisionModel(config), nn.Linear(WIDTH, 11 + len(COLOURS) + 1)
    weights = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, options.steps, pct_start=0.1
    )

    dice, began = random.Random(0), time.monotonic()
    for step in range(options.steps):
        pages = range(step * options.batch // 3, (step + 1) * options.batch // 3)
        views = [
            view_of("train", number, dice, squeezed)
            for number in pages
            for squeezed in (True, False, False)
        ]
        loss, _ = read(tower, heads, views)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            echo(f"step {step + 1}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s")

    tower.eval()
    for squeezed in (True, False):
        views = [view_of("validation", number, dice, squeezed) for number in range(400)]
        with torch.no_grad():
            _, right = read(tower, heads, views)
        shown = "whole pages, squeezed" if squeezed else "crops"
        echo(f"{shown}: {100 * right:.1f} % of held-out digits are read right")
    with whole_folder(options.out / "vision-tower") as folder:
        tower.save_pretrained(folder)
        half = [0.5, 0.5, 0.5]
        SiglipImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half
        ).save_pretrained(folder)


def view_of(
    split: str, number: int, dice: random.Random, squeezed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the tower sees of a page, and the labels of its patches.

    Args:
        squeezed: Whether it is the whole page, squeezed, or a crop at full size.

    Returns:
        `(3, side, side)` in -1..1; `(patches, 2)`: digit and colour.
    """
    image = Image.open(io.BytesIO(draw(PAGES, split, number)))
    scale, left, top = SIDE / PAGES.side, 0, 0
    if squeezed:
        image = image.resize((SIDE, SIDE), dice.choice((Image.BICUBIC, Image.LANCZOS)))
    else:
        scale, left, top = 1.0, dice.choice((0, SIDE)), dice.choice((0, SIDE))
        image = image.crop((left, top, left + SIDE, top + SIDE))

    # A digit belongs to every patch that its cell covers.
    labels = np.full((GRID, GRID, 2), (NONE, len(COLOURS)))
    for one in page_of(PAGES, split, number).numbers:
        cell = one.left // one.height * one.height, one.top // one.height * one.height
        places = range(0, one.height, int(PATCH / scale)) or (0,)
        for across, down in itertools.product(places, places):
            column = int((cell[0] + across - left) * scale // PATCH)
            row = int((cell[1] + down - top) * scale // PATCH)
            if 0 <= column < GRID and 0 <= row < GRID:
                labels[row, column] = int(one.text), list(COLOURS).index(one.colour)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1
    return pixels, labels.reshape(-1, 2)


def read(
    tower: nn.Module, heads: nn.Module, views: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[Tensor, float]:
    """Return the loss, and the share of digits that are read right."""
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in views]))
    labels = torch.from_numpy(np.stack([labels for _, labels in views])).flatten(0, 1)
    states = tower(pixel_values=pixels).last_hidden_state  # (views, patches, width)
    guesses = heads(states).flatten(0, 1).split([11, len(COLOURS) + 1], dim=1)

    # Places without a digit are many, and count as much as the others together.
    loss = torch.zeros(())
    for guess, label, empty in zip(guesses, labels.T, (NONE, len(COLOURS)), strict=True):
        each = F.cross_entropy(guess, label, reduction="none")  # (patches,)
        loss = loss + each[label == empty].mean() + each[label != empty].mean()
    right = (guesses[0].argmax(1) == labels[:, 0])[labels[:, 0] != NONE]
    return loss, right.float().mean().item()


def make_language_model(folder: Path) -> None:
    """Write an untrained language model of two layers, and a tokenizer of the words it is asked."""
    torch.manual_seed(0)
    texts = [
        message.text
        for data, limit in ((written_page_mini.DATASET, 3_000), (easy_vqa_steps.DATASET, 3_000))
        for record in itertools.islice(data.load(None, "train"), limit)
        for message in data.to_sample(record).messages
    ]
    known = AutoTokenizer.from_pretrained(packaged_folder("smollm2-135m"))
    tokenizer = known.train_new_from_iterator([*texts, *string.digits], VOCABULARY)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with whole_folder(folder) as partial:
        LlamaForCausalLM(config).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    main()
