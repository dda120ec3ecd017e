"""Answers and errors as OpenAI's clients read them.

Source: OpenAI's reference: the chat completion object, the chat completion chunk object, errors.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Send

from mipha.deploy.serve.engine import End, Piece, ServiceError
from mipha.deploy.serve.limits import RequestError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Completion:
    """One answer in the making.

    Args:
        model: Its name.
        include_usage: Whether a stream counts the tokens at its end.
    """

    def __init__(self, model: str, include_usage: bool) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._include_usage = include_usage

    def whole(self, text: str, end: End) -> dict[str, Any]:
        """The answer as one object."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.reason}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(end),
        }

    def opening(self) -> dict[str, Any]:
        """The first chunk of a stream: who speaks."""
        return self._chunk([self._choice({"role": "assistant", "content": ""})])

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The next chunks of a stream."""
        chunks = [self._chunk([self._choice({"content": piece.text})])] if piece.text else []
        if piece.end:
            chunks.append(self._chunk([self._choice({}, piece.end.reason)]))
            if self._include_usage:
                chunks.append(self._chunk([]) | {"usage": _usage(piece.end)})
        return chunks

    def _choice(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return chunk | {"usage": None} if self._include_usage else chunk


class EventStream:
    """Server-sent events to one client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def write(self, *events: dict[str, Any]) -> None:
        """Send objects; the first call sends the head."""
        if not self.begun:
            self.begun = True
            headers = {
                b"content-type": b"text/event-stream; charset=utf-8",
                b"cache-control": b"no-store",
                b"x-accel-buffering": b"no",
            }
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": list(headers.items())}
            )
        for event in events:
            await self._body(f"data: {json.dumps(event, ensure_ascii=False)}\n\n", more=True)

    async def end(self) -> None:
        """Say that nothing follows."""
        await self._body("data: [DONE]\n\n", more=False)

    async def _body(self, text: str, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": more})


def error_body(error: RequestError | ServiceError) -> dict[str, Any]:
    """The object that says what is wrong."""
    kind = (
        "server_error" if error.status >= 500 else _TYPES.get(error.status, "invalid_request_error")
    )
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": getattr(error, "param", None),
            "code": error.code,
        }
    }


def error_response(
    error: RequestError | ServiceError, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The same as a response."""
    more = {
        401: {"WWW-Authenticate": "Bearer"},
        429: {"Retry-After": "1"},
        503: {"Retry-After": "5"},
    }.get(error.status, {})
    return JSONResponse(error_body(error), error.status, headers={**(headers or {}), **more})


def _usage(end: End) -> dict[str, int]:
    total = end.prompt_tokens + end.completion_tokens
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": total,
    }
