"""The progress of a training: lines that stay on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mipha.terminal import Console

RECENT = 20
"""Steps that rates are a mean over, because steps differ in what they hold."""

LOG_SECONDS = 30.0
"""Seconds between two lines in a log, where a moving bar would be thousands of lines."""

Metrics = Mapping[str, Any]


class Shown(NamedTuple):
    """The text that a trainer shows about its last steps.

    Args:
        head: Quality of the training, for example the loss; a few words.
        rates: Speed of the training.
        warning: Problem to look at; empty most of the time.
    """

    head: str
    rates: str
    warning: str = ""


Describe = Callable[[Sequence[Metrics]], Shown]
"""Function from the metrics of the last steps, oldest first, to the text that is shown."""


class Recent:
    """The metrics of the last steps, as rich shows them.

    Args:
        total: Number of steps in all.
    """

    def __init__(self, title: str, total: int, describe: Describe) -> None:
        self.title, self.total, self._describe = title, total, describe
        self._steps: deque[Metrics] = deque(maxlen=RECENT)

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of a step; they have `step` and `seconds`."""
        self._steps.append(metrics)

    @property
    def done(self) -> int:
        """The number of steps done."""
        return int(self._steps[-1]["step"])

    def show(self) -> Shown:
        """Return what is shown, with steps done and time left in the head."""
        shown = self._describe(self._steps)
        seconds = sum(step["seconds"] for step in self._steps) / len(self._steps)
        left = timedelta(seconds=round(seconds * (self.total - self.done)))
        return shown._replace(head=f"{self.done}/{self.total}  {shown.head}  {left} left")

    def __rich__(self) -> Group:
        if not self._steps:
            return Group(Text(f"{self.title}: reading the first step ..."))

        shown = self.show()
        bar = ProgressBar(self.total, self.done, width=20)
        line = Table.grid(padding=(0, 1))
        line.add_row(Text(self.title, style="bold"), bar, Text(shown.head))

        rates = Text(f"  {shown.rates}", style="dim", overflow="ellipsis", no_wrap=True)
        warning = [Text(f"  {shown.warning}", style="yellow")] if shown.warning else []
        return Group(line, rates, *warning)


@contextmanager
def show_progress(
    title: str, total: int, describe: Describe, visible: bool = True, console: Console | None = None
) -> Iterator[Callable[[Metrics], None]]:
    """Show the progress of a training as long as the context lasts.

    Args:
        total: Number of steps in all.
        visible: Whether this process shows anything.

    Yields:
        A function that takes the metrics of each step.
    """
    console, recent = console or Console(), Recent(title, total, describe)

    if not visible:
        yield lambda metrics: None

    elif console.is_terminal:
        with Live(recent, console=console, refresh_per_second=4) as live:

            def show(metrics: Metrics) -> None:
                recent.add(metrics)
                live.update(recent)

            yield show

    else:
        printed = -LOG_SECONDS

        def log(metrics: Metrics) -> None:
            nonlocal printed
            recent.add(metrics)
            if recent.done == total or time.monotonic() - printed >= LOG_SECONDS:
                printed = time.monotonic()
                line = f"{title} {'  '.join(recent.show())}".rstrip()
                console.print(line, soft_wrap=True, highlight=False, markup=False)

        yield log
