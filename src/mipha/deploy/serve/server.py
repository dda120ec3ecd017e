"""`mipha serve`: check everything before the model loads, then serve until told to stop."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from mipha.errors import import_optional

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from mipha.deploy.serve.chat import Bounds
    from mipha.deploy.serve.engine import Engine, EngineName, Source
    from mipha.deploy.serve.metrics import Metrics

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

_MAX_CONNECTIONS = 1_000
_BACKLOG = 512
_BATCH_SIZE = 16


def serve(
    source: str | Path,
    *,
    engine: EngineName = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_remote_images: bool = False,
    batch_size: int | None = None,
    max_requests: int = 128,
    max_new_tokens: int = 1_024,
    request_seconds: float = 300.0,
    shutdown_seconds: float = 30.0,
    device: str | None = None,
    dtype: str = "auto",
) -> None:
    """Serve a model with OpenAI's interface until SIGTERM or Ctrl-C.

    Args:
        source: Run, model folder, folder of GGUF files or GGUF file.
        engine: Engine that answers; auto: llama.cpp for GGUF; else vLLM where it is installed,
            exact and has a GPU; else transformers.
        host: Address to listen at.
        port: Port to listen at; 0 for any free one.
        api_key: Key that every request must carry; None for none.
        allow_remote_images: Whether images are fetched from https addresses.
        batch_size: Requests that are answered together; None: 16 in transformers, 4 in llama.cpp.
        max_requests: Requests held at a time; another one gets 429.
        max_new_tokens: Longest answer, in tokens.
        request_seconds: Time from a request to the end of its answer.
        shutdown_seconds: Time for running requests to finish.
        device: Device for transformers; None: the GPU where there is one.
        dtype: Dtype for transformers and vLLM: auto, float32, bfloat16 or float16. In transformers
            auto is bfloat16 on a GPU and float32 on a CPU; vLLM rounds float32 weights to 16 bits.

    Raises:
        MissingPackage: A package of the extra `serve` is not installed.
        ValueError: The source or an option is wrong, or the port is in use.
        FileNotFoundError: There is no such source.
    """
    # Check what can be checked without the model.
    _check_options(
        batch_size=_BATCH_SIZE if batch_size is None else batch_size,
        max_requests=max_requests,
        max_new_tokens=max_new_tokens,
    )
    _check_options(request_seconds=request_seconds, shutdown_seconds=shutdown_seconds)
    if api_key is not None and not (
        api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""
    ):
        raise ValueError(
            "the API key must be printable ASCII without spaces around it: choose another"
        )
    for package in ("starlette", "uvicorn", "h11", "httpx"):
        import_optional(package, "serving", "serve")

    from mipha.deploy.serve.chat import Bounds
    from mipha.deploy.serve.engine import choose_engine, find_source
    from mipha.deploy.serve.metrics import Metrics
    from mipha.deploy.serve.requests import Limits

    # Take the port, then load the model.
    found = find_source(Path(source))
    with listen(host, port) as listening:
        chosen = choose_engine(found, engine)
        print(f"mipha: loading {found.name} for {chosen}", file=sys.stderr, flush=True)
        metrics = Metrics()
        limits = Limits(max_new_tokens=max_new_tokens, allow_remote=allow_remote_images)
        bounds = Bounds(limits=limits, max_requests=max_requests, request_seconds=request_seconds)
        behind, bounds = _load(found, chosen, bounds, metrics, batch_size, device, dtype)

        # Serve; on this machine alone and without a key, only under its own names.
        if host not in _LOOPBACK and api_key is None:
            print(
                f"mipha: warning: anybody who reaches {_url(listening)} may ask: give an --api-key",
                file=sys.stderr,
            )
        hosts = _LOOPBACK | {host.lower()} if host in _LOOPBACK and api_key is None else None
        run(
            behind,
            found.name,
            listening,
            metrics,
            bounds,
            api_key=api_key,
            hosts=hosts,
            shutdown_seconds=shutdown_seconds,
        )


def run(
    engine: Engine,
    model: str,
    listening: socket.socket,
    metrics: Metrics,
    bounds: Bounds | None = None,
    *,
    api_key: str | None = None,
    hosts: frozenset[str] | None = None,
    shutdown_seconds: float = 30.0,
) -> None:
    """Serve an engine at a socket until SIGTERM or Ctrl-C.

    Then no new request is accepted, and running ones are finished.

    Args:
        engine: Engine that answers, not started yet.
        model: Name of the model.
        listening: Socket of `listen`; it is closed at the end.
        metrics: Counts and times of the server.
        bounds: Load that is taken on at a time.
        api_key: Key that every request must carry; None for none.
        hosts: Names under which the server may be asked; None: any.
        shutdown_seconds: Time for running requests to finish; later they are answered with 503.

    Raises:
        ValueError: The engine did not start.
    """
    import uvicorn

    from mipha.deploy.serve.app import create_app
    from mipha.deploy.serve.engine import ServiceError

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(loop.call_later, shutdown_seconds, engine.abort)
            super().handle_exit(sig, frame)

    config = configure(create_app(engine, model, metrics, bounds, api_key, hosts), shutdown_seconds)
    signals = (signal.SIGINT, signal.SIGTERM)
    loop: asyncio.AbstractEventLoop

    async def serving() -> None:
        nonlocal loop
        loop, starting = asyncio.get_running_loop(), asyncio.current_task()
        assert starting is not None

        # Start the engine; a signal cancels it.
        for number in signals:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(starting.cancel))
        await engine.start()

        # Serve. uvicorn raises the signal again when it is done, for the handler before its own;
        # being told to stop is no failure, so that one does nothing.
        for number in signals:
            signal.signal(number, lambda *_: None)
        print(
            f"mipha: serving {model} at {_url(listening)} with {engine.name}; Ctrl-C stops it",
            file=sys.stderr,
            flush=True,
        )
        try:
            await Server(config).serve(sockets=[listening])
        finally:
            await engine.close()

    before = {number: signal.getsignal(number) for number in signals}
    try:
        asyncio.run(serving())
    except asyncio.CancelledError:
        print("mipha: stopped before it was ready", file=sys.stderr)
    except ServiceError as error:
        raise ValueError(str(error)) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def configure(app: ASGIApp, shutdown_seconds: float = 30.0) -> uvicorn.Config:
    """Configure the HTTP server below the application: one protocol, bounded load."""
    import uvicorn

    from mipha.deploy.serve.app import MAX_HEADER_BYTES

    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(shutdown_seconds) + 5,
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at this address.

    So the port is ours before the model loads, and clients that come meanwhile wait.

    Raises:
        ValueError: The port is in use or forbidden, or the address is not this machine's.
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"port {port} does not exist: choose one from 1 to 65,535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(
            f"{host!r} is no address of this machine: use 127.0.0.1, or 0.0.0.0 for all of them"
        ) from error

    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        reasons = {
            errno.EADDRINUSE: "is in use: stop what listens there, or choose another with --port",
            errno.EACCES: "needs an administrator: choose one above 1023 with --port",
            errno.EADDRNOTAVAIL: "cannot be opened, because "
            f"{host} is not this machine's: use 127.0.0.1",
        }
        other = f"cannot be opened ({error.strerror}): choose another"
        raise ValueError(f"port {port} {reasons.get(error.errno, other)}") from error
    return listening


def _load(
    found: Source,
    engine: EngineName,
    bounds: Bounds,
    metrics: Metrics,
    batch_size: int | None,
    device: str | None,
    dtype: str,
) -> tuple[Engine, Bounds]:
    """Return the engine, and the bounds with the control tokens of the model's own tokenizer."""
    if engine != "transformers":
        from mipha.deploy.serve.engine import launch

        if device is not None:
            raise ValueError(f"--device has no effect on {engine}: leave it out")
        return launch(found, engine, batch_size, dtype), bounds

    from mipha.assistant import load
    from mipha.data.check.text import special_tokens_of
    from mipha.deploy.serve.batching import TransformersEngine

    assert found.checkpoint is not None
    assistant = load(found.checkpoint, device, dtype)
    limits = replace(bounds.limits, control_tokens=special_tokens_of(assistant.processor))
    behind = TransformersEngine(assistant, metrics, batch_size or _BATCH_SIZE)
    return behind, replace(bounds, limits=limits)


def _check_options(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}: give a number above 0")


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
