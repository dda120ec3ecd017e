"""Lengths like LLaVA-665K's, and the padding of each way of batching on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lengths
import numpy as np
import pytest


def test_the_mix_has_the_figures_it_is_named_for() -> None:
    drawn = lengths.draw_lengths(50_000)
    assert drawn.mean() == pytest.approx(1022, rel=0.01)
    assert np.percentile(drawn, 95) == pytest.approx(1521, rel=0.02)
    assert drawn.max() == 2048 and drawn.min() >= 16
    assert (drawn > lengths.IMAGE_TOKENS).mean() == pytest.approx(0.94 + 0.06 * 0.65, abs=0.01)
    assert (lengths.draw_lengths(100) == lengths.draw_lengths(100)).all()


def test_padding_counts_what_is_not_a_token() -> None:
    assert lengths.padding([4, 2, 3, 3], 2) == pytest.approx(100 * 2 / 14)
    assert lengths.padding([4, 2, 3], 1) == 0
    assert sorted(lengths.length_grouped(np.arange(100), 4).tolist()) == list(range(100))


def test_packed_rows() -> None:
    # Rows of 1,000 hold 600 + 200 and 600 tokens. So 600 of 2,000 places are empty, and one of two
    # processes waits for 200 of 1,600.
    found = lengths.packed_figures(
        np.array([600, 600, 200]), batch_size=3, row_tokens=1000, processes=2
    )
    assert found["padding, 1 row a micro-batch"] == 0
    assert found["padding, 4 rows a micro-batch"] == pytest.approx(100 * 200 / 1600)
    assert found["empty part of rows"] == pytest.approx(100 * 600 / 2000)
    assert found["2 processes waiting for the fullest"] == pytest.approx(100 * 200 / 1600)


def test_packing_wastes_under_7_percent_where_random_padding_wastes_over_35(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lengths.py", "--samples", "2048", "--out", str(tmp_path)])
    lengths.main()
    found = json.loads((tmp_path / "lengths.json").read_text())["percent"]
    assert 35 < found["padded, random micro-batches of 16"] < 40
    for row_tokens in (2048, 4096):
        for rows in ("1 row", "4 rows"):
            assert found[f"packed to {row_tokens}: padding, {rows} a micro-batch"] < 7
    assert (tmp_path / "lengths.png").is_file()
