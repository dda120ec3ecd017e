"""The rows of the benchmark of `mipha tune`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import tuning
from PIL import Image


def test_every_place_comes_equally_often_and_the_shape_is_there(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in tuning.write_rows(tmp_path, 40).read_text().splitlines()]
    assert Counter(row["answer"] for row in rows) == dict.fromkeys(tuning.PLACES, 10)
    for row in rows:
        pixels = np.asarray(Image.open(tmp_path / row["image"])).astype(int)
        shown = np.abs(pixels - pixels[0, 0]).sum(axis=2) > 0  # a corner is background
        down, right = (places.mean() - tuning.SIDE / 2 for places in shown.nonzero())
        side = {"left": -right, "right": right, "top": -down, "bottom": down}[row["answer"]]
        assert side > 8 and abs(down if row["answer"] in ("left", "right") else right) < 8
