"""What the test of a benchmark brings to the tests of the command line and of the evaluation.

Every `tests/evaluation/benchmarks/test_<name>.py` ends with `OFFICIAL = Official(...)`: a function
that writes a small folder in the official format, as it lies after the downloads, and what holds of
these files. `collect` finds them, so a new benchmark needs no entry in any central table.
"""

from __future__ import annotations

import base64
import csv
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mipha.evaluation.benchmark import list_benchmarks, load_benchmark
from mipha.evaluation.judge import Replay
from mipha.evaluation.score import score_file

EXAMPLES = Path(__file__).parent / "examples"
"""Small files in the official form, and what the official scorers say of answers to them."""


@dataclass(frozen=True)
class BrokenLabel:
    """A change of an official file that makes a label wrong.

    Args:
        file: Path in the folder.
        old: Text in the file.
        new: Text that replaces it.
        words: Words of the error.
    """

    file: str
    old: str
    new: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Upload:
    """The file for the server of a private split.

    Args:
        file: Its name.
        key: Key (or column) of a question's id in it.
        asked: Ids in the order of the questions.
        server: Words that name the server.
        not_asked: Ids that the server wants as well, with an empty answer.
        content: What the file holds, made of id to text; None: a list with what the m4c processor
            makes of the texts.
    """

    file: str
    key: str
    asked: Sequence[str | int]
    server: str
    not_asked: Sequence[str | int] = ()
    content: Callable[[Mapping[str, str]], Any] | None = None


@dataclass(frozen=True)
class Official:
    """Official files in small, and what holds of them.

    Args:
        write: Writes the files into a folder, the private splits' questions too.
        gold: Question id to an answer with full marks, in the order of the files.
        size: Official number of questions of the main split, as papers and data files give it.
        readings: Which of parsed, normalised and submission a score file has.
        broken_label: A wrong label, and the words of its error.
        not_parsed: Ids of questions whose answers are compared as a whole, and not parsed.
        metric: Name of the headline, as papers report it.
        unit: Unit of the headline.
        best: Headline of the gold answers.
        scored: Ids with a score of their own; None: all.
        image: An image whose absence must be noticed; None: images are in the table.
        other_files: More files whose absence must be noticed.
        without_file: Words of the error about predictions when the label's file is missing; None:
            the file's name.
        upload: File that a complete set of answers to the main split gives, if any.
        served: Private split to its upload.
        replies: Lines of a judge's recorded replies.
        prompts: Parts of what a dry run prints.
        num_bare: Questions without an image among the three prompts of a dry run.
        by_likelihood: The model is measured, and not asked.
        without_sums: Metrics that are not made from sums, so that no pair of models is compared.
    """

    write: Callable[[Path], None]
    gold: Mapping[str, str]
    size: str
    readings: tuple[str, ...]
    broken_label: BrokenLabel
    not_parsed: tuple[str, ...] = ()
    metric: str = "accuracy"
    unit: str = "%"
    best: float = 100.0
    scored: Sequence[str] | None = None
    image: str | None = None
    other_files: tuple[str, ...] = ()
    without_file: str | None = None
    upload: str | None = None
    served: Mapping[str, Upload] = field(default_factory=dict)
    replies: Sequence[Mapping[str, Any]] = ()
    prompts: tuple[str, ...] = ()
    num_bare: int = 0
    by_likelihood: bool = False
    without_sums: tuple[str, ...] = ()

    @property
    def num_shown(self) -> int:
        """Prompts with the chat template that a dry run shows."""
        return 0 if self.by_likelihood else min(3, len(self.gold))

    @property
    def scored_ids(self) -> list[str]:
        """Ids with a score of their own."""
        return list(self.gold if self.scored is None else self.scored)


def collect() -> dict[str, Official]:
    """Name of every benchmark with files to what its test brings; a drawn one brings None."""
    modules = {
        name: importlib.import_module(f"tests.evaluation.benchmarks.test_{name}")
        for name in list_benchmarks()
    }
    lacking = [name for name, module in modules.items() if not hasattr(module, "OFFICIAL")]
    assert not lacking, f"the tests of {', '.join(lacking)} bring no OFFICIAL = Official(...)"
    return {
        name: module.OFFICIAL for name, module in modules.items() if module.OFFICIAL is not None
    }


def write_file(path: Path, content: Any) -> None:
    """Write a text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")


def write_parquet(path: Path, records: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    """Write a .parquet file, plain enough that a label can be changed in its bytes."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([dict(row) for row in records])
    parquet.write_table(table, path, compression="none", use_dictionary=False, **options)
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a .tsv file as VLMEvalKit does: images in base64, lists as Python writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), dialect="excel-tab")
        table.writeheader()
        for row in rows:
            table.writerow(
                {
                    name: base64.b64encode(cell).decode() if isinstance(cell, bytes) else cell
                    for name, cell in row.items()
                }
            )
    return path


def check_example(
    benchmark: str,
    annotations: str,
    *,
    example: str | None = None,
    case: str | None = None,
    replies: str | None = None,
    parsed: str = "parsed",
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Score an example and compare every number with the official scorer's; return the content.

    Args:
        benchmark: Name of the benchmark.
        annotations: File or folder in the example's folder.
        example: Name of the example's folder; None: that of the benchmark.
        case: Key of the expected numbers in expected.json; None: its top level.
        replies: File with a judge's recorded replies.
        parsed: What our `parsed` is called in expected.json.
        without: Beginnings of expected metrics that these files cannot give.
    """
    folder = EXAMPLES / (example or benchmark)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    expected = expected[case] if case else expected
    content = score_file(
        load_benchmark(benchmark),
        folder / annotations,
        folder / "predictions.jsonl",
        Replay(folder / replies) if replies else None,
    )

    wanted = {
        name: value
        for name, value in _flat(expected["metrics"]).items()
        if not name.startswith(("samples", *without))
    }
    found = _flat(content["metrics"])
    assert {name: found.get(name) for name in wanted} == pytest.approx(wanted, abs=1e-4)
    assert content["headline"] == pytest.approx(expected["headline"]["value"], abs=1e-4)
    assert content["per_question"] == pytest.approx(expected["per_question"], abs=1e-5)
    if parsed in expected:
        readings = {name: text or None for name, text in expected[parsed].items()}
        ours = content["normalised" if parsed == "compared" else "parsed"]
        assert {name: ours[name] or None for name in readings} == readings
    return content


def read_expected(example: str) -> dict[str, Any]:
    """Return what the official scorers say of an example."""
    return json.loads((EXAMPLES / example / "expected.json").read_text(encoding="utf-8"))


def read_texts(example: str) -> dict[str, str]:
    """Return question id to text of an example's predictions."""
    lines = (EXAMPLES / example / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {str(row["question_id"]): row["text"] for row in map(json.loads, lines)}


def _flat(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{group: {member: value}}` as `group.member`."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        members = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{member}": number for member, number in members.items()}
        if not members:
            flat[name] = value
    return flat


def write_images(folder: Path, names: Iterable[str], kind: str = "") -> None:
    """Write images of a few pixels, each of its own, in the format that the name tells."""
    for name in names:
        folder.mkdir(parents=True, exist_ok=True)
        form = kind or {".jpg": "JPEG", ".png": "PNG"}[Path(name).suffix]
        (folder / name).write_bytes(make_image(f"{folder.name}/{name}", form))


def make_image(name: str, kind: str = "PNG") -> bytes:
    """Return an image of its own for every name."""
    pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(
        0, 255, (6, 8, 3), dtype=np.uint8
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
