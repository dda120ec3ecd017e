"""Whether a checkpoint is what it says it is, where mipha is not installed: asked here, asked in transformers alone, compared.

folder read --> pictures made here --> [mipha] ids, pixels, logits, answers  --+
                                  \\-> [transformers alone, own process] same --+--> checks --> transformers' row; rules --> the others'
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from mipha.assistant import Assistant
from mipha.data.sample import IMAGE, Message
from mipha.deploy.folder import CheckpointFolder, read_folder, tokens_per_image
from mipha.deploy.runtimes import Runtime, Status, has_head_bias, runtimes
from mipha.models.language_model import end_of_turn
from mipha.models.modeling import load_model
from mipha.models.processing import load_processor
from mipha.run import model_folder

ASKED = (("wide", "What is in the picture?"), ("tall", "Describe it in one word."), ("square", "Is it red?"), (None, "What is a picture?"))
"""Pictures of three shapes, for a processor may treat them differently, and a question without one."""

TOLERANCE = 1e-4
"""Largest difference of logits, as a part of the largest logit: float32 of the same classes agrees to about 1e-6."""

MAX_NEW_TOKENS = 16
LOGITS_TO_KEEP = 32
_KEY_PARTS = ("language_model.", "vision_tower.", "multi_modal_projector.")
"""How all names of weights begin in a LLaVA on the hub; transformers reads other spellings too, nothing else does."""


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


@dataclass(frozen=True)
class Verification:
    """What was found about a checkpoint.

    Args:
        checkpoint: Its folder.
        checks: In the order of a load: files, weights, words, pictures, numbers.
        runtimes: What each program makes of it; measured for transformers, by rule for the others.
    """

    checkpoint: str
    checks: tuple[Check, ...]
    runtimes: tuple[Runtime, ...]

    @property
    def exact(self) -> bool:
        """Every check passed: it is a standard checkpoint, and transformers alone gives our numbers and answers."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self) | {"exact": self.exact}


def verify(checkpoint: str | Path, device: str | None = None) -> Verification:
    """Compare what we make of a checkpoint with what transformers alone makes of it, in float32.

    Args:
        checkpoint: A model folder, or a run.
        device: None: the GPU if there is one.

    Raises:
        FileNotFoundError: No such folder, an unfinished run, or a file is missing.
        ValueError: The folder is no LLaVA, is damaged, or holds pickles or code.
    """
    folder = Path(checkpoint) if (Path(checkpoint) / "config.json").is_file() else model_folder(checkpoint)
    files = read_folder(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory() as place:
        exchange = Path(place)
        pictures = _make_pictures(exchange)
        ours = _ask_ours(folder, pictures, device)  # gone from memory before the other process loads its own
        stock = _ask_stock(folder, exchange, device)
    status: Status
    if isinstance(stock, str):
        measured, status = [Check("loads without mipha", False, stock)], "unsupported"
    else:
        measured = [*_load_checks(files, stock), *_prompt_checks(files, ours, stock), *_number_checks(ours, stock)]
        status = "exact" if all(check.passed for check in measured) else "approximate"
    failed = "; ".join(f"{check.name}: {check.found}" for check in measured if not check.passed)
    judged = [
        replace(row, status=status, reason=failed or row.reason) if row.name == "transformers" else row
        for row in runtimes(files.config, files.processor, _odd_keys(files))
    ]
    return Verification(str(folder), (*_file_checks(files), *measured), tuple(judged))


def print_verification(found: Verification) -> None:
    """The checks, and where the checkpoint runs."""
    console = Console()
    checks, where = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
    for table, columns in ((checks, ("check", "", "found")), (where, ("runs in", "", "why"))):
        for column in columns:
            table.add_column(column, overflow="fold")
    for check in found.checks:
        checks.add_row(check.name, "[green]ok[/]" if check.passed else "[red]no[/]", check.found)
    colours = {"exact": "green", "approximate": "yellow", "unsupported": "red"}
    for row in found.runtimes:
        where.add_row(row.name, f"[{colours[row.status]}]{row.status}[/]", row.reason)
    console.print(checks, "", where, "", sep="\n")
    failed = sum(not check.passed for check in found.checks)
    console.print(f"{found.checkpoint}: {f'{failed} checks failed' if failed else 'exact'}", highlight=False, soft_wrap=True)


def _make_pictures(folder: Path) -> dict[str, Image.Image]:
    """Coloured ramps with noise: no two patches are alike, and neither are the pictures."""
    random, pictures = np.random.default_rng(0), {}
    for name, (width, height) in {"wide": (96, 60), "tall": (50, 90), "square": (64, 64)}.items():
        ramp = np.linspace(0, 160, width)[None, :, None] * random.random(3) + np.linspace(0, 60, height)[:, None, None]
        pictures[name] = Image.fromarray((ramp + random.integers(0, 30, (height, width, 3))).astype(np.uint8))
        pictures[name].save(folder / f"{name}.png")
    return pictures


@torch.inference_mode()
def _ask_ours(folder: Path, pictures: dict[str, Image.Image], device: str) -> dict[str, Any]:
    model, processor = load_model(str(folder), device), load_processor(folder)
    assistant = Assistant(model, processor)
    ours: dict[str, Any] = {"ids": [], "pixels": [], "logits": [], "answers": [], "bias": None}
    for name, question in ASKED:
        picture = pictures[name] if name else None
        ids = assistant.prompt_ids([Message("user", f"{IMAGE}\n{question}" if name else question)])
        pixels = assistant.pixels(picture) if picture else None
        logits = model(input_ids=torch.tensor([ids], device=device), pixel_values=pixels, logits_to_keep=LOGITS_TO_KEEP).logits[0]
        ours["ids"].append(ids)
        ours["pixels"].append(None if pixels is None else pixels[0].cpu())
        ours["logits"].append(logits.cpu())
        ours["answers"].append(assistant.answer(picture, question, max_new_tokens=MAX_NEW_TOKENS).text)
    if model.lm_head.bias is not None:
        ours["bias"] = model.lm_head.bias.detach().cpu()
    try:
        ours["end"] = end_of_turn(processor.tokenizer, processor.chat_template)
    except ValueError as error:  # a template of other people's: what is wrong with it is a finding
        ours["end"] = str(error)
    return ours


def _ask_stock(folder: Path, exchange: Path, device: str) -> dict[str, Any] | str:
    """The reply of transformers alone, or the last line of what it said instead."""
    asked = [(f"{name}.png" if name else None, question) for name, question in ASKED]
    request = {"checkpoint": str(folder.resolve()), "device": device, "asked": asked}
    request |= {"max_new_tokens": MAX_NEW_TOKENS, "logits_to_keep": LOGITS_TO_KEEP}
    (exchange / "request.json").write_text(json.dumps(request), encoding="utf-8")
    program = Path(__file__).with_name("stock_reader.py")
    done = subprocess.run([sys.executable, "-P", program, exchange], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    reply = json.loads((exchange / "reply.json").read_text(encoding="utf-8"))
    return reply | {"tensors": load_file(exchange / "reply.safetensors")}


def _file_checks(files: CheckpointFolder) -> list[Check]:
    odd = _odd_keys(files)
    text = files.config["text_config"]
    says, holds = str(files.config.get("dtype", files.config.get("torch_dtype"))), ", ".join(sorted(files.dtypes))
    return [
        Check("files", True, "whole; no pickles, no code"),
        Check("names of weights", not odd, f"{len(odd)} of no LLaVA, such as {odd[0]}" if odd else "as every LLaVA has them"),
        Check("type of weights", says == holds, holds if says == holds else f"{holds}, but the config says {says}"),
        Check("language model named", bool(text.get("architectures")), f"text_config.architectures is {text.get('architectures')}"),
    ]


def _odd_keys(files: CheckpointFolder) -> list[str]:
    return sorted(key for key in files.keys if not key.startswith(_KEY_PARTS))


def _load_checks(files: CheckpointFolder, stock: dict[str, Any]) -> list[Check]:
    """What the stock class made of the weights. The head's bias has a line of its own."""
    keys = {kind: [key for key in found if key != "lm_head.bias"] for kind, found in stock["keys"].items()}
    wrong = [f"{len(found)} {kind.removesuffix('_keys')}, such as {found[0]}" for kind, found in keys.items() if found]
    ties = bool(files.config["text_config"].get("tie_word_embeddings", files.config.get("tie_word_embeddings")))
    said = "tied" if stock["tied"] else "a head of its own"
    dropped = "lm_head.bias" in stock["keys"]["unexpected_keys"]
    bias = "dropped by the stock class" if dropped else "kept" if has_head_bias(files.config) else "there is none"
    return [
        Check("loads without mipha", stock["class"].endswith(".LlavaForConditionalGeneration"), stock["class"]),
        Check("weights", not wrong, "; ".join(wrong) or f"all {len(files.keys)} are used"),
        Check("head and word embeddings", stock["tied"] == ties, said if stock["tied"] == ties else f"{said}, but the config says tied={ties}"),
        Check("head bias", not dropped, bias),
    ]


def _prompt_checks(files: CheckpointFolder, ours: dict[str, Any], stock: dict[str, Any]) -> list[Check]:
    written = {ids.count(stock["image_token_ids"][1]) for ids, (name, _) in zip(stock["ids"], ASKED, strict=True) if name}
    counts = {tokens_per_image(files.processor), *written, *stock["features"]}
    same = sum(mine == theirs for mine, theirs in zip(ours["ids"], stock["ids"], strict=True))
    image, pad, (known, rows) = set(stock["image_token_ids"]), stock["pad_id"], stock["vocabulary"]
    special = len(image) == 1 and pad is not None and pad not in image and max(image) < known <= rows
    ends = ours["end"] in stock["end_ids"]
    return [
        Check("prompts", same == len(ASKED), f"the template writes {same} of {len(ASKED)} as we do, token by token"),
        Check("tokens per image", len(counts) == 1, " and ".join(map(str, sorted(counts))) + ", by processor and by tower"),
        Check("special tokens", special, f"image {sorted(image)}, padding {pad}, {known} tokens for {rows} rows"),
        Check("end of an answer", ends, f"the template ends it in {ours['end']}, generation at {stock['end_ids']}"),
    ]


def _number_checks(ours: dict[str, Any], stock: dict[str, Any]) -> list[Check]:
    tensors: dict[str, Tensor] = stock["tensors"]
    pixels = [_difference(mine, tensors[f"pixels.{i}"]) for i, mine in enumerate(ours["pixels"]) if mine is not None]
    theirs = [tensors[f"logits.{i}"] for i in range(len(ASKED))]
    largest = max(float(mine.abs().max()) for mine in ours["logits"])
    worst = max(map(_difference, ours["logits"], theirs))
    found = f"differ by up to {worst:.1e}, of {largest:.1f}"
    if ours["bias"] is not None and worst > TOLERANCE * largest:
        mended = max(_difference(mine, other + ours["bias"]) for mine, other in zip(ours["logits"], theirs, strict=True))
        found += f"; with the head's bias put back, by {mended:.1e}"
    same = sum(mine == other for mine, other in zip(ours["answers"], stock["answers"], strict=True))
    return [
        Check("pixels", max(pixels) == 0, f"differ by up to {max(pixels):.1e}" if max(pixels) else "the same"),
        Check("logits", worst <= TOLERANCE * largest, found),
        Check("answers", same == len(ASKED), f"{same} of {len(ASKED)} are ours, word by word"),
    ]


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) if one.shape == other.shape else float("inf")
