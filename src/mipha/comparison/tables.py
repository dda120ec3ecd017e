"""Rows as Markdown, CSV and LaTeX: one table, the best number of each column marked."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mipha.comparison.figures import draw_radar
from mipha.comparison.results import (
    FACTS,
    TITLES,
    Row,
    best_of,
    columns_of,
    footnotes_of,
    measured,
    published_rows,
    warn_of_protocols,
)
from mipha.files import write_whole
from mipha.run import Run

FORM_OF = {".md": "markdown", ".csv": "csv", ".tex": "latex"}
"""File ending to form."""


@dataclass(frozen=True)
class Comparison:
    """Rows side by side, for a notebook or a file."""

    rows: tuple[Row, ...]

    def markdown(self) -> str:
        """Return a Markdown table."""
        return render(self.rows)

    def write(self, path: str | Path) -> None:
        """Write a table as .md, .csv or .tex, or a radar as .png or .svg.

        Raises:
            ValueError: Another ending, or too little for a radar.
        """
        path = Path(path)
        if path.suffix in (".png", ".svg"):
            draw_radar(self.rows, path)
        elif path.suffix in FORM_OF:
            write_whole(path, render(self.rows, FORM_OF[path.suffix]))
        else:
            raise ValueError(
                f"{path}: a comparison is written as {', '.join(FORM_OF)}, .png or .svg"
            )


def compare(runs: Iterable[str | Path | Run] = (), published: Iterable[str] = ()) -> Comparison:
    """Put published models, then runs, side by side.

    Args:
        runs: Run folders, or folders of results.
        published: Names in the published tables, or whole tables: `table-1` to `table-4` of the
            paper, `small-models`.

    Raises:
        FileNotFoundError: A run without scores.
        ValueError: A name that no table lists, or nothing to compare.
    """
    theirs = [row for name in published for row in published_rows(name)]
    rows = (*theirs, *(measured(run.folder if isinstance(run, Run) else Path(run)) for run in runs))
    if not rows:
        raise ValueError("nothing to compare: give at least one run or published model")
    return Comparison(rows)


def print_comparison(found: Comparison) -> None:
    """Print a comparison with a column per model, because a line of all benchmarks is too wide.

    Many models get a line each, of numbers alone.
    """
    from rich.table import Table

    from mipha.terminal import Console

    header, body = _cells(found.rows, "[bold]{}[/bold]")
    lines = [["", *header[1:]], *body]
    if len(body) > len(header):
        num_columns = len(columns_of(found.rows))
        lines = [[line[0], *line[-num_columns:]] for line in lines]
    else:
        lines = list(zip(*lines, strict=True))

    head, *rest = lines
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for line in rest:
        table.add_row(*line)
    console = Console()
    console.print(table)
    for mark, meaning in footnotes_of(found.rows).items():
        console.print(f"{mark} {meaning}", style="dim", soft_wrap=True, markup=False)
    if warning := warn_of_protocols(found.rows):
        console.print(warning, style="yellow", soft_wrap=True, markup=False, highlight=False)


def render(rows: Sequence[Row], form: str = "markdown") -> str:
    """Return the table as text.

    Args:
        rows: Rows in the order of the table.
        form: markdown, csv or latex. CSV has plain numbers, with footnote marks and intervals in
            columns of their own; the others show `-` for an absent number, the best number of each
            column in bold, and the meaning of the footnote marks below.

    Raises:
        ValueError: No such form, or no rows.
    """
    if not rows:
        raise ValueError("a table of no rows: give at least one run or published model")
    if form not in FORM_OF.values():
        raise ValueError(f"no form {form!r}: use {', '.join(FORM_OF.values())}")
    return {"csv": _csv, "markdown": _markdown, "latex": _latex}[form](rows)


def _cells(rows: Sequence[Row], bold: str) -> tuple[list[str], list[list[str]]]:
    """Return header and body as shown."""
    facts = [key for key in FACTS if any(key in row.facts for row in rows)]
    columns = columns_of(rows)
    best = {column: best_of(rows, column) for column in columns}

    body = []
    for row in rows:
        shown = []
        for column in columns:
            cell = row.cells.get(column)
            if cell is None:
                shown.append("-")
            elif cell.value == best[column] and len(rows) > 1:
                shown.append(bold.format(cell.printed))
            else:
                shown.append(cell.printed)
        body.append([row.name, *(row.facts.get(key, "-") for key in facts), *shown])
    return ["model", *(TITLES.get(key, key) for key in (*facts, *columns))], body


def _markdown(rows: Sequence[Row]) -> str:
    header, body = _cells(rows, "**{}**")
    # An asterisk that marks a footnote would end the bold text that it stands in.
    body = [
        [cell.replace("***", "**\\*") if cell.endswith("***") else cell for cell in line]
        for line in body
    ]
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *body]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)

    # Each footnote is a paragraph of its own; without its backslash a star would begin a list.
    shown = {"*": r"\*"}
    notes = footnotes_of(rows).items()
    paragraphs = [f"{shown.get(mark, mark)} {meaning}" for mark, meaning in notes]
    paragraphs += filter(None, [warn_of_protocols(rows)])
    return table + "".join(f"\n{paragraph}\n" for paragraph in paragraphs)


def _latex(rows: Sequence[Row]) -> str:
    header, body = _cells(rows, r"\textbf{{{}}}")
    escape = str.maketrans(
        {"_": r"\_", "%": r"\%", "&": r"\&", "~": r"$\sim$"}
        | {"*": r"$^*$", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "§": r"\S{}"}
        | {"¶": r"\P{}", "◊": r"$^\diamond$", "¿": "?`"}
    )
    lines = [" & ".join(cell.translate(escape) for cell in line) + r" \\" for line in body]
    top = " & ".join(cell.translate(escape) for cell in header) + r" \\"
    span = rf"\multicolumn{{{len(header)}}}{{l}}"
    notes = [
        rf"{span}{{\footnotesize {mark.translate(escape)} {meaning}}} \\"
        for mark, meaning in footnotes_of(rows).items()
    ]
    if warning := warn_of_protocols(rows):
        notes.append(rf"{span}{{\footnotesize {warning.translate(escape)}}} \\")
    table = [
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        *("\\toprule", top, "\\midrule", *lines, "\\bottomrule", *notes),
        "\\end{tabular}",
    ]
    return "\n".join(table) + "\n"


def _csv(rows: Sequence[Row]) -> str:
    facts = [key for key in FACTS if any(key in row.facts for row in rows)]
    columns = columns_of(rows)
    known = [
        column
        for column in columns
        if any(row.cells[column].low is not None for row in rows if column in row.cells)
    ]

    header = [
        "name",
        *facts,
        *columns,
        *(f"{column}_{end}" for column in known for end in ("low", "high")),
        "footnotes",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()

    for row in rows:
        ends = {
            f"{c}_{end}": getattr(row.cells[c], end)
            for c in known
            if c in row.cells
            for end in ("low", "high")
        }
        marks = {column: cell.printed.lstrip("0123456789.") for column, cell in row.cells.items()}
        notes = "; ".join(f"{column} {mark}" for column, mark in marks.items() if mark)

        writer.writerow(
            {
                "name": row.name,
                **row.facts,
                **{c: cell.value for c, cell in row.cells.items()},
                **ends,
                "footnotes": notes,
            }
        )
    return text.getvalue()
