"""Rows of published tables and of our own runs, with one name per benchmark.

An absent number stays absent.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mipha.files import read_json_object
from mipha.lookup import did_you_mean
from mipha.run import model_folder

PUBLISHED = Path(__file__).parents[1] / "catalog" / "published"

SMALL_MODELS = "small-models"
"""Table of current small models, in long form: a line for each number."""

FACTS = ("params", "language_model", "resolution", "pretrain_data", "finetune_data", "source")
"""Columns that say what a model is, where a table has them."""

TITLES = {
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "vizwiz": "VizWiz",
    "scienceqa": "SQA-I",
    "textvqa": "VQA-T",
    "pope": "POPE",
    "mme": "MME-P",
    "mme_cognition": "MME-C",
    "mmbench": "MMB",
    "mmbench-test": "MMB test",
    "mmbench_cn": "MMB-CN",
    "mmbench_cn-test": "MMB-CN test",
    "seedbench": "SEED-I",
    "mmvet": "MM-Vet",
    "mmmu": "MMMU",
    "mmmu-test": "MMMU test",
    "mmstar": "MMStar",
    "ai2d": "AI2D",
    "ai2d-no-mask": "AI2D no mask",
    "chartqa": "ChartQA",
    "docvqa": "DocVQA",
    "docvqa-test": "DocVQA test",
    "infovqa": "InfoVQA",
    "infovqa-test": "InfoVQA test",
    "ocrbench": "OCRBench",
    "mathvista": "MathVista",
    "hallusionbench": "HallB",
    "realworldqa": "RWQA",
    "refcoco": "RefCOCO",
    "refcoco_plus": "RefCOCO+",
    "refcocog": "RefCOCOg",
    "arc": "ARC-C",
    "arc-easy": "ARC-E",
    "wikitext": "WikiText-2",
    "MMLU": "MMLU",
    "BBH": "BBH",
    "GSM8K": "GSM8K",
    "HumanEval": "HumanEval",
    "params": "Size",
    "language_model": "LM",
    "resolution": "Res.",
    "pretrain_data": "PT",
    "finetune_data": "IT",
    "source": "Source",
}
"""Headings of columns, as in the paper."""

FOOTNOTES = {
    "*": "The training images or annotations of the benchmark were seen in training.",
    "†": "It includes data that are not public.",
    "~": "Not all questions of the benchmark were answered.",
    "‡": "All answers are empty.",
    "§": "By VLMEvalKit.",
    "¶": "By lmms-eval.",
    "◊": "By the source's own scripts.",
    "?": "The source does not say by which program.",
    "¿": "The source does not say of which split.",
}
"""Mark behind a number to its meaning.

Source: captions of tables 2 and 3 of the Mipha paper; those from `~` on are ours.
"""

LOWER_IS_BETTER = frozenset({"wikitext"})
"""Columns whose lowest number is the best."""

PROTOCOLS = {"official": "", "VLMEvalKit": "§", "lmms-eval": "¶", "own": "◊", "unknown": "?"}
"""Whose prompt and rules a number has, to its mark."""

_COLUMN_OF = {("mme", "cognition"): "mme_cognition"}
"""Columns of metrics in scores.json files that do not yet name them."""


@dataclass(frozen=True)
class Cell:
    """One number.

    Args:
        value: The number in the metric's unit.
        printed: The number as it is shown, footnote marks included.
        low: Lower end of its 95 % interval, where it is known.
        high: Upper end.
        protocol: Whose prompt and rules it has; `PROTOCOLS` are the usual ones.
    """

    value: float
    printed: str
    low: float | None = None
    high: float | None = None
    protocol: str = "official"


@dataclass(frozen=True)
class Row:
    """One model.

    Args:
        name: The one name of the model.
        facts: Column to value, of the facts that are known.
        cells: Column to number, of what was measured.
        group: Part of the table with this row.
    """

    name: str
    facts: dict[str, str]
    cells: dict[str, Cell]
    group: str = ""


@cache
def published_table(number: int) -> tuple[Row, ...]:
    """Return a table of the Mipha paper, 1 to 4, row by row as printed.

    Raises:
        ValueError: No such table.
    """
    path = PUBLISHED / f"table-{number}.csv"
    if not path.is_file():
        raise ValueError(f"the paper has no table of results {number}: 1 to 4")
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(_row(record) for record in csv.DictReader(file))


@cache
def small_models() -> tuple[Row, ...]:
    """Return the published numbers of current small models, a row for each model of a source."""
    rows: dict[tuple[str, str], Row] = {}
    with (PUBLISHED / f"{SMALL_MODELS}.csv").open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            facts = {"source": record["table"]}
            if record["params_b"]:
                facts["params"] = f"{record['params_b']}B"
            row = rows.setdefault(
                (record["name"], record["table"]), Row(record["name"], facts, {}, "small")
            )

            # OCRBench is printed in points of 1,000, or divided by 10.
            value, printed = float(record["value"]), record["value"]
            if record["unit"] == "points / 10":
                value, printed = 10 * value, f"{10 * value:g}"
            mark = PROTOCOLS[record["protocol"]] + ("" if record["split"] else "¿")
            row.cells[record["benchmark"]] = Cell(
                value, printed + mark, protocol=record["protocol"]
            )
    return tuple(rows.values())


def published(name: str) -> Row:
    """Return a published model with the numbers of all tables of the paper that list it.

    Raises:
        ValueError: No table does.
    """
    listed = [row for number in (2, 3, 4) for row in published_table(number)]
    found = [row for row in listed if row.name.lower() == name.lower()]
    if not found:
        known = list(dict.fromkeys(row.name for row in listed))
        raise ValueError(f"no published model {name!r}: {did_you_mean(name, known)}")

    # Where tables differ, the first one counts.
    facts = {key: value for row in reversed(found) for key, value in row.facts.items()}
    cells = {key: cell for row in reversed(found) for key, cell in row.cells.items()}
    return Row(found[0].name, facts, cells, found[0].group)


def published_rows(name: str) -> tuple[Row, ...]:
    """Return a published model, or a whole table: `Mipha-3B`, `table-2`, `small-models`.

    A model that several sources measured has a row for each.

    Raises:
        ValueError: No such model or table.
    """
    number = name.lower().removeprefix("table-")
    if number.isdigit():
        return published_table(int(number))
    if name.lower() == SMALL_MODELS:
        return small_models()

    listed = [row for number in (2, 3, 4) for row in published_table(number)]
    if any(row.name.lower() == name.lower() for row in listed):
        return (published(name),)
    found = tuple(row for row in small_models() if row.name.lower() == name.lower())
    if not found:
        known = list(dict.fromkeys(row.name for row in (*listed, *small_models())))
        raise ValueError(f"no published model {name!r}: {did_you_mean(name, known)}")
    return found


def measured(folder: Path) -> Row:
    """Return the headline scores of a run, or of a folder of `mipha evaluate -o`.

    Scores of blind answers are left out, and undefined ones. Those of an incomplete set are marked
    with `~`, those of answers that are all empty with `‡`.

    Raises:
        FileNotFoundError: No scores.
        ValueError: A file is not as it was written.
    """
    root = folder / "evaluation" if (folder / "evaluation").is_dir() else folder
    cells: dict[str, Cell] = {}
    files = sorted(root.glob("*/scores.json"))
    for file in files:
        content = read_json_object(file)
        try:
            cells |= _cells_of(content, file.parent.name)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is not as `mipha evaluate` writes it ({error!r}): evaluate again"
            ) from error
    if not cells:
        raise missing_scores(folder, [file.parent.name for file in files])
    return Row(folder.resolve().name, _facts(folder), cells, "ours")


def missing_scores(folder: Path, others: Sequence[str] = ()) -> FileNotFoundError:
    """Return the error for a folder without scores that can be compared.

    Args:
        folder: The folder.
        others: Names of results in it that cannot be.
    """
    if not folder.is_dir():
        return FileNotFoundError(f"no folder {folder}: give a run, or a folder of results")
    if (folder / "scores.json").is_file():
        return FileNotFoundError(
            f"{folder} holds the results of one benchmark: give the folder above, {folder.parent}"
        )
    if others:
        return FileNotFoundError(
            f"{folder} has no scores to compare, because those of {', '.join(others)} are blind, "
            f"undefined or left to a server: make others with `mipha evaluate {folder} -b ...`"
        )
    return FileNotFoundError(
        f"{folder} has no scores: make them with `mipha evaluate {folder} -b ...`"
    )


def _cells_of(content: Mapping[str, Any], name: str) -> dict[str, Cell]:
    """Return the headline under its name, and every metric that names a column of its own."""
    if content["blind"] or not content["scores"]:
        return {}
    mark = "" if content["complete"] else "~"
    mark += "‡" if content.get("all_empty") else ""
    protocol = content.get("rules", "official")
    mark += PROTOCOLS.get(protocol, "")
    headline, *others = content["scores"]

    cells = {name: _cell(headline, mark, protocol)}
    for score in others:
        older = _COLUMN_OF.get((content["benchmark"], score["metric"]))
        if column := score.get("column", older):
            cells[column] = _cell(score, mark, protocol)
    return {column: cell for column, cell in cells.items() if cell is not None}


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the columns with a number: those of the paper in its order, then others."""
    present = {name for row in rows for name in row.cells}
    return [name for name in TITLES if name in present] + sorted(present - set(TITLES))


def footnotes_of(rows: Sequence[Row]) -> dict[str, str]:
    """Return the marks in the rows, each with its meaning, in the order of `FOOTNOTES`."""
    shown = [cell.printed for row in rows for cell in row.cells.values()]
    shown += [fact for row in rows for fact in row.facts.values()]
    every = "".join(FOOTNOTES)
    marks = {mark for text in shown for mark in text[len(text.rstrip(every)) :]}
    return {mark: meaning for mark, meaning in FOOTNOTES.items() if mark in marks}


def warn_of_protocols(rows: Sequence[Row]) -> str | None:
    """Return a sentence that names the columns whose numbers were made by different programs.

    Qwen2.5-VL-3B has 65.4 on RealWorldQA by one of them and 60.0 by another.
    """
    names = {"own": "own scripts", "unknown": "not said"}
    mixed = []
    for column in columns_of(rows):
        cells = [row.cells[column] for row in rows if column in row.cells]
        protocols = sorted({names.get(cell.protocol, cell.protocol) for cell in cells})
        if len(protocols) > 1:
            mixed.append(f"{TITLES.get(column, column)} ({', '.join(protocols)})")
    if not mixed:
        return None
    return (
        "Protocols differ, so gaps of a few points say nothing and the best number may not be the "
        f"best model, in: {'; '.join(mixed)}."
    )


def best_of(rows: Iterable[Row], column: str) -> float | None:
    """Return the best number of a column, mostly the highest; None where there is none."""
    numbers = [row.cells[column].value for row in rows if column in row.cells]
    return (min if column in LOWER_IS_BETTER else max)(numbers, default=None)


def _row(record: dict[str, str]) -> Row:
    facts = {key: record[key] for key in FACTS if record.get(key, "-") != "-"}
    numbers = {
        key: value
        for key, value in record.items()
        if key not in ("name", "method", "group", *FACTS) and value != "-"
    }
    cells = {key: Cell(float(value.rstrip("*†")), value) for key, value in numbers.items()}
    return Row(record["name"], facts, cells, record.get("group", ""))


def _cell(score: dict[str, float | None], mark: str, protocol: str) -> Cell | None:
    """Return a number of scores.json; None where it is undefined, such as an F1 without a yes."""
    if score["value"] is None:
        return None
    printed = f"{score['value']:.1f}{mark}"
    return Cell(score["value"], printed, score.get("low"), score.get("high"), protocol)


def _facts(folder: Path) -> dict[str, str]:
    """Return what the model of a run is; nothing where the folder holds scores alone."""
    try:
        config = read_json_object(model_folder(folder) / "config.json")
    except (FileNotFoundError, ValueError):
        return {}
    return {
        "language_model": config["text_config"]["model_type"],
        "resolution": str(config["vision_config"].get("image_size", "own")),
    }
