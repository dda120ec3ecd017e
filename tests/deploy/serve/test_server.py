"""Starting and stopping: mistakes are reported before the model loads; running requests finish."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from mipha.cli.program import app
from mipha.deploy.serve.chat import Bounds
from mipha.deploy.serve.metrics import Metrics
from mipha.deploy.serve.server import listen, run, serve
from mipha.errors import MissingPackage
from mipha.models.build import save_checkpoint

SOURCE = Path(__file__).parents[3] / "src"


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_checkpoint(*tiny_model("llama"), folder)
    return folder


def test_what_is_wrong_is_said_before_the_model_loads(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint.parent / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wrong = [
            (
                {"port": taken.getsockname()[1]},
                r"port \d+ is in use: stop what listens there, or choose another with --port",
            ),
            ({"port": 70_000}, "port 70000 does not exist"),
            (
                {"host": "no.such.host.invalid"},
                "'no.such.host.invalid' is no address of this machine",
            ),
            ({"host": "192.0.2.1"}, "192.0.2.1 is not this machine's: use 127.0.0.1"),
            ({"engine": "llama.cpp"}, "is no GGUF: make it with"),
            ({"api_key": "grün"}, "must be printable ASCII"),
            ({"api_key": ""}, "the API key is empty: set --api-key or MIPHA_API_KEY"),
            ({"api_key": " "}, "must be printable ASCII without spaces"),
            ({"max_images": 0}, "--max-images is 0: give a number above 0"),
            ({"max_requests": 0}, "--max-requests is 0: give a number above 0"),
            ({"request_seconds": float("nan")}, "--request-seconds is nan"),
        ]
        for options, sentence in wrong:
            with pytest.raises(ValueError, match=sentence):
                serve(checkpoint, **{"port": 0} | options)
    with pytest.raises(ValueError, match="is neither a run"):
        serve(checkpoint.parent / "empty", port=0)
    with pytest.raises(FileNotFoundError, match="no run or model folder"):
        serve(tmp_path / "gone", port=0)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(
        MissingPackage, match=r'serving needs .* uvicorn, .*: pip install "mipha-vlm\[serve\]"'
    ):
        serve(checkpoint, port=0)


def test_a_port_is_taken_before_the_model_loads_and_free_afterwards() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match="is in use"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


def test_an_empty_key_in_the_environment_does_not_turn_the_key_off(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the server would run without a key")

    monkeypatch.setattr("mipha.deploy.serve.server.run", never)
    for environment, words in (
        ({"MIPHA_API_KEY": ""}, []),
        ({"MIPHA_API_KEY": " "}, []),
        ({"MIPHA_API_KEY": "right"}, ["--api-key", ""]),
    ):
        command = ["serve", str(checkpoint), "--port", "0", *words]
        told = CliRunner().invoke(app, command, env=environment)
        assert told.exit_code and not isinstance(told.exception, AssertionError), told.output
        assert "API key" in told.output + str(told.exception)


def test_a_server_that_loads_answers_and_its_port_is_handed_over() -> None:
    """Whoever asks meanwhile gets 503, and no connection is refused."""
    asked: list[tuple[int, dict[str, str]]] = []
    events: list[str | int] = []

    class Idle:
        name = "idle"

        async def start(self) -> None:
            asked.append(health())
            events.append("started")

        async def close(self) -> None: ...

        def abort(self) -> None: ...

        def is_alive(self) -> bool:
            return True

    def health() -> tuple[int, dict[str, str]]:
        response = httpx.get(f"http://127.0.0.1:{port}/health", timeout=30, trust_env=False)
        return response.status_code, response.json()

    def ask_the_model() -> None:
        url = f"http://127.0.0.1:{port}/v1/models"
        events.extend(httpx.get(url, timeout=60, trust_env=False).status_code for _ in range(2))

    def load() -> tuple[Any, Bounds]:
        asked.append(health())
        asking.start()
        Thread(target=ask_until_ready).start()
        return Idle(), Bounds()

    def ask_until_ready() -> None:
        try:
            while asked[-1][0] == 503:
                # A connection whose request was not read yet ends with the first server.
                with suppress(httpx.RemoteProtocolError, httpx.ReadError):
                    asked.append(health())
            asking.join(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    asking = Thread(target=ask_the_model)
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        run(load, "tiny", listening, Metrics(), shutdown_seconds=1)
    # A request to the model waits until it is loaded, and the next one is answered.
    assert events == ["started", 503, 200]
    *loading, ready = asked
    assert len(loading) > 1 and all(one == (503, {"status": "loading"}) for one in loading)
    assert ready == (200, {"status": "ok", "engine": "idle", "model": "tiny"})


def test_a_server_that_is_told_to_stop_finishes_what_runs(checkpoint: Path) -> None:
    program = (
        "import sys; from mipha.deploy.serve.server import serve; "
        "serve(sys.argv[1], host='0.0.0.0', port=0)"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "TRANSFORMERS_VERBOSITY": "error"}
    server = subprocess.Popen(
        [sys.executable, "-c", program, checkpoint],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert server.stderr is not None
        said = ""
        while not (
            found := re.search(r"serving tiny at http://0\.0\.0\.0:(\d+) with transformers", said)
        ):
            line = server.stderr.readline()
            assert line, said
            said += line
        assert "warning: anybody who reaches http://0.0.0.0:" in said
        url = f"http://127.0.0.1:{found[1]}"
        asked = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Which colour?"}],
            "max_tokens": 300,
            "stream": True,
        }
        events = []
        with httpx.stream("POST", url + "/v1/chat/completions", json=asked, timeout=60) as response:
            for line in response.iter_lines():
                if not events:
                    server.send_signal(signal.SIGTERM)
                events += [line] if line else []
        assert events[-1] == "data: [DONE]" and '"finish_reason": "' in events[-2]
        assert server.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
        rest = server.stderr.read()
        assert "Traceback" not in rest and rest.endswith("mipha: stopped\n")
        assert re.search(r'127\.0\.0\.1 POST "/v1/chat/completions" 200 .*completion=\d', rest)
    finally:
        server.kill()
        server.wait()
