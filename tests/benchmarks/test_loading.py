"""The benchmark of reading, on few samples."""

from __future__ import annotations

import json
from pathlib import Path

import loading
import pytest


def test_both_files_hold_the_same_conversations(tmp_path: Path) -> None:
    lines, array = loading.write_million(tmp_path, 2_500)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert records == json.loads(array.read_text()) and len(records) == 2_500
    assert len({record["image"] for record in records}) == 2_500
    assert all((tmp_path / record["image"]).is_file() for record in records)


def test_a_fresh_process_reads_each_file() -> None:
    found = loading.million(1_200)
    assert list(found) == ["train.jsonl", "train.json"]
    for phases in found.values():
        assert phases["samples"] == 1_200
        assert {"index", "check", "order", "order, 8 an image", "random_reads"} <= phases.keys()
        assert 0 < phases["megabytes_before"] <= phases["check"]["megabytes_after"]
    assert loading.verdict(found) == []
    found["train.json"]["index"]["seconds"] = 121
    found["train.jsonl"]["check"]["megabytes_after"] = 301
    assert len(loading.verdict(found)) == 2


def test_parquet_is_read_in_every_way() -> None:
    pytest.importorskip("pyarrow")
    found = loading.windows(
        num_rows=100, image_bytes=200, group_rows=10, window_rows=40, shuffled_rows=30
    )
    ways = {row["way"]: row for row in found}
    assert [row["rows"] for row in found] == [100, 100, 100, 30]
    assert ways["in windows"]["group_reads"] == 10
    assert ways["in windows again"]["group_reads"] <= ways["full shuffle"]["group_reads"]
    ways["in windows"]["rows_per_second"] = 79
    ways["in order"]["rows_per_second"] = 100
    assert loading.window_verdict(found) == [
        "in windows: 79% of the rows a second in order, not 80%"
    ]
    assert "| in windows | 79 | 100 | 10 |" in loading._markdown(
        {"workers": [], "about": {}, "collate_milliseconds": 1, "windows": found}
    )


def test_a_server_is_asked_once_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(loading, "LATENCY", 0.001)
    found = loading.remote(
        num_rows=60, image_bytes=300, group_rows=10, window_rows=30, many_rows=200
    )
    ways = {row["way"]: row for row in found["ways"]}
    assert list(ways) == [
        "in order",
        "in windows",
        "in order, 4 processes",
        "in windows, 4 processes",
    ]
    assert {row["group_reads"] for row in ways.values()} == {6}
    assert {row["most_fetches_of_a_block"] for row in ways.values()} == {1}
    assert found["million"]["rows"] == 200
    for row, speed in zip(ways.values(), (100, 79, 100, 80), strict=True):
        row["rows_per_second"] = speed
    found["million"]["megabytes"] = 151
    found["ways"][0]["most_fetches_of_a_block"] = 2
    missed = loading.remote_verdict(found)
    assert [one.partition(":")[0] for one in missed] == ["server", "in order", "a million rows"]
    assert "| in windows | 79 | 60 | 6 | 1 |" in loading._markdown({"remote": found, "about": {}})


def test_a_row_is_collated() -> None:
    assert loading.collate_a_row(row_tokens=256, repeats=2) > 0
    report = {"workers": [], "about": {}, "collate_milliseconds": 0.04}
    assert "2,048 tokens of text is collated in 0.04 ms" in loading._markdown(report)


@pytest.mark.weights
def test_workers_read_every_sample() -> None:
    alone, forked = loading.workers(64, side=64, counts=(0, 1))
    assert alone["megabytes_of_a_worker"] == [] and len(forked["megabytes_of_a_worker"]) == 1
    assert alone["samples_per_second"] > 0 and forked["samples_per_second"] > 0
