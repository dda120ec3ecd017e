"""The price of cost: a multiplier that grows while the mean cost is above its threshold and shrinks while it is below."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any


class Multiplier:
    """Lambda, moved by gradient ascent on its logarithm: `ln l <- ln l + rate * l * (mean cost - threshold)`.

    Zero is a fixed point: there a cost has no price, and never gets one.

    Source: Dai et al. 2023, "Safe RLHF", arXiv:2310.12773; the logarithm is that of its released program.
    """

    def __init__(
        self,
        initial: float = 0.0,
        learning_rate: float = 0.1,
        maximum: float = 5.0,
        threshold: float = 0.0,
        window: int = 128,
        delay: int = 0,
    ) -> None:
        """Start at `initial`.

        Args:
            learning_rate: Of the ascent.
            maximum: What it may grow to.
            threshold: Mean cost at which it stands still.
            window: Episodes that the mean is over.
            delay: Steps before it first moves.
        """
        self._log = math.log(initial) if initial > 0 else -math.inf
        self._learning_rate = learning_rate
        self._log_maximum = math.log(maximum)
        self._threshold = threshold
        self._delay = delay
        self._costs: deque[float] = deque(maxlen=window)

    @property
    def value(self) -> float:
        """Lambda, now."""
        return math.exp(self._log)

    @property
    def mean_cost(self) -> float:
        """Mean of the episodes in the window."""
        return math.fsum(self._costs) / len(self._costs)

    def update(self, step: int, costs: Iterable[float]) -> float:
        """Take in the costs of a step's episodes, and move.

        Args:
            step: From 1; up to `delay` the window fills and lambda waits.

        Returns:
            Lambda after it.
        """
        self._costs.extend(costs)
        if step > self._delay and self.value > 0:
            self._log = min(
                self._log + self._learning_rate * self.value * (self.mean_cost - self._threshold),
                self._log_maximum,
            )
        return self.value

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; fits JSON."""
        return {"multiplier_log": self._log if self.value > 0 else None, "costs": list(self._costs)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._log = -math.inf if state["multiplier_log"] is None else state["multiplier_log"]
        self._costs.clear()
        self._costs.extend(state["costs"])
