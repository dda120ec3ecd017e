"""The tour: train, measure, compare with what needs no eyes, show. It runs the same commands that a user would type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mipha.comparison.figures import contact_sheet
from mipha.data.images import open_image
from mipha.evaluation.benchmark import Question, load_benchmark
from mipha.evaluation.predict import read_predictions
from mipha.files import write_whole
from mipha.run import Run

BENCHMARK = "easy_vqa"
BEFORE_LIMIT = 2000
"""Questions that the model is asked before its second stage, when it rambles: enough to tell a few percent from a hundred."""


@dataclass(frozen=True)
class Phase:
    """One command of the tour."""

    name: str
    command: tuple[str, ...]


def quickstart(folder: Path, overrides: Sequence[str] = (), limit: int | None = None) -> None:
    """Train the quickstart recipe, evaluate it, train and evaluate its baselines, and sum up.

    Args:
        folder: Run folder; started again, the tour goes on where it stopped.
        overrides: Recipe overrides for both trainings.
        limit: Ask the first N test questions only.
    """
    console = Console()
    for phase in phases(folder, overrides, limit):
        _run_phase(phase, folder / "quickstart.json", console)
    _sum_up(folder, console)


def phases(folder: Path, overrides: Sequence[str], limit: int | None) -> list[Phase]:
    """The commands of the tour, in order."""
    some = ("-b", BENCHMARK, "--batch-size", "64")
    ask = (*some, *(("--limit", str(limit)) if limit else ()))
    ask_before = (*some, "--limit", str(min(limit or BEFORE_LIMIT, BEFORE_LIMIT)))
    blind = folder / "blind"
    return [
        Phase("train", ("train", "quickstart", "-o", str(folder), *overrides)),
        Phase("evaluate", ("evaluate", str(folder), *ask)),
        Phase(
            "evaluate before finetune",
            (
                "evaluate",
                str(folder / "pretrain/checkpoint"),
                *ask_before,
                "-o",
                str(folder / "before-finetune"),
            ),
        ),
        Phase("train blind", ("train", "quickstart-blind", "-o", str(blind), *overrides)),
        Phase("evaluate blind", ("evaluate", str(blind), *ask, "--blind")),
    ]


def _run_phase(phase: Phase, ledger: Path, console: Console) -> None:
    """Run a command in a process of its own, so that its time and peak memory are its own; add them to the ledger."""
    done = json.loads(ledger.read_text()) if ledger.is_file() else {}
    record = done.get(phase.name, {"seconds": 0.0, "peak_memory_gib": 0.0, "finished": False})
    if record["finished"]:
        return
    console.print(f"\n[bold]$ mipha {' '.join(phase.command)}", soft_wrap=True)
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "mipha", *phase.command])
    interrupted = False
    while True:
        try:
            _, status, usage = os.wait4(child.pid, 0)
            break
        except KeyboardInterrupt:  # the command got it too, and saves before it ends
            interrupted = True
    child.returncode = os.waitstatus_to_exitcode(status)
    record["seconds"] += time.monotonic() - started
    record["peak_memory_gib"] = max(
        record["peak_memory_gib"], usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    )
    record["finished"] = child.returncode == 0
    if ledger.parent.is_dir():
        write_whole(ledger, json.dumps(done | {phase.name: record}, indent=2) + "\n")
    if interrupted or child.returncode == 130:
        raise KeyboardInterrupt
    if child.returncode:
        raise ValueError(
            f"`mipha {' '.join(phase.command)}` ended with exit code {child.returncode}; its message is above. Mend it and start again"
        )


def _sum_up(folder: Path, console: Console) -> None:
    run = Run(folder)
    seen = _scores(run.evaluation(BENCHMARK))
    blind = _scores(Run(folder / "blind").evaluation(f"{BENCHMARK}-blind"))
    before = _scores(folder / "before-finetune" / BENCHMARK)
    table = Table(
        title=f"\neasy-VQA, official test split: {seen['n_asked']:,} of {seen['num_questions']:,} questions",
        title_justify="left",
    )
    for column, justify in (
        ("", "left"),
        ("accuracy %", "right"),
        ("95 % interval", "right"),
        ("questions", "right"),
    ):
        table.add_column(column, justify=justify)
    for row in seen["scores"]:
        if row["unit"] == "%" and not row["metric"].startswith("answer_"):
            table.add_row(
                row["metric"].replace("_", " "),
                f"{row['value']:.2f}",
                f"{row['low']:.2f} to {row['high']:.2f}",
                f"{row['n']:,}",
                style="bold" if row["metric"] == "accuracy" else "",
            )
    table.add_section()
    for name, value in seen["baselines"].items():
        table.add_row(
            f"baseline: {name.replace('_', ' ')}",
            f"{value:.2f}",
            "",
            f"{seen['n_asked']:,}",
            style="dim",
        )
    for name, scores in (("same model trained blind", blind), ("before finetune", before)):
        row = scores["scores"][0]
        table.add_row(
            f"baseline: {name}",
            f"{row['value']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            f"{row['n']:,}",
            style="dim",
        )
    console.print(table)
    ledger = json.loads((folder / "quickstart.json").read_text())
    costs = Table(title="\nTime and peak memory", title_justify="left")
    for column, justify in (("phase", "left"), ("minutes", "right"), ("GiB", "right")):
        costs.add_column(column, justify=justify)
    for name, record in ledger.items():
        costs.add_row(name, f"{record['seconds'] / 60:.1f}", f"{record['peak_memory_gib']:.2f}")
    console.print(costs)
    examples = _examples(
        load_benchmark(BENCHMARK).questions(None, "test"),
        read_predictions(run.evaluation(BENCHMARK)),
    )
    for question, text in examples:
        console.print(
            f"{question.image.name:>9}  {question.text}  [bold]{text}[/]  [dim](published: {question.facts['answer']})"
        )
    sheet = folder / "contact-sheet.png"
    contact_sheet(
        [
            (open_image(question.image), question.text, text, question.facts["answer"])
            for question, text in examples
        ],
        sheet,
    )
    console.print(
        f"\ncontact sheet: {sheet}\nloss curves:   {run.stage('pretrain') / 'loss.png'}, {run.stage('finetune') / 'loss.png'}"
    )
    console.print(
        f"\nTalk to it:\n  .venv/bin/mipha chat {folder} --image {examples[0][0].image}",
        soft_wrap=True,
    )


def _scores(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def _examples(
    questions: Sequence[Question], predictions: dict[str, str], num: int = 5
) -> list[tuple[Question, str]]:
    """Five pictures spread over what was asked, each with a question of another kind in turn: chosen by place, not by success."""
    kinds = ("yes_no", "shape", "colour")
    by_image: dict[Any, list[Question]] = {}
    for question in questions:
        if question.id in predictions:
            by_image.setdefault(question.facts["image"], []).append(question)
    images = list(by_image.values())
    chosen = [images[place * len(images) // num] for place in range(min(num, len(images)))]
    examples = []
    for number, asked in enumerate(chosen):
        fitting = [
            question for question in asked if question.facts["kind"] == kinds[number % len(kinds)]
        ] or asked
        examples.append((fitting[0], predictions[fitting[0].id]))
    return examples
