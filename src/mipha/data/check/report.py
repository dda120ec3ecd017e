"""The linter's findings as a table for a terminal and as JSON; html.py writes the page."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mipha.data.check.findings import KINDS, SEVERITIES, Finding
from mipha.data.check.linter import NO_RECIPE, CheckResult, counts_by_kind

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_FIRST_ROWS = 4


def headline(result: CheckResult) -> str:
    """Say what was read, and how fast."""
    rows, distinct = result.num_rows / result.seconds, result.num_distinct / result.seconds
    speed = f"{rows:,.0f} rows/s" + (
        f", {distinct:,.0f} different images/s" if result.num_images else ""
    )
    images = (
        f", {result.num_images:,} images ({result.num_distinct:,} different)"
        if result.num_images
        else ", no images"
    )
    return (
        f"{result.num_rows:,} rows, {result.num_samples:,} samples{images} "
        f"in {result.seconds:,.1f} s ({speed})"
    )


def verdict(result: CheckResult) -> str:
    """Say how many findings of each severity there are."""
    return ", ".join(_number(result.count(severity), severity) for severity in SEVERITIES)


def by_kind(result: CheckResult) -> dict[str, list[Finding]]:
    """Group the findings by kind, the most severe and frequent kinds first."""
    groups: dict[str, list[Finding]] = {kind: [] for kind in counts_by_kind(result.findings)}
    for finding in result.findings:
        groups[finding.kind].append(finding)
    return groups


def training_lines(result: CheckResult) -> list[tuple[str, str]]:
    """Return label and value of what a stage makes of the set; empty without a recipe."""
    training = result.training
    if training is None:
        return []
    stage, share = training.stage, 100 * training.num_trained / max(training.num_tokens, 1)
    epochs = training.samples_read / max(training.num_samples, 1)
    lines = [
        ("samples that train", f"{training.num_samples:,}"),
        (
            "tokens",
            f"{training.num_tokens:,}, of them trained on {training.num_trained:,} ({share:.1f} %)",
        ),
        (
            "optimizer steps",
            f"{training.steps:,} of {stage.batch_size} samples: "
            f"{training.samples_read:,} samples, {epochs:.2f} epochs",
        ),
    ]
    for packing in training.packings:
        value = f"{packing.positions_per_sample:,.0f} positions a sample, "
        value += (
            f"{packing.padding:.1f} % of them padding; {packing.rows_per_step:,.1f} rows a step, "
        )
        value += f"{packing.fullness:.0f} % full"
        lines.append((packing.batching + (" (the recipe's)" if packing.chosen else ""), value))
    return lines


def answer_lines(result: CheckResult) -> list[tuple[str, str]]:
    """Return label and value of how short answers are spread; empty if there are none."""
    answers = result.answers
    if not answers.num_short:
        return []
    lines = [("short answers", f"{answers.num_short:,}, {answers.num_distinct:,} different")]
    if answers.num_guessable:
        share = 100 * answers.num_guessed / answers.num_guessable
        lines.append(
            (
                "guessed without the image",
                f"{share:.1f} % of {answers.num_guessable:,} answers "
                "to questions asked 5 times or more",
            )
        )
    return lines


def text_report(result: CheckResult) -> RenderableType:
    """Render for a terminal: the findings grouped by kind, then lengths, steps and packing."""
    parts: list[RenderableType] = [Text(result.data.name, "bold"), Text(headline(result))]
    if result.data.format:
        parts.append(Text(result.data.shorten(result.data.format)))
    if result.against:
        parts.append(Text(f"compared with {result.against}"))

    if result.findings:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("severity", "count", "first rows", "finding, an example, and the fix"):
            table.add_column(
                column, justify="right" if column == "count" else "left", overflow="fold"
            )
        for kind, found in by_kind(result).items():
            rows = [str(finding.row) for finding in found if finding.row is not None]
            listed = ", ".join(rows[:_FIRST_ROWS]) + (", …" if len(rows) > _FIRST_ROWS else "")
            severity = KINDS[kind].severity
            about = Text.assemble((KINDS[kind].title, "bold"), "\n", found[0].sentence)
            table.add_row(
                Text(severity, COLOURS[severity]), f"{len(found):,}", listed or "the set", about
            )
        parts.append(table)

    facts = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for histogram in result.histograms:
        spread = f"{histogram.minimum:,.0f} to {histogram.maximum:,.0f} {histogram.unit}"
        middle = f"median {histogram.median:,.0f}, 95 % up to {histogram.p95:,.0f}"
        facts.add_row(histogram.name, Text(f"{spread}, {middle}"))
    for label, value in (*answer_lines(result), *training_lines(result)):
        facts.add_row(label, Text(value))
    if facts.row_count:
        parts.append(facts)
    if result.training is None:
        parts.append(Text(NO_RECIPE, "dim"))
    return Group(
        *parts, Text(verdict(result), COLOURS["error"] if result.num_errors else "bold green")
    )


def json_report(result: CheckResult) -> str:
    """Write as JSON everything that was found and measured, every finding in full.

    docs/data.md describes the keys.
    """
    training = result.training
    tree: dict[str, Any] = {
        "data": result.data.name,
        "format": result.data.format,
        "against": result.against,
        "rows": result.num_rows,
        "samples": result.num_samples,
        "text_only": sum(file.text_only for file in result.files),
        "turns": sum(file.turns for file in result.files),
        "images": result.num_images,
        "distinct_images": result.num_distinct,
        "seconds": round(result.seconds, 3),
        "rows_per_second": round(result.num_rows / result.seconds, 1),
        "distinct_images_per_second": round(result.num_distinct / result.seconds, 1),
        "severities": {severity: result.count(severity) for severity in SEVERITIES},
        "kinds": counts_by_kind(result.findings),
        "files": [file._asdict() for file in result.files if file.file],
        "left_out": result.data.left_out,
        **(result.data.rated._asdict() if result.data.rated else {}),
        "not_checked": NO_RECIPE if training is None else None,
        "histograms": [histogram._asdict() for histogram in result.histograms],
        "answers": result.answers._asdict(),
        "training": training
        and {
            "samples": training.num_samples,
            "tokens": training.num_tokens,
            "trained_tokens": training.num_trained,
            "steps": training.steps,
            "samples_read": training.samples_read,
            "packings": [packing._asdict() for packing in training.packings],
        },
        "findings": [_as_json(finding) for finding in result.findings],
    }
    return json.dumps(tree, indent=1, default=list) + "\n"


def _as_json(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "row": finding.row,
        "where": finding.where,
        "what": finding.what,
        "mend": finding.fix,
    }


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
