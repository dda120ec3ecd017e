"""What stands behind the front: something that is asked and answers piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mipha.deploy.serve.intake import ChatRequest


@dataclass(frozen=True)
class End:
    """How an answer ended.

    Args:
        reason: stop: the model ended its turn, or a text of `stop` came. length: the limit cut it off.
        prompt_tokens: Read, those of images included.
        completion_tokens: Generated, the end of the turn included.
    """

    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; the last one has an `end`."""

    text: str = ""
    end: End | None = None


class ServiceError(Exception):
    """A request that fails by no fault of its sender.

    Args:
        message: One sentence that the sender may read.
        status: Of HTTP, 500 to 599.
        code: A word for programs.
    """

    def __init__(self, message: str, *, status: int = 500, code: str = "internal_error") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Engine(Protocol):
    """What the front needs."""

    name: str

    async def start(self) -> None:
        """Be ready to answer.

        Raises:
            ServiceError: It cannot.
        """

    def prepare(self, request: ChatRequest) -> Any:
        """What `submit` takes, without the pictures at their full size; called in a thread of its own.

        Raises:
            RequestError: The engine cannot be asked this.
        """

    def submit(self, prepared: Any) -> AsyncIterator[Piece]:
        """The answer; whoever stops reading it early must close it, and what is not made yet is not made."""

    def is_alive(self) -> bool:
        """Whether it can answer."""

    def abort(self) -> None:
        """Fail what waits and what runs."""

    async def close(self) -> None:
        """Stop, and leave nothing behind."""
