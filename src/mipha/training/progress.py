"""What a stage shows while it trains: two lines that stay on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

RECENT = 20
"""Steps that rates are a mean over: steps differ by what is in them."""

LOG_SECONDS = 30.0
"""Between two lines in a log, where a bar that moves would be thousands of them."""

Metrics = Mapping[str, Any]


class Recent:
    """The last steps' metrics, and what they say together."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self._steps: deque[Metrics] = deque(maxlen=RECENT)

    def add(self, metrics: Metrics) -> None:
        """One step more."""
        self._steps.append(metrics)

    @property
    def done(self) -> int:
        """Steps done."""
        return int(self._steps[-1]["step"])

    def head(self) -> str:
        """How far, how well, how long still."""
        seconds = (
            sum(step["seconds"] for step in self._steps)
            / len(self._steps)
            * (self.total - self.done)
        )
        left = timedelta(seconds=round(seconds))
        return f"{self.done}/{self.total}  loss {self._steps[-1]['loss']:.3f}  {left} left"

    def rates(self) -> str:
        """How fast, and on what; 80 columns hold it."""
        last, seconds = self._steps[-1], sum(step["seconds"] for step in self._steps)
        words = [
            f"{sum(step['tokens'] for step in self._steps) / seconds:,.0f} tokens/s",
            f"{sum(step['images'] for step in self._steps) / seconds:,.1f} images/s",
            f"padding {sum(step['padding_percent'] for step in self._steps) / len(self._steps):.1f} %",
            f"{last['peak_memory_gib']:.1f} GiB",
        ]
        if "mfu_percent" in last:
            mfu = sum(step["mfu_percent"] * step["seconds"] for step in self._steps) / seconds
            words.insert(3, f"MFU {mfu:.1f} %")
        return "  ".join(words)

    def warning(self) -> str:
        """What is not as it should be; empty most of the time."""
        unread = sum(step.get("substituted_images", 0) for step in self._steps)
        return f"{unread} unreadable images in the last {len(self._steps)} steps" if unread else ""

    def __rich__(self) -> Group:
        if not self._steps:
            return Group(Text(f"{self.title}: reading the first step ..."))
        line = Table.grid(padding=(0, 1))
        line.add_row(
            Text(self.title, style="bold"),
            ProgressBar(self.total, self.done, width=20),
            Text(self.head()),
        )
        below = [Text(f"  {self.rates()}", style="dim", overflow="ellipsis", no_wrap=True)]
        return Group(
            line, *below, *([Text(f"  {self.warning()}", style="yellow")] if self.warning() else [])
        )


@contextmanager
def show_progress(
    title: str, total: int, visible: bool, console: Console | None = None
) -> Iterator[Callable[[Metrics], None]]:
    """Show a stage's progress as long as the context lasts; the function it gives takes each step's metrics.

    Args:
        total: Steps of the stage.
        visible: Whether this process shows anything.
    """
    console, recent = console or Console(), Recent(title, total)
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
                console.print(
                    f"{title} {recent.head()}  {recent.rates()}  {recent.warning()}".rstrip(),
                    soft_wrap=True,
                    highlight=False,
                    markup=False,
                )

        yield log
