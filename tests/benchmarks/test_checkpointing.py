"""The benchmark of training states at a tiny size."""

from __future__ import annotations

from pathlib import Path

import checkpointing
from workloads import SINGLE, small_parts


def test_bytes_are_those_of_what_trains(tmp_path: Path) -> None:
    parts = small_parts(tmp_path, SINGLE, width=64, depth=3)
    megabytes = {}
    for stage in ("pretrain", "finetune"):
        folder = tmp_path / stage
        folder.mkdir()
        rows, sizes = checkpointing.measure(folder, parts, stage, repeats=1)
        assert {row.case for row in rows} == {f"save, {stage}", f"resume, {stage}"} and all(
            row.rate > 0 for row in rows
        )
        megabytes |= sizes

    own, whole = (
        megabytes[f"megabytes, pretrain, {way}"] for way in ("mipha", "torch.save of all")
    )
    # The projector is 8,320 of about 350,000 weights; the files' own bytes are as many again.
    assert own < whole / 4
    assert (
        megabytes["megabytes, finetune, mipha"]
        <= megabytes["megabytes, finetune, torch.save of all"]
    )
    assert megabytes["megabytes, finetune, mipha"] > 2 * own


def test_a_disk_has_a_rate(tmp_path: Path) -> None:
    assert checkpointing.disk_rate(tmp_path, megabytes=2) > 0
    assert list(tmp_path.iterdir()) == []
