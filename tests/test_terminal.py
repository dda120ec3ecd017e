"""Strangers' text reaches a terminal without escape sequences; a gone reader ends nothing."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.live import Live
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from mipha.terminal import Console, echo, printable

HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\x9b31md\x7fe\rf\ud800g\x00"
SHOWN = "a␛]0;title␇b␛[2Jc\ufffd31md␡e␍f\ufffdg␀"


def test_control_characters_become_symbols_and_text_stays() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("two\nlines,\ta tab, ελλ, 猫, 🐈") == "two\nlines,\ta tab, ελλ, 猫, 🐈"


def test_echo_writes_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE, end="")
    echo(Path(HOSTILE), err=True)
    assert capsys.readouterr() == (SHOWN, SHOWN + "\n")


@pytest.mark.parametrize(
    "made",
    [str, Text, Markdown, lambda text: Table(text, title=text)],
    ids=["str", "Text", "Markdown", "Table"],
)
def test_a_console_writes_its_own_control_codes_alone(made: object) -> None:
    assert callable(made)
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=200, color_system="standard")
    console.print(made("x\x1b]0;title\x07\x9by"), style="red")
    assert "\x1b[31m" in written.getvalue() and "title" in written.getvalue()
    assert not {"\x1b]", "\x07", "\x9b"} & {
        written.getvalue()[at : at + length]
        for at in range(len(written.getvalue()))
        for length in (1, 2)
    }


def test_a_live_display_still_moves_the_cursor() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80)
    with Live("one\ntwo", console=console, auto_refresh=False) as live:
        live.update("three\nfour", refresh=True)
    assert "\x1b[1A" in written.getvalue() and "␛" not in written.getvalue()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_process_outlives_the_reader_of_its_output(stream: str, tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys\n"
        "from mipha.terminal import Console, echo, outlive_readers\n"
        "outlive_readers()\n"
        "sys.stdin.readline()\n"
        f"for _ in range(1000): echo('x' * 1000, err={stream == 'stderr'})\n"
        f"Console(stderr={stream == 'stderr'}).print('y' * 1000)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "done")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        **{stream: subprocess.PIPE},
    )
    assert process.stdin
    getattr(process, stream).close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 0
    assert (tmp_path / "done").exists()
