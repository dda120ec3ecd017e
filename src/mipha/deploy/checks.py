"""What is compared of a checkpoint's two readings, one line each: ours, and that of transformers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mipha.deploy.folder import CheckpointFolder, odd_keys, tokens_per_image
from mipha.deploy.runtimes import has_head_bias

ASKED = (
    ("wide", "What is in the picture?"),
    ("tall", "Describe it in one word."),
    ("square", "Is it red?"),
    (None, "What is a picture?"),
)
"""Pictures of three shapes, for a processor may treat them differently, and a question without one."""

TOLERANCE = 1e-4
"""Largest difference of logits, as a part of the largest logit: float32 of the same classes agrees to about 1e-6."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: What.
        passed: Whether it is as it should be.
        found: What was found, in words.
    """

    name: str
    passed: bool
    found: str


def file_checks(files: CheckpointFolder) -> list[Check]:
    """What others than transformers go by: names, types."""
    odd = odd_keys(files)
    text = files.config["text_config"]
    says, holds = (
        str(files.config.get("dtype", files.config.get("torch_dtype"))),
        ", ".join(sorted(files.dtypes)),
    )
    return [
        Check("files", True, "whole; no pickles, no code"),
        Check(
            "names of weights",
            not odd,
            f"{len(odd)} of no LLaVA, such as {odd[0]}" if odd else "as every LLaVA has them",
        ),
        Check(
            "type of weights",
            says == holds,
            holds if says == holds else f"{holds}, but the config says {says}",
        ),
        Check(
            "language model named",
            bool(text.get("architectures")),
            f"text_config.architectures is {text.get('architectures')}",
        ),
    ]


def load_checks(files: CheckpointFolder, stock: dict[str, Any]) -> list[Check]:
    """What the stock class made of the weights. The head's bias has a line of its own."""
    keys = {
        kind: [key for key in found if key != "lm_head.bias"]
        for kind, found in stock["keys"].items()
    }
    wrong = [
        f"{len(found)} {kind.removesuffix('_keys')}, such as {found[0]}"
        for kind, found in keys.items()
        if found
    ]
    ties = bool(
        files.config["text_config"].get(
            "tie_word_embeddings", files.config.get("tie_word_embeddings")
        )
    )
    said = ("tied" if stock["tied"] else "a head of its own") + (
        "" if stock["tied"] == ties else f", but the config says tied={ties}"
    )
    dropped = "lm_head.bias" in stock["keys"]["unexpected_keys"]
    bias = (
        "dropped by the stock class"
        if dropped
        else "kept"
        if has_head_bias(files.config)
        else "there is none"
    )
    stock_class = stock["without_mipha"] and stock["class"].endswith(
        ".LlavaForConditionalGeneration"
    )
    return [
        Check("loads without mipha", stock_class, stock["class"]),
        Check("weights", not wrong, "; ".join(wrong) or f"all {len(files.keys)} are used"),
        Check("head and word embeddings", stock["tied"] == ties, said),
        Check("head bias", not dropped, bias),
    ]


def prompt_checks(
    files: CheckpointFolder, ours: dict[str, Any], stock: dict[str, Any]
) -> list[Check]:
    """The template, the image's place in it, and where an answer ends."""
    written = {
        ids.count(stock["image_token_ids"][1])
        for ids, (name, _) in zip(stock["ids"], ASKED, strict=True)
        if name
    }
    counts = {tokens_per_image(files.processor), *written, *stock["features"]}
    same = sum(mine == theirs for mine, theirs in zip(ours["ids"], stock["ids"], strict=True))
    image, pad, (known, rows) = set(stock["image_token_ids"]), stock["pad_id"], stock["vocabulary"]
    special = (
        len(image) == 1 and pad is not None and pad not in image and max(image) < known <= rows
    )
    ends = ours["end"] in stock["end_ids"]
    return [
        Check(
            "prompts",
            same == len(ASKED),
            f"the template writes {same} of {len(ASKED)} as we do, token by token",
        ),
        Check(
            "tokens per image",
            len(counts) == 1,
            " and ".join(map(str, sorted(counts))) + ", by processor and by tower",
        ),
        Check(
            "special tokens",
            special,
            f"image {sorted(image)}, padding {pad}, {known} tokens for {rows} rows",
        ),
        Check(
            "end of an answer",
            ends,
            f"the template ends it in {ours['end']}, generation at {stock['end_ids']}",
        ),
    ]


def number_checks(ours: dict[str, Any], stock: dict[str, Any]) -> list[Check]:
    """Pixels, logits of the last tokens of each prompt, greedy answers."""
    tensors: dict[str, Tensor] = stock["tensors"]
    pixels = [
        _difference(mine, tensors[f"pixels.{i}"])
        for i, mine in enumerate(ours["pixels"])
        if mine is not None
    ]
    theirs = [tensors[f"logits.{i}"] for i in range(len(ASKED))]
    largest = max(float(mine.abs().max()) for mine in ours["logits"])
    worst = max(map(_difference, ours["logits"], theirs))
    found = f"differ by up to {worst:.1e}, of {largest:.1f}"
    if ours["bias"] is not None and worst > TOLERANCE * largest:
        mended = max(
            _difference(mine, other + ours["bias"])
            for mine, other in zip(ours["logits"], theirs, strict=True)
        )
        found += f"; with the head's bias put back, by {mended:.1e}"
    same = sum(mine == other for mine, other in zip(ours["answers"], stock["answers"], strict=True))
    return [
        Check(
            "pixels",
            max(pixels) == 0,
            f"differ by up to {max(pixels):.1e}" if max(pixels) else "the same",
        ),
        Check("logits", worst <= TOLERANCE * largest, found),
        Check("answers", same == len(ASKED), f"{same} of {len(ASKED)} are ours, word by word"),
    ]


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference; infinite where the shapes differ, or where a number is none."""
    difference = float((one - other).abs().max()) if one.shape == other.shape else float("inf")
    return float("inf") if math.isnan(difference) else difference
