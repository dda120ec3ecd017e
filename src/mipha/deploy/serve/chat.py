"""POST /v1/chat/completions: a request is read within bounds, asked of the engine, and answered.

The answer is sent whole or piece by piece, as OpenAI's clients read it; a refusal is one sentence.

Source: OpenAI's reference: the chat completion object, the chat completion chunk object, errors.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from mipha.deploy.serve.engine import End, Engine, Piece, ServiceError
from mipha.deploy.serve.metrics import Metrics
from mipha.deploy.serve.requests import (
    ChatRequest,
    Limits,
    ParsedRequest,
    RequestError,
    decode_images,
    fetch_images,
    measure_images,
    parse_request,
)

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)

_LARGE_BYTES = 12_000_000
"""Size of a request's images, decoded, from which they are large: 2,000 x 2,000 pixels of RGB."""

_LARGE_SHARE = 0.75
"""Share of the memory for images that large ones may take."""

_FAREWELL_SECONDS = 5.0
"""Time to send the error at the end of a stream that failed; its client may be the reason."""


@dataclass(frozen=True)
class Bounds:
    """The load that the server takes on at a time.

    Args:
        limits: Limits of one request.
        max_requests: Requests held at a time: read, waiting and running. Another one gets 429.
        held_bytes: Size of all bodies together that arrive, or whose images are not decoded yet.
        image_bytes: Size of all images together that wait to be decoded, or are being decoded;
            counted decoded, which is what their decoding costs.
        fetches: Requests whose images are fetched from addresses at a time.
        body_seconds: Time for a body to arrive.
        request_seconds: Time from a body's arrival to the end of its answer.
    """

    limits: Limits = field(default_factory=Limits)
    max_requests: int = 128
    held_bytes: int = 256 * 2**20
    image_bytes: int = 2_000_000_000
    fetches: int = 8
    body_seconds: float = 30.0
    request_seconds: float = 300.0


class Chat:
    """Answers chat requests.

    Args:
        engine: Engine that answers.
        models: Names of which requests must give one.
        bounds: Load that is taken on at a time.
        metrics: Counts and times of the server.
    """

    def __init__(
        self, engine: Engine, models: Sequence[str], bounds: Bounds, metrics: Metrics
    ) -> None:
        self._engine, self._models, self._bounds, self._metrics = engine, models, bounds, metrics
        self._held = self._held_bytes = self._image_bytes = 0
        # Parsing is quick, and nobody waits for an image or an address there. Images of two
        # requests exist at their full size at a time.
        self._parsers = ThreadPoolExecutor(2, thread_name_prefix="mipha-parse")
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="mipha-decode")
        self._decoding = asyncio.Semaphore(2)
        self._decoding_large = asyncio.Semaphore(1)
        self._fetching = asyncio.Semaphore(self._bounds.fetches)
        metrics.gauge("requests_held", lambda: self._held)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request whose sender may ask.

        Raises:
            RequestError: The request is refused before its body is read.
        """
        # The content type also keeps foreign web pages out: for JSON a browser asks the server for
        # permission first, and the server does not agree.
        request = Request(scope, receive)
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise RequestError(
                "the content type must be application/json: set that header",
                status=415,
                code="unsupported_media_type",
            )
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("identity", ""):
            raise RequestError(
                "a compressed body is not read: send it without Content-Encoding",
                status=415,
                code="unsupported_media_type",
            )
        if self._held >= self._bounds.max_requests:
            raise _busy(f"{self._held} requests are being answered or wait already")

        self._held += 1
        try:
            asked = _Asked(scope, receive, send)
            await self._read_body(request, asked)

            # Work until the answer is sent or the client leaves.
            working = asyncio.ensure_future(self._respond(asked))
            leaving = asyncio.ensure_future(_left(receive))
            try:
                await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if working.done():
                    working.result()
                else:
                    self._metrics.add("cancelled_total")
            finally:
                for task in (working, leaving):
                    task.cancel()
                await asyncio.gather(working, leaving, return_exceptions=True)
                self._let_go(asked)
        finally:
            self._held -= 1

    async def _read_body(self, request: Request, asked: _Asked) -> None:
        """Read the body; it counts as held until its images are decoded."""
        most, parts, size = self._bounds.limits.body_bytes, [], 0
        too_large = RequestError(
            f"the body has more than {most:,} bytes: send smaller images",
            status=413,
            code="body_too_large",
        )
        if int(request.headers.get("content-length", 0)) > most:  # h11 admits only numbers
            raise too_large

        try:
            async with asyncio.timeout(self._bounds.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    self._held_bytes += len(part)
                    if size > most:
                        raise too_large
                    if self._held_bytes > self._bounds.held_bytes:
                        raise _busy(
                            "the requests that are read now take all the memory there is for them"
                        )
                    parts.append(part)
        except BaseException as error:
            self._held_bytes -= size
            if isinstance(error, ClientDisconnect):
                self._metrics.add("cancelled_total")
            if not isinstance(error, TimeoutError):
                raise
            raise RequestError(
                f"the body did not arrive within {self._bounds.body_seconds:g} seconds: "
                "send it at once",
                status=408,
                code="request_timeout",
            ) from error
        asked.body, asked.held_bytes = b"".join(parts), size

    def _hold(self, asked: _Asked, size: int) -> None:
        """Count more bytes of a request as held."""
        if self._held_bytes + size > self._bounds.held_bytes:
            raise _busy("the requests that are read now take all the memory there is for them")
        self._held_bytes += size
        asked.held_bytes += size

    def _let_go(self, asked: _Asked) -> None:
        """Count the body of a request as gone."""
        self._held_bytes -= asked.held_bytes
        asked.held_bytes = 0

    async def _respond(self, asked: _Asked) -> None:
        """Answer, or refuse: with a status, or at the end of a stream that has begun."""
        channel = (asked.scope, asked.receive, asked.send)
        stream = EventStream(asked.send)
        error: RequestError | ServiceError
        try:
            async with asyncio.timeout(self._bounds.request_seconds):
                whole = await self._ask(asked, stream)
            if whole is not None:
                await JSONResponse(whole)(*channel)
            return
        except TimeoutError:
            error = ServiceError(
                f"no whole answer within {self._bounds.request_seconds:g} seconds",
                status=504,
                code="timeout",
            )
        except (RequestError, ServiceError) as refusal:
            error = refusal
        except Exception:
            _log.exception("a chat request failed")
            error = ServiceError("the server failed on this request: see its log")

        note(asked.scope, code=error.code)
        if not stream.begun:
            await error_response(error)(*channel)
            return

        self._metrics.add("failed_streams_total", code=error.code)
        with suppress(TimeoutError):  # the client may not read
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await stream.write(error_body(error))
                await stream.end()

    async def _ask(self, asked: _Asked, stream: EventStream) -> dict[str, Any] | None:
        """Return the whole answer; None if it was streamed."""
        prepared, request = await self._prepare(asked)
        streamed = request.stream
        completion = Completion(request.model, request.include_usage)
        texts = []
        async with aclosing(self._counted(self._engine.submit(prepared), asked)) as pieces:
            async for piece in pieces:
                if streamed:
                    opening = [] if stream.begun else [completion.opening()]
                    await stream.write(*opening, *completion.chunks(piece))
                texts.append(piece.text)
                if piece.end and not streamed:
                    return completion.whole("".join(texts), piece.end)
        await stream.end()
        return None

    async def _prepare(self, asked: _Asked) -> tuple[Any, ChatRequest]:
        """Return the engine's input, and the request.

        Images at their full size are given up here.
        """
        limits = self._bounds.limits

        # Parse. The body is given up, so that it is not kept while the answer is made.
        body, asked.body = asked.body, b""
        parsed = await self._in(self._parsers, parse_request, body, limits)
        del body
        check_model(parsed.model, self._models)

        # Decode the images, or go past those who wait for it.
        if parsed.images:
            if any(image.data is None for image in parsed.images):
                async with self._fetching:
                    parsed = await fetch_images(parsed, limits)
                self._hold(asked, sum(len(image.data or b"") for image in parsed.images))
            prepared, request = await self._decode(parsed)
        else:
            request = decode_images(parsed, limits)
            prepared = await self._in(self._parsers, self._engine.prepare, request)
        self._let_go(asked)
        return prepared, replace(request, turns=())

    async def _decode(self, parsed: ParsedRequest) -> tuple[Any, ChatRequest]:
        """Return the engine's input of a request with images, and the request without them.

        Large images are decoded one at a time, and wait in a part of the memory: there is always a
        way past them.
        """
        limits = self._bounds.limits
        size = await self._in(self._parsers, measure_images, parsed, limits)
        is_large = size > _LARGE_BYTES
        most = self._bounds.image_bytes * (_LARGE_SHARE if is_large else 1)
        if self._image_bytes + size > most:
            raise _busy("the images of other requests wait to be decoded already")

        self._image_bytes += size
        try:
            async with self._decoding_large if is_large else nullcontext(), self._decoding:
                request = await self._in(self._decoders, decode_images, parsed, limits)
                prepared = await self._in(self._decoders, self._engine.prepare, request)
                return prepared, replace(request, turns=())
        finally:
            self._image_bytes -= size

    async def _in(
        self, threads: ThreadPoolExecutor, function: Callable[..., _Result], *args: Any
    ) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *args)

    async def _counted(self, pieces: AsyncIterator[Piece], asked: _Asked) -> AsyncIterator[Piece]:
        """Pass the pieces on and count them."""
        first = True
        async with aclosing(pieces) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                seconds = time.monotonic() - asked.arrived
                if first:
                    self._metrics.observe("first_token_seconds", seconds)
                first = False
                if end := piece.end:
                    self._metrics.observe("request_seconds", seconds)
                    self._metrics.add("prompt_tokens_total", end.prompt_tokens)
                    self._metrics.add("completion_tokens_total", end.completion_tokens)
                    note(asked.scope, prompt=end.prompt_tokens, completion=end.completion_tokens)
                yield piece


@dataclass
class _Asked:
    """One request on its way.

    Args:
        scope: Scope of the request, as ASGI has it, and so are the next two.
        receive: Function that gives the next message of the client.
        send: Function that sends a message to the client.
        body: Body; empty once it is read.
        held_bytes: Size that the body counts as.
        arrived: Time at which the request arrived, of the monotonic clock.
    """

    scope: Scope
    receive: Receive
    send: Send
    body: bytes = b""
    held_bytes: int = 0
    arrived: float = field(default_factory=time.monotonic)


def note(scope: Scope, **facts: object) -> None:
    """Add facts about a request to its line in the access log: a code, or counts."""
    scope.setdefault("mipha.facts", {}).update(facts)


def check_model(asked: str, served: Sequence[str]) -> None:
    """Refuse the name of a model that is not served."""
    if asked not in served:
        raise RequestError(
            f"the model is not served here: ask for {' or '.join(map(repr, served))}",
            status=404,
            code="model_not_found",
            param="model",
        )


async def _left(receive: Receive) -> None:
    """Wait until the client leaves; its body is read, so nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _busy(reason: str) -> RequestError:
    return RequestError(f"{reason}: ask again in a moment", status=429, code="server_busy")


# ---- Answers and errors as OpenAI's clients read them -----------------------------------------

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Completion:
    """One answer in the making.

    Args:
        model: Name of the model.
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
        """Return the answer as one object."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.reason}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(end),
        }

    def opening(self) -> dict[str, Any]:
        """Return the first chunk of a stream, which says who speaks."""
        return self._chunk([self._choice({"role": "assistant", "content": ""})])

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the next chunks of a stream."""
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
        """Send that nothing follows."""
        await self._body("data: [DONE]\n\n", more=False)

    async def _body(self, text: str, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": more})


def error_body(error: RequestError | ServiceError) -> dict[str, Any]:
    """Return the object that says what is wrong."""
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
    """Return the same as a response."""
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
