"""What `generate` is told row by row: how a row draws its tokens, when it ends, and who hears of each token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

OnTokens = Callable[[list[int | None]], Collection[int]]
"""Told the new token of every row after every step, null for a row that has ended; returns the rows that end now."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn, where it is not the likeliest one.

    Args:
        temperature: Above 0; the logits are divided by it.
        top_p: The likeliest tokens that together have at least this probability are drawn from; 1 for all.
        seed: The same seed draws the same answer, whatever else is in the batch; null for any answer.
    """

    temperature: float
    top_p: float = 1.0
    seed: int | None = None


class RowSampler(LogitsProcessor):
    """Draws the token of each row that samples, and leaves a greedy `generate` no other choice: so rows of all kinds share a batch."""

    def __init__(self, rows: Sequence[Sampling | None]) -> None:
        self._drawn = [
            (row, sampling, _generator(sampling.seed))
            for row, sampling in enumerate(rows)
            if sampling is not None
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `(rows, vocabulary)`; in a row that samples, all but the drawn token are impossible."""
        for row, sampling, generator in self._drawn:
            # On the CPU: there a seed means the same on every machine.
            token = _draw(scores[row].float().cpu(), sampling, generator)
            scores[row] = -torch.inf
            scores[row, token] = 0.0
        return scores


class RowWatch(StoppingCriteria):
    """Keeps every row's tokens, passes them on as they come, and ends each row by its own rules.

    Args:
        limits: Longest answer of each row, tokens.
        ends: Tokens that end a turn.
        on_tokens: See `OnTokens`; null if nobody listens.
    """

    def __init__(
        self, limits: Sequence[int], ends: Collection[int], on_tokens: OnTokens | None = None
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in limits]
        self._limits, self._ends, self._on_tokens = limits, ends, on_tokens
        self._running = [True] * len(limits)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Which rows have ended, `(rows,)`."""
        new = [
            token if running else None
            for token, running in zip(input_ids[:, -1].tolist(), self._running, strict=True)
        ]
        leaving = self._on_tokens(new) if self._on_tokens and any(self._running) else ()
        for row, token in enumerate(new):
            if token is None:
                continue
            self.tokens[row].append(token)
            self._running[row] = (
                token not in self._ends
                and len(self.tokens[row]) < self._limits[row]
                and row not in leaving
            )
        return ~torch.tensor(self._running, device=input_ids.device)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _draw(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id. Source: nucleus sampling, Holtzman et al. 2020, section 3.1."""
    likely, tokens = torch.softmax(scores / sampling.temperature, dim=-1).sort(descending=True)
    likely[likely.cumsum(-1) - likely >= sampling.top_p] = (
        0.0  # those before it have enough already
    )
    return int(tokens[torch.multinomial(likely, 1, generator=generator)])
