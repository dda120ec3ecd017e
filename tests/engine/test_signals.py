"""Ctrl-C and SIGTERM wait for a step's end, a second one does not."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from mipha.engine.signals import stop_gently
from mipha.world import World

HERE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_held_back_and_a_second_is_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stop_gently(HERE) as is_stopped:
        assert not is_stopped()
        os.kill(os.getpid(), number)
        assert is_stopped()
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
