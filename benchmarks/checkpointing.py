"""Seconds and bytes of a training state of the quickstart's model, written and read.

    python benchmarks/checkpointing.py [--stage finetune] [--repeats 3] [--folder .] \\
        [--out benchmarks/results]

The baselines are torch.save of the whole model and the Trainer of transformers. Our state holds the
trained weights and their optimizer, is flushed to the disk, and appears whole or not at all. The
baselines write everything in place and flush nothing, so their time may end before the bytes have
reached the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Row, report, side_by_side
from torch import nn
from transformers import Trainer, TrainingArguments
from ways import stock_model
from workloads import SINGLE, TUNING, quickstart_parts, stage_recipe

from mipha.engine.states import StateWriter, load_state
from mipha.models.build import build
from mipha.models.tuning import apply_tuning
from mipha.recipe import ModelRecipe
from mipha.training.loop import make_optimizer
from mipha.world import join_world


def measure(
    folder: Path, parts: ModelRecipe, stage: str, repeats: int
) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of saving and of resuming, and the bytes of each.

    Args:
        folder: Folder on the disk that is measured.
        parts: Parts of the model.
        stage: `pretrain` (the projector trains) or `finetune` (also the language model).
        repeats: Number of rounds.
    """
    # Build a model whose optimizer holds its moments, and every writer.
    world = join_world()
    torch.manual_seed(0)
    model, _ = build(parts)
    apply_tuning(model, TUNING[stage])
    optimizer = make_optimizer(model, stage_recipe(Path("unused"), SINGLE, stage, "packed"))
    _one_step(model, optimizer)

    own, whole, stock = folder / "mipha", folder / "whole.pt", folder / "trainer"
    trainer = _trainer(model, optimizer, stock)
    writer, background = (
        StateWriter(own / name, world, asynchronous=name == "background")
        for name in ("sync", "background")
    )

    def save_whole() -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, whole)

    def save_trainer() -> None:
        trainer._save_checkpoint(trainer.model, trial=None)

    def load_whole() -> None:
        state = torch.load(whole)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    # Time them.
    saving: dict[str, Callable[[], Any]] = {
        "torch.save of all": save_whole,
        "Trainer": save_trainer,
        "mipha": lambda: writer.save(1, model, optimizer, {"seed": 0}),
        "mipha, in the background: until training goes on": lambda: background.save(
            1, model, optimizer, {"seed": 0}
        ),
        "mipha, in the background: the rest of it": background.finish,
    }
    loading: dict[str, Callable[[], Any]] = {
        "torch.load of all": load_whole,
        "mipha": lambda: load_state(own / "sync", model, optimizer, world),
    }

    rows = side_by_side(f"save, {stage}", "times", 1, saving, repeats) + side_by_side(
        f"resume, {stage}", "times", 1, loading, repeats
    )

    sizes = {
        "torch.save of all": _bytes(whole),
        "Trainer": _bytes(stock),
        "mipha": _bytes(own / "sync"),
    }
    return rows, {f"megabytes, {stage}, {way}": round(size / 1e6, 1) for way, size in sizes.items()}


def _one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take one step, so that the optimizer holds its moments."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e-4)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _trainer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_total_limit=1,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(model=stock_model(model), args=arguments, optimizers=(optimizer, schedule))
    trainer.state.global_step = 1
    return trainer


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def disk_rate(folder: Path, megabytes: int = 256) -> float:
    """Return the megabytes a second that reach the disk; no writer can be faster."""
    block = os.urandom(1 << 20)
    started = time.perf_counter()
    with (folder / "probe").open("wb") as file:
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    (folder / "probe").unlink()
    return megabytes / (time.perf_counter() - started)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage",
        action="append",
        choices=list(TUNING),
        help="stage to measure; repeat it for more; default: both",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder on the disk to measure; default: the system's temporary folder",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    rows: list[Row] = []
    facts: dict[str, Any] = {"repeats": options.repeats}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        facts["MB/s of the disk, flushed"] = round(disk_rate(Path(name)))
        for stage in options.stage or TUNING:
            folder = Path(name) / stage
            folder.mkdir()
            found, sizes = measure(folder, quickstart_parts(SINGLE), stage, options.repeats)
            rows += found
            facts |= sizes
            shutil.rmtree(folder)

    facts["seconds"] = json.dumps(
        {f"{row.case}: {row.way}": round(1 / row.rate, 2) for row in rows}
    )
    report("checkpointing", "Training states: saved and resumed", rows, options.out, facts)


if __name__ == "__main__":
    main()
