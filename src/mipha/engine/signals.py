"""Ctrl-C and SIGTERM: the current step is finished and saved before training stops."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mipha.world import World


@contextmanager
def stop_gently(world: World) -> Iterator[Callable[[], bool]]:
    """Hold back Ctrl-C and SIGTERM as long as the context lasts; a second signal is not held back.

    Yields:
        A function that says whether any process was told to stop. Every process calls it at the
        same places.
    """
    signals: list[int] = []

    def handle(number: int, frame: object) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    def is_stopped() -> bool:
        if world.size == 1:
            return bool(signals)
        return bool(world.total(torch.tensor(int(bool(signals)), device=world.device)))

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield is_stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
