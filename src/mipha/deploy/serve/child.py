"""The engine that is another program's server: started here, asked over HTTP, stopped with us.

Nobody else reaches it. Run as a program, this module is one of two:

    python -m mipha.deploy.serve.child --model FILE ...     llama.cpp's own server out of the wheel
        `xllamacpp`, with the arguments of `llama-server` that we use. It is a process of its own,
        because llama.cpp ends its process where a check fails.
    python -m mipha.deploy.serve.child -- COMMAND ...       another program, which ends with us
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import httpx
from PIL import Image

from mipha.data.sample import content_parts, user_turn
from mipha.deploy.front import Front
from mipha.deploy.serve.engine import End, Piece, ServiceError
from mipha.deploy.serve.requests import ChatRequest, RequestError, Turn
from mipha.errors import import_optional

_START_SECONDS = 1_200.0
"""Time to load large weights from a slow disk; a program that ends sooner is noticed at once."""

_STOP_SECONDS = 10.0


class ChildEngine:
    """A server of llama.cpp or vLLM.

    Args:
        name: Name of the engine.
        command: Command that starts the program; it ends when its stdin does.
        port: Port of this machine alone at which the program listens.
        key: Key that the program asks for: other users of this machine must not go around our
            limits.
        environment: Variables added to ours.
        model: Name that the program serves the model under.
        front: How images are prepared for it; None: not at all.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        key: str,
        environment: dict[str, str],
        model: str,
        front: Front | None = None,
    ) -> None:
        self.name, self._command, self._model = name, list(command), model
        self._front = front
        self.url, self.key = f"http://127.0.0.1:{port}/v1", key
        self._environment = {**os.environ, **environment}

        # The front limits the time, and how many requests there are.
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 open as long as the program writes
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Start the program and wait until it answers.

        Raises:
            ServiceError: The program ended; its last words are in the message.
        """
        # It gets a group of its own: Ctrl-C is for us, and it must go on until we have finished all
        # requests. It ends when the pipe to us does.
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=self._environment,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not await self._answers():
                    if self._process.poll() is not None:
                        raise ServiceError(
                            f"{self.name} ended with code {self._process.returncode} "
                            f"({self._last_words()})"
                        )
                    await asyncio.sleep(0.2)
        except BaseException:
            await self.close()
            raise

    def prepare(self, request: ChatRequest) -> dict[str, Any]:
        """Return the request as the program reads it: only what was checked, images as PNG."""
        num_images = sum(len(turn.images) for turn in request.turns)
        asked: dict[str, Any] = {
            "model": self._model,
            "messages": [_message(turn, self._front, num_images) for turn in request.turns],
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            # These programs add cuts of their own where none is named.
            "top_k": 0,
            "min_p": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.stop:
            asked["stop"] = list(request.stop)
        if request.seed is not None:
            asked["seed"] = request.seed
        return asked

    async def submit(self, asked: dict[str, Any]) -> AsyncIterator[Piece]:
        """Yield the program's answer.

        Raises:
            RequestError: The program refuses the request.
            ServiceError: The program failed, or we stop.
        """
        reason: Any = None
        begun = False
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=asked) as response:
                if response.status_code != 200:
                    raise _refusal(self.name, response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if self._stopping.is_set():
                        raise ServiceError(
                            "the server stopped before the answer was made",
                            status=503,
                            code="stopping",
                        )
                    if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise _refusal(self.name, 500, data.encode())
                    for choice in chunk["choices"]:
                        reason = choice.get("finish_reason") or reason
                        text = choice["delta"].get("content") or ""
                        # Some models begin with a space; our own engine's answers never do.
                        text = text if begun else text.lstrip()
                        if text:
                            begun = True
                            yield Piece(text)
                    if usage := chunk.get("usage"):
                        end = End(
                            "length" if reason == "length" else "stop",
                            usage["prompt_tokens"],
                            usage["completion_tokens"],
                        )
                        yield Piece(end=end)
                        return
        except RequestError:
            raise
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise ServiceError(
                f"{self.name} broke off ({type(error).__name__}): ask again",
                status=502,
                code="engine_failed",
            ) from error
        raise ServiceError(
            f"{self.name} ended its answer without saying so: ask again",
            status=502,
            code="engine_failed",
        )

    def is_alive(self) -> bool:
        """Return whether the program runs."""
        return self._process is not None and self._process.poll() is None

    def abort(self) -> None:
        """Fail every answer at its next piece."""
        self._stopping.set()

    async def close(self) -> None:
        """End the program."""
        self.abort()
        await self._client.aclose()
        if self._process is not None:
            await asyncio.to_thread(_end, self._process)
        self._log.close()

    async def _answers(self) -> bool:
        try:
            return (await self._client.get("/health", timeout=5.0)).status_code == 200
        except httpx.HTTPError:
            return False

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4096))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "it said nothing"


def _message(turn: Turn, front: Front | None, num_images: int) -> dict[str, Any]:
    if not turn.images:
        return {"role": turn.role, "content": turn.text}
    message, shown = user_turn(turn.text, len(turn.images)), list(turn.images)
    if front:
        (message,), shown = front.prepare([message], shown, num_images)
    images = iter(shown)
    parts = [
        {"type": "image_url", "image_url": {"url": _data_uri(next(images))}}
        if part["type"] == "image"
        else part
        for part in content_parts(message.text)
    ]
    return {"role": turn.role, "content": parts}


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _refusal(name: str, status: int, content: bytes) -> RequestError | ServiceError:
    try:
        error = json.loads(content)["error"]
        sentence = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        sentence = f"status {status}"
    if status in (400, 413, 422):
        return RequestError(f"{name} refuses the request: {sentence}", code="refused_by_engine")
    return ServiceError(f"{name} failed: {sentence}", status=502, code="engine_failed")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it started itself
        process.wait()


# ---- The program: llama.cpp's server out of the wheel -------------------------------------------


def keep(command: Sequence[str]) -> int:
    """Run a program until it ends or stdin does; return its exit code.

    stdin is a pipe from the server, so it ends with the server, also after `kill -9`.
    """
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: program.terminate())

    is_over = threading.Event()

    def end() -> None:
        while os.read(0, 4096):
            pass
        is_over.set()
        program.terminate()
        with suppress(subprocess.TimeoutExpired):
            program.wait(_STOP_SECONDS)
        os.killpg(0, signal.SIGKILL)  # this process too, and what the program has started

    threading.Thread(target=end, daemon=True).start()
    code = program.wait()
    if is_over.is_set():
        os.killpg(0, signal.SIGKILL)
    return code


def main() -> None:
    """Run one of the two programs until stdin ends: it does with the process that started this."""
    if sys.argv[1:2] == ["--"]:
        code = keep(sys.argv[2:])
        sys.exit(128 - code if code < 0 else code)

    parser = argparse.ArgumentParser(prog="python -m mipha.deploy.serve.child")
    parser.add_argument("--model", required=True)
    parser.add_argument("--mmproj")
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx-size", type=int, required=True)
    parser.add_argument("--parallel", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--jinja", action="store_true", required=True)
    options = parser.parse_args()

    xllamacpp = import_optional("xllamacpp", "serving GGUF")
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    if options.mmproj:
        params.mmproj.path = options.mmproj
    params.model_alias = {options.alias}
    params.hostnames, params.port = [options.host], options.port
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    params.n_ctx, params.n_parallel = options.ctx_size, options.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.use_jinja = options.jinja
    params.ui = params.endpoint_props = params.endpoint_slots = False

    server = xllamacpp.Server(params)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main()
