"""A tiny assistant behind a real server, and images to ask about."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from mipha.assistant import Assistant
    from mipha.deploy.serve.engine import Engine
    from mipha.deploy.serve.metrics import Metrics


@dataclass(frozen=True)
class Serving:
    """A server that runs.

    Args:
        url: Address without a slash at its end.
        http: Client of the server; making one takes longer than a request.
        metrics: Counts of the server.
    """

    url: str
    http: httpx.Client
    metrics: Metrics

    def metric(self, sample: str) -> float:
        """Return one sample by its name and labels; 0 if it was never counted."""
        lines = [line.rpartition(" ") for line in self.metrics.text().splitlines()]
        return next((float(value) for name, _, value in lines if name == f"mipha_{sample}"), 0.0)

    def comes_to_rest(self) -> bool:
        """Return whether the server holds no request soon: it lets go after the client has all."""
        until = time.monotonic() + 10
        while any(
            self.metric(gauge) for gauge in ("requests_held", "requests_waiting", "batch_size")
        ):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True


@pytest.fixture(scope="session")
def assistant(tiny_model: Callable) -> Assistant:
    """Return an assistant whose answers depend on image and question."""
    from mipha.assistant import Assistant

    return Assistant(*tiny_model("llama"))


@pytest.fixture
def gate(assistant: Assistant) -> Iterator[Event]:
    """Yield an open gate; while it is closed, the model waits before each step."""
    opened = Event()
    opened.set()

    def wait(*_: object) -> None:
        assert opened.wait(60)

    hook = assistant.model.model.language_model.register_forward_pre_hook(wait)
    yield opened
    opened.set()
    hook.remove()


@pytest.fixture
def serving(assistant: Assistant) -> Callable[..., AbstractContextManager[Serving]]:
    """Return `serving(...)`, a context manager: a server in a thread at a free port.

    It takes `batch_size`, `engine`, the options of `create_app`, and in `server` those of
    `configure`.
    """
    import uvicorn

    from mipha.deploy.serve.app import create_app
    from mipha.deploy.serve.batching import TransformersEngine
    from mipha.deploy.serve.metrics import Metrics
    from mipha.deploy.serve.server import configure, listen

    @contextmanager
    def serve(
        batch_size: int = 16,
        engine: Engine | None = None,
        server: dict[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Serving]:
        metrics = Metrics()
        behind = engine or TransformersEngine(assistant, metrics, batch_size)
        listening = listen("127.0.0.1", 0)
        app = create_app(behind, "tiny", metrics, **options)
        running = uvicorn.Server(configure(app, **(server or {})))

        async def main() -> None:
            await behind.start()
            await running.serve(sockets=[listening])
            await behind.close()

        thread = Thread(target=lambda: asyncio.run(main()))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
                yield Serving(url, http, metrics)
        finally:
            running.should_exit = True
            thread.join(60)
        assert not thread.is_alive()

    return serve


@pytest.fixture(scope="session")
def make_image() -> Callable[[int], Image.Image]:
    """Return `make_image(number)`: blocks of strong colours, others for each number."""

    def make(number: int) -> Image.Image:
        blocks = np.random.default_rng(number).integers(0, 2, (3, 3, 3), dtype=np.uint8) * 255
        return Image.fromarray(blocks.repeat(9, 0).repeat(8, 1))

    return make


@pytest.fixture(scope="session")
def messages_about() -> Callable[..., list[dict[str, Any]]]:
    """Return `messages_about(question, image)`: one turn as OpenAI's clients write it."""

    def messages(question: str, image: Image.Image | None = None) -> list[dict[str, Any]]:
        if image is None:
            return [{"role": "user", "content": question}]
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": question},
                ],
            }
        ]

    return messages
