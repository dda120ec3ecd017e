"""What the program writes to a terminal, or to whoever reads its output.

A model's answer, a data set and a name of a file are strangers' text, and a terminal obeys the
escape sequences in it: they set its title, its clipboard, or what is read on the screen. So all
output passes `echo` or `Console`, which show control characters as symbols.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.segment import Segment

_SYMBOLS: dict[int, int] = {
    # Pictures of the control characters. Tabs and ends of lines stay.
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
}


def printable(text: str) -> str:
    """Return text with its control characters and halves of characters as symbols."""
    return text.translate(_SYMBOLS)


def echo(text: object = "", *, end: str = "\n", err: bool = False) -> None:
    """Print text at once, with control characters as symbols.

    Args:
        text: What is printed.
        end: What follows it, as it is.
        err: Print to stderr.
    """
    print(printable(str(text)), end=end, file=sys.stderr if err else sys.stdout, flush=True)


class Console(RichConsole):
    """rich's console; control characters in what it is given are shown as symbols."""

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        """Render with rich, whose own control codes are kept apart from text."""
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def outlive_readers() -> None:
    """Let this process go on in silence when nobody reads its output any more.

    A training that is watched through `| head` is not to end when `head` does.
    """
    sys.stdout, sys.stderr = _Outliving(sys.stdout), _Outliving(sys.stderr)


class _Outliving:
    """A text stream whose text is dropped from the moment its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Write to nowhere from now on; what the stream has not yet written goes there too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
