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
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file

from mipha.assistant import Assistant
from mipha.data.sample import IMAGE, Message
from mipha.deploy.checks import ASKED, Check, file_checks, load_checks, number_checks, prompt_checks
from mipha.deploy.folder import odd_keys, read_folder
from mipha.deploy.runtimes import Runtime, Status, runtimes
from mipha.models.language_model import end_of_turn
from mipha.models.modeling import load_model
from mipha.models.processing import load_processor
from mipha.run import model_folder

MAX_NEW_TOKENS = 16
LOGITS_TO_KEEP = 32
"""Of the last tokens of a prompt: through attention they depend on all before them."""


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
    folder = (
        Path(checkpoint)
        if (Path(checkpoint) / "config.json").is_file()
        else model_folder(checkpoint)
    )
    files = read_folder(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory() as place:
        exchange = Path(place)
        pictures = _make_pictures(exchange)
        ours = _ask_ours(folder, pictures, device)
        torch.cuda.empty_cache()  # one model at a time: the other process loads its own
        stock = _ask_stock(folder, exchange, device)
    status: Status
    if isinstance(stock, str):
        measured, status = [Check("loads without mipha", False, stock)], "unsupported"
    else:
        measured = [
            *load_checks(files, stock),
            *prompt_checks(files, ours, stock),
            *number_checks(ours, stock),
        ]
        status = "exact" if all(check.passed for check in measured) else "approximate"
    failed = "; ".join(f"{check.name}: {check.found}" for check in measured if not check.passed)
    judged = [
        replace(row, status=status, reason=failed or row.reason)
        if row.name == "transformers"
        else row
        for row in runtimes(files.config, files.processor, odd_keys(files))
    ]
    return Verification(str(folder), (*file_checks(files), *measured), tuple(judged))


def print_verification(found: Verification) -> None:
    """The checks, and where the checkpoint runs."""
    console = Console()
    checks, where = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
    for table, columns in ((checks, ("check", "", "found")), (where, ("runs in", "", "why"))):
        for column in columns:
            table.add_column(column, overflow="fold")
    for check in found.checks:
        checks.add_row(
            check.name, "[green]ok[/]" if check.passed else "[red]no[/]", escape(check.found)
        )
    colours = {"exact": "green", "approximate": "yellow", "unsupported": "red"}
    for row in found.runtimes:
        where.add_row(row.name, f"[{colours[row.status]}]{row.status}[/]", escape(row.reason))
    console.print(checks, "", where, "", sep="\n")
    failed = sum(not check.passed for check in found.checks)
    console.print(
        f"{found.checkpoint}: {f'{failed} checks failed' if failed else 'exact'}",
        highlight=False,
        soft_wrap=True,
    )


def _make_pictures(folder: Path) -> dict[str, Image.Image]:
    """Coloured ramps with noise: no two patches are alike, and neither are the pictures."""
    random, pictures = np.random.default_rng(0), {}
    for name, (width, height) in {"wide": (96, 60), "tall": (50, 90), "square": (64, 64)}.items():
        ramp = (
            np.linspace(0, 160, width)[None, :, None] * random.random(3)
            + np.linspace(0, 60, height)[:, None, None]
        )
        pictures[name] = Image.fromarray(
            (ramp + random.integers(0, 30, (height, width, 3))).astype(np.uint8)
        )
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
        logits = model(
            input_ids=torch.tensor([ids], device=device),
            pixel_values=pixels,
            logits_to_keep=LOGITS_TO_KEEP,
        ).logits[0]
        ours["ids"].append(ids)
        ours["pixels"].append(None if pixels is None else pixels[0].cpu())
        ours["logits"].append(logits.cpu())
        ours["answers"].append(
            assistant.answer(picture, question, max_new_tokens=MAX_NEW_TOKENS).text
        )
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
