"""A check in parts: the report is that of one check, and parts that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mipha.cli import app
from mipha.data.check.shards import Shard, parse_shard
from tests.data.check.planted import DEFECTS, Corpus, plant


def mipha(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def report(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    return {key: value for key, value in content.items() if "second" not in key}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return plant(tmp_path_factory.mktemp("corpus"), 4 * len(DEFECTS))


def test_the_report_of_parts_is_that_of_one_check(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = ("check", corpus.planted, "--against", corpus.evaluation)
    assert mipha(*check, "--json", tmp_path / "whole.json").exit_code == 1
    for number in (2, 3, 1):
        done = mipha(*check, "--shard", f"{number}/3", "--facts", tmp_path / "facts")
        assert done.exit_code == 0 and f"{number}-of-3.jsonl" in done.output, done.output

    # The rows are not read again for the report.
    from mipha.data.check import linter

    read = linter.check_rows
    monkeypatch.setattr(
        linter, "check_rows", lambda inputs, rows, n: read(inputs, rows, n) if len(rows) < 50 else 1
    )
    done = mipha(*check, "--facts", tmp_path / "facts", "--json", tmp_path / "merged.json")
    assert done.exit_code == 1, done.output
    assert report(tmp_path / "merged.json") == report(tmp_path / "whole.json")


def test_a_part_that_is_there_is_not_read_again(corpus: Corpus, tmp_path: Path) -> None:
    check = ("check", corpus.clean, "--shard", "1/2", "--facts", tmp_path)
    mipha(*check)
    before = (tmp_path / "1-of-2.jsonl").stat().st_mtime_ns
    mipha(*check)
    assert (tmp_path / "1-of-2.jsonl").stat().st_mtime_ns == before


def test_parts_that_do_not_fit_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    for number in ("1/3", "3/3"):
        mipha("check", corpus.clean, "--shard", number, "--facts", tmp_path)
    done = mipha("check", corpus.clean, "--facts", tmp_path)
    assert done.exit_code == 2 and "lacks parts (2/3): make them with" in done.stderr
    mipha("check", corpus.planted, "--shard", "2/3", "--facts", tmp_path)
    done = mipha("check", corpus.clean, "--facts", tmp_path)
    assert done.exit_code == 2 and "2-of-3.jsonl is of another check" in done.stderr
    mipha("check", corpus.clean, "--shard", "1/2", "--facts", tmp_path)
    done = mipha("check", corpus.clean, "--facts", tmp_path)
    assert done.exit_code == 2 and "holds parts of 2 and of 3" in done.stderr
    done = mipha("check", corpus.clean, "--facts", tmp_path / "none")
    assert done.exit_code == 2 and "lacks parts (all)" in done.stderr


@pytest.mark.parametrize("more", [(), ("--facts", "f", "--json", "j")])
def test_a_part_writes_facts_and_nothing_else(corpus: Corpus, more: tuple[str, ...]) -> None:
    done = mipha("check", corpus.clean, "--shard", "1/3", *more)
    assert done.exit_code == 2 and "--shard writes the facts" in done.stderr


def test_every_row_is_in_one_part() -> None:
    for size in (0, 1, 7, 100):
        for number in (1, 3, 8):
            parts = [Shard(one, number).rows(size) for one in range(1, number + 1)]
            assert [row for part in parts for row in part] == list(range(size))
    for text in ("0/3", "4/3", "3", "a/b", "-1/3"):
        with pytest.raises(ValueError, match="write the part and the number of parts"):
            parse_shard(text)
