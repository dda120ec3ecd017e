"""Results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from mipha.evaluation.benchmark import Benchmark, Plan, Question
from mipha.evaluation.engine_check import EngineCheck
from mipha.evaluation.paired import PairedRow
from mipha.evaluation.score import Result
from mipha.terminal import Console

NUM_SHOWN = 3
"""Prompts that a dry run shows of each benchmark."""
LONGEST_SHOWN = 300
"""Characters that it shows of a text whose likelihood is measured."""


def print_results(results: Sequence[Result]) -> None:
    """Print every score with its interval, the baselines, and the notes."""
    console = Console()
    for result in results:
        num_scored = result.n_asked - result.n_failed
        notes = [f"{result.benchmark}: {note}" for note in result.notes]

        # The note that all answers are empty comes before their numbers.
        if result.all_empty:
            _print_line(console, notes.pop(0), style="red")
        if result.scores:
            console.print(_score_table(result))
        for note in notes:
            _print_line(console, note)

        if check := result.engine_check:
            _print_line(console, f"{result.benchmark}: {describe_check(check)}")

        # Answers that are missing.
        if result.n_failed:
            console.print(
                f"{result.n_failed} of {result.n_asked} questions failed and are not in these "
                "scores: see errors.jsonl",
                style="red",
            )
        if not result.complete:
            console.print(f"not complete: {num_scored} of {result.num_questions} questions")


def print_plan(plans: Sequence[Plan], checkpoint: Path | None) -> None:
    """Print questions, doubts, and three prompts of each benchmark.

    Args:
        plans: The benchmarks.
        checkpoint: Model folder whose template the prompts are shown in; None: as they are sent.
    """
    console = Console()
    render = None
    if checkpoint is not None:
        from mipha.assistant import render_prompt
        from mipha.models.processing import load_processor

        render = partial(render_prompt, load_processor(checkpoint))
    for plan in plans:
        console.print(
            f"[bold]{plan.name}[/] {plan.split}: {len(plan.questions):,} questions, "
            "all files are there",
            highlight=False,
        )
        for doubt in plan.doubts:
            console.print(
                f"  warning: {doubt}", style="yellow", soft_wrap=True, highlight=False, markup=False
            )
        for question in _pick(plan.questions):
            console.print(f"  {question.id}", style="dim", markup=False, highlight=False)
            prompt = question.text
            if plan.benchmark.by_likelihood:
                prompt += question.facts["continuations"][0][:LONGEST_SHOWN]
            elif render is not None:
                prompt = render(question.text, len(question.images))
            console.print(
                "    " + prompt.replace("\n", "\n    "),
                soft_wrap=True,
                markup=False,
                highlight=False,
            )


def print_scored(benchmark: Benchmark, content: Mapping[str, Any]) -> None:
    """Print what `mipha score` found, every metric with its unit."""
    console = Console()
    notes, failed = list(content["notes"]), content.get("failed", {})

    # The note that all answers are empty comes before their numbers.
    if content["all_empty"]:
        _print_line(console, notes.pop(0), style="red")

    table = _table("", "metric", "value", "95 % interval")
    low, high = content["interval"]
    interval = "" if low is None else f"{low:.2f} to {high:.2f}"
    headline = _value(content["headline"], content["unit"])
    table.add_row(content["metric"], headline, interval, style="bold")

    for name, value in content["metrics"].items():
        members = value.items() if isinstance(value, dict) else [("", value)]
        for member, number in members:
            metric = f"{name}.{member}" if member else name
            if name != content["metric"]:
                table.add_row(metric, _value(number, benchmark.metric(metric).unit))

    console.print(table)
    for note in notes:
        _print_line(console, note)
    if failed:
        _print_line(console, f"not complete: {len(failed)} answers were not judged", style="red")


def print_paired(rows: Sequence[PairedRow]) -> None:
    """Print differences with intervals and p-values, benchmark by benchmark."""
    columns = ("benchmark", "metric", "difference", "95 % interval", "p", "p (Holm)")
    table = _table("A minus B, question by question", *columns)
    shown = ""
    for row in rows:
        found = row.paired
        table.add_row(
            "" if row.benchmark == shown else row.benchmark,
            row.metric,
            f"{found.difference:+.2f} {row.unit}",
            f"{found.low:+.2f} to {found.high:+.2f}",
            f"{found.p_value:.4f}",
            "" if row.p_holm is None else f"{row.p_holm:.4f}",
            style="" if row.p_holm is None else "bold",
        )
        shown = row.benchmark

    console = Console()
    console.print(table)
    console.print(
        "p: two-sided, swapping the answers of whole images; "
        "p (Holm): headlines, adjusted for the number of benchmarks",
        style="dim",
    )


def describe_check(check: EngineCheck) -> str:
    """Return in a sentence how an engine's answers compare with those of transformers."""
    share = f"{check.low:.1f} to {check.high:.1f} %"
    sentence = (
        f"{check.engine} gives the answers of transformers in float32 to {check.n_same} of "
        f"{check.n} questions (95 % interval {share})"
    )
    if check.score is None or check.reference_score is None:
        return sentence
    return (
        f"{sentence}; {check.metric} on these: {check.score:.1f}, there {check.reference_score:.1f}"
    )


def _print_line(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)


def _score_table(result: Result) -> Table:
    blind = " (blind)" if result.blind else ""
    title = f"{result.benchmark} {result.split}{blind}"
    table = _table(title, "metric", "value", "95 % interval", "n")
    for score in result.scores:
        interval = ""
        if score.low is not None and score.high is not None:
            interval = f"{score.low:.1f} to {score.high:.1f}"
        table.add_row(score.metric, _value(score.value, score.unit), interval, str(score.n))
    for name, value in result.baselines.items():
        table.add_row(f"{name} baseline", _value(value, result.scores[0].unit), style="dim")
    return table


def _pick(questions: Sequence[Question]) -> list[Question]:
    """Return a few questions from all over the benchmark."""
    return [
        questions[place * len(questions) // NUM_SHOWN]
        for place in range(min(NUM_SHOWN, len(questions)))
    ]


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "undefined"
    if unit == "questions":
        return f"{value:g}"
    return f"{value:.1f} %" if unit == "%" else f"{value:.1f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("metric", "benchmark") else "right")
    return table
