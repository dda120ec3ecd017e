from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mipha.comparison.figures import _smoothed, contact_sheet, plot_metrics
from mipha.files import append_line


def has_colour(png: Path, colour: str) -> bool:
    pixels = np.asarray(Image.open(png).convert("RGB")).astype(int)
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return bool((np.abs(pixels - wanted).max(axis=2) <= 4).any())


def write_metrics(path: Path, losses: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        append_line(
            path,
            {
                "step": step,
                "loss": loss,
                "learning_rate/projector": 1e-3 / step,
                "tokens_per_second": 10,
            },
        )


@pytest.mark.parametrize(
    "losses", [[2.0, 1.0, 0.5] * 20, [9.0, 1.0, 0.1], [3.0], [2.0, float("nan"), 1.0]]
)
def test_loss_is_drawn(tmp_path: Path, losses: list[float]) -> None:
    write_metrics(tmp_path / "pretrain" / "metrics.jsonl", losses)
    plot_metrics(tmp_path / "pretrain" / "metrics.jsonl", tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size > (600, 300)
    if len(losses) > 1:
        assert has_colour(tmp_path / "loss.png", "#2563a8")


def test_no_losses_say_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": float("nan")}) + "\n")
    with pytest.raises(ValueError, match="finite loss"):
        plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_keeps_a_constant_and_the_first_value() -> None:
    np.testing.assert_allclose(_smoothed(np.full(30, 2.5), 4), 2.5)
    falling = np.array([100.0, 10, 1, 1, 1, 1, 1, 1])
    smooth = _smoothed(falling, 2)
    assert smooth[0] == 100 and smooth[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("answer", "gold", "green", "red"),
    [
        ("It is a red circle, so No.", "no", True, False),
        ("teal", "teal", True, False),
        ("no, it is a circle", "no", False, True),
        ("", "yes", False, True),
        ("a dog", None, False, False),
    ],
)
def test_answers_are_coloured_by_whether_they_are_right(
    tmp_path: Path, answer: str, gold: str | None, green: bool, red: bool
) -> None:
    png = tmp_path / "sheet.png"
    contact_sheet([(Image.new("RGB", (64, 64), "white"), "is there a circle?", answer, gold)], png)
    assert (has_colour(png, "#2a7f4f"), has_colour(png, "#b83232")) == (green, red)


def test_a_sheet_breaks_into_rows_of_five(tmp_path: Path) -> None:
    item = (Image.new("L", (30, 20)), "what is $this_{ and $that?", "a $5 bill", None)
    contact_sheet([item] * 5, tmp_path / "five.png")
    contact_sheet([item] * 7, tmp_path / "seven.png")
    five, seven = Image.open(tmp_path / "five.png").size, Image.open(tmp_path / "seven.png").size
    assert seven[1] > 1.5 * five[1] and abs(seven[0] - five[0]) < 20
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], tmp_path / "none.png")
