"""What answers a request: the interface of an engine, and which engine serves a source."""

from __future__ import annotations

import secrets
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from mipha.deploy.folder import odd_keys, read_folder
from mipha.deploy.runtimes import runtimes
from mipha.deploy.serve.requests import ChatRequest
from mipha.run import available_cores, model_folder

if TYPE_CHECKING:
    from mipha.deploy.serve.child import ChildEngine

EngineName = Literal["auto", "transformers", "llama.cpp", "vllm"]

_MAGIC = b"GGUF"
_HEAD_BYTES = 65_536
"""Of a GGUF file; what is asked here stands before the vocabulary, which is long."""

_LLAMA_SLOTS = 4
_MOST_CONTEXT = 4_096
"""Tokens of a conversation with its answer; each slot of llama.cpp holds memory for all of them from the start."""


# ---- The interface ----------------------------------------------------------------------------


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


# ---- The source and its engine ----------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What is served.

    Args:
        name: The model's name.
        checkpoint: A standard model folder; null for GGUF.
        gguf: The language model's file; null for a checkpoint.
        mmproj: The file of its tower and projector, if it has one.
    """

    name: str
    checkpoint: Path | None = None
    gguf: Path | None = None
    mmproj: Path | None = None


def find_source(path: Path) -> Source:
    """Read what a path holds, by content.

    Args:
        path: A run, a model folder, a folder of GGUF files or one GGUF file.

    Raises:
        FileNotFoundError: It is not there, or the run is not finished.
        ValueError: It is none of these, or a folder with several language models.
    """
    if path.is_file():
        if _architecture(path) in (None, "clip"):
            raise ValueError(
                f"{path} is no GGUF file of a language model: give one, or a run, or a model folder"
            )
        return Source(path.stem, gguf=path, mmproj=_mmproj(path.parent))
    kinds = {file: _architecture(file) for file in sorted(path.glob("*.gguf"))}
    models = [file for file, kind in kinds.items() if kind not in (None, "clip")]
    if len(models) > 1:
        raise ValueError(
            f"{path} holds {len(models)} language models: give one of {', '.join(str(file) for file in models)}"
        )
    if models:
        return Source(models[0].stem, gguf=models[0], mmproj=_mmproj(path))
    if kinds:
        raise ValueError(
            f"{path} holds GGUF files but no language model: export the model again with `mipha export --to gguf`"
        )
    folder = model_folder(path)
    return Source(path.resolve().name, checkpoint=folder)


def choose_engine(source: Source, wanted: EngineName = "auto") -> EngineName:
    """The engine for a source, and that it can serve it.

    Raises:
        ValueError: It cannot, or it is not installed; says what to do.
    """
    if wanted not in get_args(EngineName):
        raise ValueError(f"no engine {wanted!r}: use one of {', '.join(get_args(EngineName))}")
    if source.gguf is not None:
        if wanted not in ("auto", "llama.cpp"):
            raise ValueError(
                f"{source.gguf} is GGUF, which {wanted} does not serve here: use --engine llama.cpp"
            )
        if shutil.which("llama-server") is None and find_spec("xllamacpp") is None:
            raise ValueError(
                "GGUF needs llama.cpp, which is not installed: pip install xllamacpp, or put llama-server on the PATH"
            )
        return "llama.cpp"
    if wanted == "llama.cpp":
        raise ValueError(
            f"{source.checkpoint} is no GGUF: make it with `mipha export {source.checkpoint} --to gguf -o FOLDER` and serve FOLDER"
        )
    assert source.checkpoint is not None
    if wanted == "transformers":
        read_folder(source.checkpoint)
        return wanted
    content = read_folder(source.checkpoint)
    vllm = next(
        runtime
        for runtime in runtimes(content.config, content.processor, odd_keys(content))
        if runtime.name == "vLLM"
    )
    if wanted == "auto":
        return (
            "vllm"
            if vllm.status == "exact" and shutil.which("vllm") and _has_gpu()
            else "transformers"
        )
    if vllm.status == "unsupported":
        raise ValueError(
            f"vLLM cannot serve {source.checkpoint}: {vllm.reason}; use --engine transformers"
        )
    if shutil.which("vllm") is None:
        raise ValueError(
            "--engine vllm needs the program vllm, which is not installed: pip install vllm, or use --engine transformers"
        )
    return "vllm"


def launch(
    source: Source, engine: EngineName, slots: int | None = None, dtype: str = "auto"
) -> ChildEngine:
    """The engine that is a program of its own, not started yet.

    Args:
        slots: Conversations that llama.cpp answers at a time; null: 4, each with memory for its whole context.
        dtype: What vLLM computes in.

    Raises:
        ValueError: Slots for vLLM, which makes its own, or a dtype for llama.cpp, whose file has one.
    """
    from mipha.deploy.serve.child import (
        ChildEngine,
    )  # here, for it needs what the extra `serve` brings

    port, key = _free_port(), secrets.token_hex(16)
    if engine == "vllm":
        if slots is not None:
            raise ValueError(
                "--batch-size has no effect on vLLM, which fills its batches by itself: leave it out"
            )
        assert source.checkpoint is not None
        command = vllm_command(source.checkpoint, source.name, port, dtype)
        return ChildEngine(engine, command, port, key, {"VLLM_API_KEY": key}, source.name)
    if dtype != "auto":
        raise ValueError(
            "--dtype has no effect on llama.cpp, which computes by the kind of its file: export another kind"
        )
    assert engine == "llama.cpp" and source.gguf is not None
    return ChildEngine(
        engine,
        llama_command(source, port, slots or _LLAMA_SLOTS),
        port,
        key,
        {"LLAMA_API_KEY": key},
        source.name,
    )


def vllm_command(checkpoint: Path, name: str, port: int, dtype: str = "auto") -> list[str]:
    """How vLLM's server is started. Source: `vllm serve --help`, vLLM 0.32."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [
        "vllm",
        "serve",
        str(checkpoint.resolve()),
        *where,
        "--served-model-name",
        name,
        "--dtype",
        dtype,
    ]


def llama_command(source: Source, port: int, slots: int) -> list[str]:
    """How llama.cpp's server is started: the program on the PATH, or the one in the wheel. Source: `llama-server --help`."""
    assert source.gguf is not None
    context = min(_MOST_CONTEXT, _context(source.gguf) or _MOST_CONTEXT)
    program = (
        ["llama-server", "--no-webui"]
        if shutil.which("llama-server")
        else [sys.executable, "-m", "mipha.deploy.serve.child"]
    )
    # Without a number llama.cpp takes all cores, and its threads wait for each other by turning: one must be left for the front.
    threads = max(1, available_cores() - 1)
    projector = ["--mmproj", str(source.mmproj)] if source.mmproj else []
    command = [
        *program,
        "--model",
        str(source.gguf),
        *projector,
        "--alias",
        source.name,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    return [
        *command,
        "--ctx-size",
        str(context * slots),
        "--parallel",
        str(slots),
        "--threads",
        str(threads),
        "--jinja",
    ]


def _architecture(file: Path) -> str | None:
    """What a GGUF file says it is, `clip` for a tower with its projector; null for another file.

    Source: the GGUF specification: `general.architecture` is required; a key and a string are a length of 8 bytes and the text, and
    between them the type of the value in 4.
    """
    value = _after(file, "general.architecture")
    return value and value[8 : 8 + int.from_bytes(value[:8], "little")].decode(
        "utf-8", errors="replace"
    )


def _context(file: Path) -> int | None:
    """Tokens that the language model of a GGUF file reads at most; null if it does not say so at its beginning."""
    value = _after(file, f"{_architecture(file)}.context_length")
    return value and int.from_bytes(value[:4], "little")


def _after(file: Path, key: str) -> bytes | None:
    """What follows a key and its type in a GGUF file's beginning; null where there is none, or the file is another."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    at = head.find(key.encode())
    return head[at + len(key) + 4 :] if head.startswith(_MAGIC) and at >= 0 else None


def _mmproj(folder: Path) -> Path | None:
    """The tower and projector in a folder; of several, the largest is the most exact."""
    found = [file for file in folder.glob("*.gguf") if _architecture(file) == "clip"]
    return max(found, key=lambda file: (file.stat().st_size, file.name), default=None)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
