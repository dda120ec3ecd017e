"""Sampling, stopping and streaming for each row of one `generate` call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

OnTokens = Callable[[list[int | None]], Collection[int]]
"""Callback of every step: takes the new token of each row (None for a row that has ended) and
returns the rows that must end now."""

_HALF_CHARACTER = "\ufffd"
"""Decoders write it for an incomplete character, which the next token may complete."""


LEAST_TEMPERATURE = 1e-3
"""Temperature under which all probability lies on the likeliest token."""


@dataclass(frozen=True)
class Sampling:
    """Sampling of one answer, where decoding is not greedy.

    Args:
        temperature: Divisor of the logits, above 0; under `LEAST_TEMPERATURE` the answer is the
            likeliest one, because the quotients would overflow.
        top_p: Probability that the likeliest tokens must have together; only they are drawn.
            1: all tokens.
        seed: Seed of the answer, whatever else is in the batch; None for a new one every time.
    """

    temperature: float
    top_p: float = 1.0
    seed: int | None = None


class RowSampler(LogitsProcessor):
    """Draws the token of each row that samples, and makes all its other tokens impossible.

    So rows with different sampling, and greedy rows, share a batch of a greedy `generate`.
    """

    def __init__(self, rows: Sequence[Sampling | None]) -> None:
        self._drawn = [
            (row, _warpers(sampling), _generator(sampling.seed))
            for row, sampling in enumerate(rows)
            if sampling is not None and sampling.temperature >= LEAST_TEMPERATURE
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Make all but the drawn token impossible in every row that samples.

        Args:
            input_ids: Tokens so far, `(rows, tokens)`.
            scores: Logits, `(rows, vocabulary)`; changed in place.

        Raises:
            ValueError: The highest logit of a row is no finite number: its answer would be an
                empty text that looks like an answer.
        """
        if not torch.isfinite(scores.amax(dim=-1)).all():
            raise ValueError(
                "the model gives no finite scores for the next token: use --dtype float32, or look "
                "for damage in its config.json, its processor_config.json and its weights"
            )
        for row, warpers, generator in self._drawn:
            # A seed gives the same draw on every machine only on the CPU.
            warped = warpers(input_ids[row : row + 1], scores[row : row + 1].float().cpu())
            # Sorted, so that a draw does not depend on the order of the vocabulary.
            likely, tokens = warped[0].softmax(dim=-1).sort(descending=True)  # (vocabulary,)
            token = int(tokens[torch.multinomial(likely, 1, generator=generator)])

            scores[row] = -torch.inf
            scores[row, token] = 0.0
        return scores


class RowWatch(StoppingCriteria):
    """Keeps every row's tokens, passes them on as they come, and ends each row by its own rules.

    Args:
        limits: Longest answer of each row, in tokens.
        ends: Tokens that end a turn.
        on_tokens: Callback of every step; None if nobody listens.
    """

    def __init__(
        self, limits: Sequence[int], ends: Collection[int], on_tokens: OnTokens | None = None
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in limits]
        self._limits, self._ends, self._on_tokens = limits, ends, on_tokens
        self._running = [True] * len(limits)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return which rows have ended, `(rows,)`."""
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


class AnswerText:
    """The text of one answer while it is generated.

    The pieces together are the text of the whole answer; none is taken back later.

    Args:
        decode: Function from token ids to text, without special tokens.
        ends: Tokens that end the turn.
        limit: Longest answer, in tokens.
        stop: Texts that end the answer; they are left out.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        ends: Collection[int],
        limit: int,
        stop: tuple[str, ...] = (),
    ) -> None:
        self._decode, self._ends, self._limit, self._stop = decode, ends, limit, stop
        self._tokens: list[int] = []
        self._sent = ""
        self.num_tokens = 0
        self.reason: Literal["stop", "length"] | None = None
        """Set when the answer has ended."""

    def add(self, token: int) -> str:
        """Return the text that can be sent now that this token is known.

        White space around the answer is never sent.
        """
        self.num_tokens += 1
        if token in self._ends:
            self.reason = "stop"
        else:
            self._tokens.append(token)
            if self.num_tokens == self._limit:
                self.reason = "length"

        text = self._decode(self._tokens)
        stops = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if stops:
            text, self.reason = text[: min(stops)], "stop"

        text = text.strip() if self.reason else self._certain(text)
        piece, self._sent = text[len(self._sent) :], max(text, self._sent, key=len)
        return piece

    def _certain(self, text: str) -> str:
        """Return the part that no later token changes."""
        text = text.rstrip(_HALF_CHARACTER)
        held = max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        return text[: len(text) - held].strip()


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """Return the steps from logits to the distribution that is drawn from.

    Source: nucleus sampling, Holtzman et al. 2020, section 3.1.
    """
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
