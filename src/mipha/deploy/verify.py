"""Verify that a checkpoint computes the same where mipha is not installed.

folder read --> images made here --> [mipha] ids, pixels, logits, answers ------+
                                 \\-> [transformers alone, own process] the same -+--> checks
checks --> the row of transformers;  rules --> the rows of the other programs
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from mipha.assistant import Assistant
from mipha.checkpoint_files import CheckpointFiles, read_checkpoint
from mipha.data.sample import content_parts, user_turn
from mipha.deploy.front import Front, front_of
from mipha.deploy.runtimes import Runtime, Status, has_head_bias, odd_keys, runtimes
from mipha.geometry import Tiles
from mipha.models.language_model import end_of_turn
from mipha.models.modeling import MODELS, load_model
from mipha.models.processing import load_processor
from mipha.run import model_folder
from mipha.terminal import Console

QUESTIONS = (
    ("wide", "What is in the picture?"),
    ("tall", "Describe it in one word."),
    ("square", "Is it red?"),
    (None, "What is a picture?"),
)
"""Images of three shapes, because a processor may treat them differently, and no image."""

TOLERANCE = 1e-4
"""Largest difference of logits as a part of the largest logit: float32 agrees to about 1e-6."""

MAX_NEW_TOKENS = 16

LOGITS_TO_KEEP = 32
"""Last tokens of a prompt whose logits are compared: they depend on all before them."""


@dataclass(frozen=True)
class Check:
    """One property of a checkpoint that was checked.

    Args:
        name: Name of the check.
        passed: Whether the checkpoint passed.
        found: Finding, in words.
    """

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Verification:
    """Findings about a checkpoint.

    Args:
        checkpoint: Its folder.
        checks: Checks in the order of a load: files, weights, words, images, numbers.
        runtimes: Verdict for each program: measured for transformers, by rule for the others.
    """

    checkpoint: str
    checks: tuple[Check, ...]
    runtimes: tuple[Runtime, ...]

    @property
    def exact(self) -> bool:
        """Whether transformers alone computes our numbers from this checkpoint."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self) | {"exact": self.exact}


def verify(checkpoint: str | Path, device: str | None = None) -> Verification:
    """Compare what we compute from a checkpoint with what transformers alone computes, in float32.

    Args:
        checkpoint: A model folder, or a run.
        device: Device for both; None for the GPU if there is one.

    Raises:
        FileNotFoundError: No such folder, an unfinished run, or a file is missing.
        ValueError: The folder is no LLaVA, is damaged, or holds pickles or code.
    """
    is_model = (Path(checkpoint) / "config.json").is_file()
    folder = Path(checkpoint) if is_model else model_folder(checkpoint)
    files = read_checkpoint(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    # Ask both the same questions, one model in memory at a time.
    with TemporaryDirectory() as place:
        exchange = Path(place)
        images = _make_images()
        ours = _ask_ours(folder, images, device, exchange / "inputs.safetensors")
        torch.cuda.empty_cache()
        stock = _ask_stock(folder, images, front_of(files.processor), exchange, device)

    # Compare the replies.
    status: Status
    if isinstance(stock, str):
        measured, status = [Check("loads without mipha", False, stock)], "unsupported"
    else:
        measured = [
            *_check_load(files, stock),
            *_check_prompts(files, ours, stock),
            *_check_numbers(ours, stock),
        ]
        status = "exact" if all(check.passed for check in measured) else "approximate"

    # Judge every program; transformers by what was measured.
    failed = "; ".join(f"{check.name}: {check.found}" for check in measured if not check.passed)
    judged = [
        replace(row, status=status, reason=failed or row.reason)
        if row.name == "transformers"
        else row
        for row in runtimes(files.config, files.processor, odd_keys(files))
    ]
    return Verification(str(folder), (*_check_files(files), *measured), tuple(judged))


def print_verification(found: Verification) -> None:
    """Print the checks, and where the checkpoint runs."""
    checks, programs = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
    for table, columns in (
        (checks, ("check", "", "found")),
        (programs, ("runs in", "", "why")),
    ):
        for column in columns:
            table.add_column(column, overflow="fold")

    for check in found.checks:
        passed = "[green]ok[/]" if check.passed else "[red]no[/]"
        checks.add_row(check.name, passed, escape(check.found))
    colours = {"exact": "green", "approximate": "yellow", "unsupported": "red"}
    for row in found.runtimes:
        programs.add_row(row.name, f"[{colours[row.status]}]{row.status}[/]", escape(row.reason))

    console = Console()
    console.print(checks, "", programs, "", sep="\n")
    failed = sum(not check.passed for check in found.checks)
    verdict = f"{failed} checks failed" if failed else "exact"
    console.print(f"{found.checkpoint}: {verdict}", highlight=False, soft_wrap=True)


def _make_images() -> dict[str, Image.Image]:
    """Make coloured ramps with noise, so that no two patches and no two images are equal."""
    random, images = np.random.default_rng(0), {}
    for name, (width, height) in {"wide": (96, 60), "tall": (50, 90), "square": (64, 64)}.items():
        ramp = (
            np.linspace(0, 160, width)[None, :, None] * random.random(3)
            + np.linspace(0, 60, height)[:, None, None]
        )  # (height, width, 3)
        noise = random.integers(0, 30, (height, width, 3))
        images[name] = Image.fromarray((ramp + noise).astype(np.uint8))
    return images


@torch.inference_mode()
def _ask_ours(
    folder: Path, images: dict[str, Image.Image], device: str, inputs_file: Path
) -> dict[str, Any]:
    """Answer the questions; write the model's inputs for each to a file."""
    model, processor = load_model(str(folder), device), load_processor(folder)
    assistant = Assistant(model, processor)
    ours: dict[str, Any] = {"ids": [], "pixels": [], "logits": [], "answers": [], "bias": None}
    ours["tokens"], written = [], {}

    for number, (name, question) in enumerate(QUESTIONS):
        shown = [images[name]] if name else []
        prompt = assistant.prompt([user_turn(question, len(shown))], shown)
        pixels = dict(prompt.images[0].inputs) if name else {}
        inputs = {"input_ids": torch.tensor([prompt.ids], device=device), **pixels}
        logits = model(**inputs, logits_to_keep=LOGITS_TO_KEEP).logits[0]
        answer = assistant.answer(shown, question, max_new_tokens=MAX_NEW_TOKENS)
        ours["ids"].append(prompt.ids)
        ours["pixels"].append(pixels["pixel_values"].cpu() if name else None)
        ours["tokens"].append(prompt.images[0].num_tokens if name else 0)
        ours["logits"].append(logits.cpu())
        ours["answers"].append(answer.text)
        written |= {f"{number}.{key}": value.cpu() for key, value in inputs.items()}
    save_file(written, inputs_file)

    if model.lm_head.bias is not None:
        ours["bias"] = model.lm_head.bias.detach().cpu()
    try:
        ours["end"] = end_of_turn(processor.tokenizer, processor.chat_template)
    except ValueError as error:  # the template may be a stranger's: its fault is a finding
        ours["end"] = str(error)
    return ours


def _ask_stock(
    folder: Path, images: dict[str, Image.Image], front: Front, exchange: Path, device: str
) -> dict[str, Any] | str:
    """Return the reply of transformers alone, or the last line of its error.

    Where tiles are images of their own, no stock class cuts them, so it gets them cut.
    """
    asked = []
    for name, question in QUESTIONS:
        turns, shown = [user_turn(question, int(bool(name)))], [images[name]] if name else []
        if isinstance(front.geometry, Tiles):
            turns, shown = front.prepare(turns, shown)
        files = [exchange / f"{name}-{number}.png" for number in range(len(shown))]
        for file, image in zip(files, shown, strict=True):
            image.save(file)
        paths = iter(files)
        asked.append(
            [
                part if part["type"] == "text" else part | {"path": str(next(paths))}
                for part in content_parts(turns[0].text)
            ]
        )

    request = {
        "checkpoint": str(folder.resolve()),
        "device": device,
        "asked": asked,
        "max_new_tokens": MAX_NEW_TOKENS,
        "logits_to_keep": LOGITS_TO_KEEP,
    }
    (exchange / "request.json").write_text(json.dumps(request), encoding="utf-8")

    program = Path(__file__).with_name("stock_reader.py")
    done = subprocess.run([sys.executable, "-P", program, exchange], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]

    reply = json.loads((exchange / "reply.json").read_text(encoding="utf-8"))
    return reply | {"tensors": load_file(exchange / "reply.safetensors")}


def _check_files(files: CheckpointFiles) -> list[Check]:
    """Check the names and types that programs other than transformers rely on."""
    odd = odd_keys(files)
    architectures = files.config["text_config"].get("architectures")
    written = str(files.config.get("dtype", files.config.get("torch_dtype")))
    held = ", ".join(files.dtypes)

    return [
        Check("files", True, "whole; no pickles, no code"),
        Check(
            "names of weights",
            not odd,
            f"{len(odd)} of no LLaVA, such as {odd[0]}" if odd else "as every LLaVA has them",
        ),
        Check(
            "type of weights",
            written == held,
            held if written == held else f"{held}, but the config says {written}",
        ),
        Check(
            "language model named",
            bool(architectures),
            f"text_config.architectures is {architectures}",
        ),
    ]


def _check_load(files: CheckpointFiles, stock: dict[str, Any]) -> list[Check]:
    """Check how the stock class loaded the weights. The head's bias has a check of its own."""
    # Count the weights that found no place, or no value.
    keys = {
        kind: [key for key in found if key != "lm_head.bias"]
        for kind, found in stock["keys"].items()
    }
    wrong = [
        f"{len(found)} {kind.removesuffix('_keys')}, such as {found[0]}"
        for kind, found in keys.items()
        if found
    ]

    # Compare the head with the word embeddings.
    text = files.config["text_config"]
    ties = bool(text.get("tie_word_embeddings", files.config.get("tie_word_embeddings")))
    head = "tied" if stock["tied"] else "a head of its own"
    if stock["tied"] != ties:
        head += f", but the config says tied={ties}"

    dropped = "lm_head.bias" in stock["keys"]["unexpected_keys"]
    if dropped:
        bias = "dropped by the stock class"
    else:
        bias = "kept" if has_head_bias(files.config) else "there is none"

    wanted = MODELS[files.config["model_type"]].__name__
    is_stock = stock["without_mipha"] and stock["class"].endswith(f".{wanted}")
    return [
        Check("loads without mipha", is_stock, stock["class"]),
        Check("weights", not wrong, "; ".join(wrong) or f"all {len(files.tensors)} are used"),
        Check("head and word embeddings", stock["tied"] == ties, head),
        Check("head bias", not dropped, bias),
    ]


def _check_prompts(
    files: CheckpointFiles, ours: dict[str, Any], stock: dict[str, Any]
) -> list[Check]:
    """Check the template, the image tokens in it, and where an answer ends."""
    written = [ids.count(stock["image_token_ids"][1]) for ids in stock["ids"]]
    features = iter(stock["features"])
    counts = [
        {tokens, count, next(features)}
        for tokens, count, (name, _) in zip(ours["tokens"], written, QUESTIONS, strict=True)
        if name
    ]
    same = sum(mine == theirs for mine, theirs in zip(ours["ids"], stock["ids"], strict=True))

    image, pad, (known, rows) = set(stock["image_token_ids"]), stock["pad_id"], stock["vocabulary"]
    special = (
        len(image) == 1 and pad is not None and pad not in image and max(image) < known <= rows
    )
    return [
        Check(
            "prompts",
            same == len(QUESTIONS),
            f"the template writes {same} of {len(QUESTIONS)} as we do, token by token"
            if stock["has_processor"]
            else "not compared: its processor needs torchvision, which is not installed",
        ),
        Check(
            "tokens per image",
            all(len(found) == 1 for found in counts),
            " and ".join(map(str, sorted(set().union(*counts)))) + ", by processor and by tower",
        ),
        Check(
            "special tokens",
            special,
            f"image {sorted(image)}, padding {pad}, {known} tokens for {rows} rows",
        ),
        Check(
            "end of an answer",
            ours["end"] in stock["end_ids"],
            f"the template ends it in {ours['end']}, generation at {stock['end_ids']}",
        ),
    ]


def _check_numbers(ours: dict[str, Any], stock: dict[str, Any]) -> list[Check]:
    """Check pixels, logits of the last tokens of each prompt, and greedy answers."""
    tensors: dict[str, Tensor] = stock["tensors"]
    pixels = max(
        _difference(mine, tensors[f"pixels.{number}"].reshape(mine.shape))
        if mine.numel() == tensors[f"pixels.{number}"].numel()
        else math.inf
        for number, mine in enumerate(ours["pixels"])
        if mine is not None
    )

    theirs = [tensors[f"logits.{number}"] for number in range(len(QUESTIONS))]
    largest = max(float(mine.abs().max()) for mine in ours["logits"])
    worst = max(map(_difference, ours["logits"], theirs))
    logits = f"differ by up to {worst:.1e}, of {largest:.1f}"
    if ours["bias"] is not None and worst > TOLERANCE * largest:
        biased = [other + ours["bias"] for other in theirs]
        left = max(map(_difference, ours["logits"], biased))
        logits += f"; with the head's bias put back, by {left:.1e}"

    same_pixels = f"differ by up to {pixels:.1e}" if pixels else "the same"
    if not stock["has_processor"]:
        same_pixels = "not compared: its processor needs torchvision, which is not installed"
    same = sum(mine == other for mine, other in zip(ours["answers"], stock["answers"], strict=True))
    return [
        Check("pixels", pixels == 0, same_pixels),
        Check("logits", worst <= TOLERANCE * largest, logits),
        Check(
            "answers", same == len(QUESTIONS), f"{same} of {len(QUESTIONS)} are ours, word by word"
        ),
    ]


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference; infinite if the shapes differ or a number is not finite."""
    difference = float((one - other).abs().max()) if one.shape == other.shape else float("inf")
    return float("inf") if math.isnan(difference) else difference
