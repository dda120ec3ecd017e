"""docs/evaluation.md says what is there."""

from __future__ import annotations

import re
from pathlib import Path

from mipha.evaluation.benchmark import list_benchmarks, load_benchmark

TEXT = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


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
