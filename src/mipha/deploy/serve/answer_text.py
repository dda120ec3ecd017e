"""Tokens as they come -> text that can be sent, never to be taken back; all of it together is the text of the whole answer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

_HALF_CHARACTER = "\ufffd"
"""What a decoder writes for bytes that are no whole character; the next token may complete them."""


class AnswerText:
    """The text of one answer while it is made.

    Args:
        decode: Token ids to text, without special tokens.
        ends: Tokens that end the turn.
        limit: Longest answer, tokens.
        stop: Texts before which the answer ends.
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
        """What can be sent now that this token is known; white space around the answer never is."""
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
        """The part that no later token changes."""
        text = text.rstrip(_HALF_CHARACTER)
        held = max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        return text[: len(text) - held].strip()
