"""docs/evaluation.md says what is there."""

from __future__ import annotations

import ast
import re
from dataclasses import MISSING, fields
from pathlib import Path

from mipha.evaluation.benchmark import Benchmark, list_benchmarks, load_benchmark

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_every_benchmark_has_its_row_with_the_files_it_reads() -> None:
    rows = {
        row[0]: row
        for row in re.findall(
            r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", TEXT, flags=re.MULTILINE
        )
    }
    assert sorted(rows) == list_benchmarks()
    for name, (_, files, _, _, labels) in rows.items():
        benchmark = load_benchmark(name)
        for file in re.findall(r"`([\w.\-]+\.(?:json|tsv))`", files):
            assert file in benchmark.source, f"{name} does not speak of {file}"
        private = set(re.findall(r"`([\w-]+)`", labels.partition(":")[0].partition(";")[2]))
        assert private == {key for key, split in benchmark.splits.items() if split.server}, name


def test_the_benchmark_of_the_page_has_the_fields_that_every_benchmark_needs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (call,) = [node for node in ast.walk(ast.parse(block)) if _is_benchmark(node)]
    needed = [
        field.name
        for field in fields(Benchmark)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    assert [keyword.arg for keyword in call.keywords] == needed


def _is_benchmark(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Benchmark"


def test_the_files_of_a_benchmark_end_as_the_page_says() -> None:
    section = TEXT.partition("## Add a benchmark")[2]
    endings = re.findall(r"`([\w/]+/)(\w*NAME)\.py` ends with `(\w+) = ", section)
    assert len(endings) == 2
    for folder, stem, name in endings:
        for benchmark in list_benchmarks():
            source = (ROOT / folder / f"{stem.replace('NAME', benchmark)}.py").read_text()
            assert re.search(rf"^{name} = ", source, flags=re.MULTILINE), benchmark
