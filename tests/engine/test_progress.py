"""What a stage shows: everything asked for, on lines that 80 columns hold."""

from __future__ import annotations

import io
from typing import Any

import pytest

from mipha.engine.progress import Recent, show_progress
from mipha.terminal import Console
from mipha.training.metrics import describe_steps

LARGE: dict[str, Any] = {
    "loss": 11.234,
    "seconds": 20.0,
    "tokens": 9_000_000,
    "images": 20_000,
    "padding_percent": 12.34,
} | {
    "peak_memory_gib": 78.4,
    "mfu_percent": 45.2,
}


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wrapped_or_cut(width: int) -> None:
    recent = Recent("finetune", 12_345, describe_steps)
    recent.add(LARGE | {"step": 2_345, "substituted_images": 3})
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(recent)
    lines = console.export_text().splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "450,000 tokens/s  1,000.0 images/s  padding 12.3 %  MFU 45.2 %  78.4 GiB",
        "3 unreadable images in the last 1 steps",
    ]
    assert lines[0].startswith("finetune ") and lines[0].rstrip().endswith(
        " 2345/12345  loss 11.234  2 days, 7:33:20 left"
    )
    assert len(lines) == 3 and all(len(line) <= 80 for line in lines[:1])


def test_rates_are_of_the_last_steps() -> None:
    """Two steps of 1 and 3 s with 100 tokens each: 50 tokens/s; 6 steps of 2 s are left."""
    recent = Recent("pretrain", 8, describe_steps)
    small = {
        "loss": 2.0,
        "tokens": 100,
        "images": 0,
        "padding_percent": 0.0,
        "peak_memory_gib": 0.5,
    }
    recent.add(small | {"step": 1, "seconds": 1.0})
    recent.add(small | {"step": 2, "seconds": 3.0})
    assert recent.show().rates == "50 tokens/s  0.0 images/s  padding 0.0 %  0.5 GiB"
    assert recent.show().head == "2/8  loss 2.000  0:00:12 left"


def test_a_log_gets_a_line_now_and_then_and_the_last(capsys: pytest.CaptureFixture) -> None:
    with show_progress("finetune", 4, describe_steps, visible=True) as show:
        for step in range(1, 5):
            show(LARGE | {"step": step})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/4", "4/4"]
    with show_progress("finetune", 1, describe_steps, visible=False) as show:
        show(LARGE | {"step": 1})
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_the_last_step() -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    with show_progress("pretrain", 2, describe_steps, visible=True, console=console) as show:
        show(LARGE | {"step": 1})
        show(LARGE | {"step": 2})
    assert "2/2  loss 11.234" in console.file.getvalue()  # type: ignore[attr-defined]
