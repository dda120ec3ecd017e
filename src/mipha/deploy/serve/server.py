"""`mipha serve`: check everything before the model loads, then serve until told to stop."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import TYPE_CHECKING

from mipha.errors import import_optional
from mipha.preflight import check_device, check_dtype
from mipha.run import adapter_folder, model_folder
from mipha.terminal import echo

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from mipha.deploy.serve.chat import Bounds
    from mipha.deploy.serve.engine import Engine, EngineName, Source
    from mipha.deploy.serve.gate import Access, HostNames
    from mipha.deploy.serve.metrics import Metrics

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

_MAX_CONNECTIONS = 1_000
_OTHER_FILES = 128
"""Files that the process needs besides its connections."""

_HEADER_SECONDS = 10.0
_BACKLOG = 512
_BATCH_SIZE = 16


def serve(
    source: str | Path,
    *,
    engine: EngineName = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_host: Sequence[str] = (),
    allow_remote_images: bool = False,
    batch_size: int | None = None,
    max_requests: int = 128,
    max_new_tokens: int = 1_024,
    max_images: int = 4,
    request_seconds: float = 300.0,
    shutdown_seconds: float = 30.0,
    log_requests: bool = True,
    device: str | None = None,
    dtype: str = "auto",
    adapters: Sequence[str] = (),
) -> None:
    """Serve a model with OpenAI's interface until SIGTERM or Ctrl-C.

    Args:
        source: Run, model folder, folder of GGUF files or GGUF file.
        engine: Engine that answers; auto: llama.cpp for GGUF; else vLLM where it is installed,
            exact and has a GPU; else transformers.
        host: Address to listen at.
        port: Port to listen at; 0 for any free one.
        api_key: Key that every request must carry; None for none.
        allow_host: Names in the Host header that are answered besides those of the address; any
            name is answered where there is a key.
        allow_remote_images: Whether images are fetched from https addresses.
        batch_size: Requests that are answered together; None: 16 in transformers, 4 in llama.cpp.
        max_requests: Requests held at a time; another one gets 429.
        max_new_tokens: Longest answer, in tokens.
        max_images: Most images in one conversation.
        request_seconds: Time from a request to the end of its answer.
        shutdown_seconds: Time for running requests to finish.
        log_requests: Whether stderr gets one line for each request.
        device: Device for transformers; None: the GPU where there is one.
        dtype: Dtype for transformers and vLLM: auto, float32, bfloat16 or float16. In transformers
            auto is bfloat16 on a GPU and float32 on a CPU; vLLM rounds float32 weights to 16 bits.
        adapters: Adapters over the model, each a run, a folder or NAME=FOLDER; requests name them
            in place of the model.

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
        max_images=max_images,
    )
    if not Path(source).exists():
        model_folder(source)  # says how a run is made
    check_device(device)
    check_dtype(dtype)
    _check_options(request_seconds=request_seconds, shutdown_seconds=shutdown_seconds)
    for package in ("starlette", "uvicorn", "h11", "httpx"):
        import_optional(package, "serving", "serve")

    from mipha.deploy.serve.chat import Bounds
    from mipha.deploy.serve.engine import choose_engine, find_source
    from mipha.deploy.serve.gate import Access
    from mipha.deploy.serve.metrics import Metrics
    from mipha.deploy.serve.requests import Limits

    access = Access(api_key)
    found = find_source(Path(source))

    named = named_adapters(adapters, found)

    # Take the port, then load the model.
    with listen(host, port) as listening:
        chosen = choose_engine(found, "transformers" if named and engine == "auto" else engine)
        if named and chosen != "transformers":
            raise ValueError(
                f"--adapter is for the transformers engine, not for {chosen}: merge the adapter "
                "with `mipha export --merge`, or use --engine transformers"
            )
        if api_key is None:
            access = Access(None, host_names(listening, [host, *allow_host]))
            if not _is_loopback(listening):
                echo(
                    f"mipha: warning: anybody who reaches {_url(listening)} may ask: "
                    "give an --api-key",
                    err=True,
                )
        if log_requests:
            _log_requests()
        metrics = Metrics()
        limits = Limits(
            max_new_tokens=max_new_tokens, max_images=max_images, allow_remote=allow_remote_images
        )
        bounds = Bounds(limits=limits, max_requests=max_requests, request_seconds=request_seconds)

        def load() -> tuple[Engine, Bounds]:
            echo(f"mipha: loading {found.name} for {chosen}", err=True)
            return _load(found, chosen, bounds, metrics, batch_size, device, dtype, named)

        run(
            load,
            found.name,
            listening,
            metrics,
            access,
            shutdown_seconds=shutdown_seconds,
            adapters=tuple(named),
        )


def named_adapters(adapters: Sequence[str], base: Source) -> dict[str, Path]:
    """Return the folders of adapters by name, after a check that they belong to the model.

    Args:
        adapters: Each a run, a folder, or NAME=FOLDER; without a name it has the folder's.
        base: Model that is served.

    Raises:
        ValueError: Two have one name, or one was trained on another base.
        FileNotFoundError: There is no such adapter.
    """
    named: dict[str, Path] = {}
    for text in adapters:
        name, equals, folder = text.partition("=")
        folder = folder if equals else text
        name = name if equals else Path(folder).resolve().name
        if name == base.name or name in named:
            raise ValueError(
                f"two models would be served as {name!r}: name the adapter, such as "
                f"--adapter {name}-2={folder}"
            )
        named[name] = adapter_folder(folder)
    if named and base.checkpoint is None:
        raise ValueError(f"{base.name} is GGUF, which takes no adapter: serve its model folder")
    if named:
        from mipha.models.adapters import check_base

        for folder in named.values():
            check_base(folder, base.checkpoint)
    return named


def run(
    load: Callable[[], tuple[Engine, Bounds]],
    model: str,
    listening: socket.socket,
    metrics: Metrics,
    access: Access | None = None,
    *,
    shutdown_seconds: float = 30.0,
    adapters: Sequence[str] = (),
) -> None:
    """Load an engine and serve it at a socket until SIGTERM or Ctrl-C.

    While it loads, every request gets status 503; one to the model waits and gets it then. At the
    end no new request is accepted, and running ones are finished.

    Args:
        load: Function that returns the engine, not started yet, and the load that is taken on.
        model: Name of the model.
        listening: Socket of `listen`; it is closed at the end.
        metrics: Counts and times of the server.
        access: Who may ask; None: anybody who reaches the server.
        shutdown_seconds: Time for running requests to finish; later they are answered with 503.
        adapters: Names of adapters over the model.

    Raises:
        ValueError: The engine did not start.
    """
    import uvicorn

    from mipha.data.images import ContrastWarning
    from mipha.deploy.serve.app import create_app, create_loading_app
    from mipha.deploy.serve.engine import ServiceError

    # Pillow warns of damaged files, and we of flat ones: a stranger must not write into the log.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", category=ContrastWarning)
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}
    loop: asyncio.AbstractEventLoop

    loaded = Event()
    with _answering(create_loading_app(metrics, loaded), listening, loaded) as stop_answering:
        engine, bounds = load()

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                loop.call_soon_threadsafe(loop.call_later, shutdown_seconds, engine.abort)
                super().handle_exit(sig, frame)

        async def serving() -> None:
            nonlocal loop
            loop, starting = asyncio.get_running_loop(), asyncio.current_task()
            assert starting is not None

            # Start the engine; a signal cancels it.
            for number in signals:
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(starting.cancel))
            await engine.start()
            await asyncio.to_thread(stop_answering)

            # Serve. uvicorn raises the signal again when it is done, for the handler before its
            # own; being told to stop is no failure, so that one does nothing.
            for number in signals:
                signal.signal(number, lambda *_: None)
            echo(
                f"mipha: serving {model} at {_url(listening)} with {engine.name}; Ctrl-C stops it",
                err=True,
            )
            app = create_app(engine, model, metrics, bounds, access, adapters)
            try:
                await Server(configure(app, shutdown_seconds)).serve(sockets=[listening])
            finally:
                await engine.close()
            echo("mipha: stopped", err=True)

        try:
            asyncio.run(serving())
        except asyncio.CancelledError:
            echo("mipha: stopped before it was ready", err=True)
        except ServiceError as error:
            raise ValueError(str(error)) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def configure(
    app: ASGIApp,
    shutdown_seconds: float = 30.0,
    header_seconds: float = _HEADER_SECONDS,
    max_connections: int = _MAX_CONNECTIONS,
) -> uvicorn.Config:
    """Configure the HTTP server below the application: one protocol, bounded load.

    Args:
        app: The application.
        shutdown_seconds: Time for running requests to finish.
        header_seconds: Time for the header of a request to arrive.
        max_connections: Connections at a time; fewer where the process may open fewer files.
    """
    import uvicorn

    from mipha.deploy.serve.connections import connection_class
    from mipha.deploy.serve.gate import MAX_HEADER_BYTES

    if resource is not None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            max_connections = max(1, min(max_connections, files - _OTHER_FILES))
    return uvicorn.Config(
        app,
        http=connection_class(header_seconds, max_connections),
        ws="none",
        lifespan="off",
        log_level="error",  # its warnings quote what strangers send
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=int(shutdown_seconds) + 5,
    )


@contextmanager
def _answering(
    app: ASGIApp, listening: socket.socket, ended: Event
) -> Iterator[Callable[[], None]]:
    """Serve an application at a socket in a thread; yields the function that ends it.

    Args:
        app: The application.
        listening: Socket of `listen`.
        ended: What is set at the end, for requests that wait for it.
    """
    import uvicorn

    server = uvicorn.Server(configure(app, shutdown_seconds=0))
    thread = Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listening.dup()])), daemon=True
    )
    thread.start()

    def stop() -> None:
        server.should_exit = True
        ended.set()  # second, so that it accepts nothing more when those who waited ask again
        thread.join()

    try:
        yield stop
    finally:
        stop()


def host_names(listening: socket.socket, names: Sequence[str] = ()) -> HostNames:
    """Return the names under which a server without a key answers, from its socket's address.

    Args:
        listening: Socket of `listen`.
        names: Names besides those of the address.
    """
    from mipha.deploy.serve.gate import HostNames

    address = ipaddress.ip_address(listening.getsockname()[0].partition("%")[0])
    found = {name.lower() for name in names if name} | {str(address)}
    if address.is_loopback or address.is_unspecified:
        found |= _LOOPBACK
    if address.is_unspecified:
        found |= {socket.gethostname().lower()}
    return HostNames(frozenset(found), any_address=address.is_unspecified)


def _is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def _log_requests() -> None:
    """Write the access log to stderr."""
    from mipha.deploy.serve.gate import access_log

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    access_log.handlers[:] = [handler]
    access_log.setLevel(logging.INFO)
    access_log.propagate = False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at this address.

    So the port is ours before the model loads.

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
    adapters: Mapping[str, Path],
) -> tuple[Engine, Bounds]:
    """Return the engine, and the bounds with the control tokens of the model's own tokenizer."""
    if engine != "transformers":
        from mipha.deploy.serve.engine import launch

        if device is not None:
            raise ValueError(f"--device has no effect on {engine}: leave it out")
        return launch(found, engine, batch_size, dtype), bounds

    from mipha.assistant import load, with_adapter
    from mipha.data.check.text import special_tokens_of
    from mipha.deploy.serve.batching import TransformersEngine

    assert found.checkpoint is not None
    assistant = load(found.checkpoint, device, dtype)
    limits = replace(bounds.limits, control_tokens=special_tokens_of(assistant.processor))
    others = {
        name: with_adapter(assistant, folder, found.checkpoint) for name, folder in adapters.items()
    }
    behind = TransformersEngine(assistant, metrics, batch_size or _BATCH_SIZE, adapters=others)
    return behind, replace(bounds, limits=limits)


def _check_options(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}: give a number above 0")


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
