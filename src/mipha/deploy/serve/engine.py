"""The interface of an engine, and the choice of the engine that serves a source."""

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

from mipha.checkpoint_files import read_checkpoint, read_processor
from mipha.deploy.gguf.header import architecture, context_length
from mipha.deploy.runtimes import odd_keys, runtimes
from mipha.deploy.serve.requests import ChatRequest
from mipha.run import available_cores, model_folder

if TYPE_CHECKING:
    from mipha.deploy.serve.child import ChildEngine

EngineName = Literal["auto", "transformers", "llama.cpp", "vllm"]

_CHILD = [sys.executable, "-m", "mipha.deploy.serve.child"]
"""Program that ends with us: llama.cpp's server out of the wheel, or after `--` any other."""

_LLAMA_SLOTS = 4
_MOST_CONTEXT = 4_096
"""Tokens of a conversation with its answer.

Each slot of llama.cpp holds memory for all of them from the start.
"""


# ---- The interface ----------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How an answer ended.

    Args:
        reason: "stop": the model ended its turn, or a text of `stop` came; "length": the limit cut
            it off.
        prompt_tokens: Tokens read, those of images included.
        completion_tokens: Tokens generated, the end of the turn included.
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
        status: HTTP status, 500 to 599.
        code: Word for programs.
    """

    def __init__(self, message: str, *, status: int = 500, code: str = "internal_error") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Engine(Protocol):
    """A model that answers requests piece by piece."""

    name: str

    async def start(self) -> None:
        """Become ready to answer.

        Raises:
            ServiceError: The engine cannot start.
        """

    def prepare(self, request: ChatRequest) -> Any:
        """Return the input of `submit`, without images at their full size.

        It is called in a thread of its own.

        Raises:
            RequestError: The engine cannot be asked this.
        """

    def submit(self, prepared: Any) -> AsyncIterator[Piece]:
        """Yield the answer; a reader that stops early must close it, which stops the generation."""

    def is_alive(self) -> bool:
        """Return whether the engine can answer."""

    def abort(self) -> None:
        """Fail all requests that wait or run."""

    async def close(self) -> None:
        """Stop the engine, and leave nothing behind."""


# ---- The source and its engine ----------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The model that is served.

    Args:
        name: Name of the model.
        checkpoint: Standard model folder; None for GGUF.
        gguf: File of the language model; None for a checkpoint.
        mmproj: File of the tower and projector, if there is one.
    """

    name: str
    checkpoint: Path | None = None
    gguf: Path | None = None
    mmproj: Path | None = None


def find_source(path: Path) -> Source:
    """Find the model at a path, by content.

    Args:
        path: Run, model folder, folder of GGUF files or one GGUF file.

    Raises:
        FileNotFoundError: Nothing is there, or the run is not finished.
        ValueError: The path holds none of these, or several language models.
    """
    if path.is_file():
        if architecture(path) in (None, "clip"):
            raise ValueError(
                f"{path} is no GGUF file of a language model: give one, or a run, or a model folder"
            )
        return Source(path.stem, gguf=path, mmproj=_mmproj(path.parent))

    kinds = {file: architecture(file) for file in sorted(path.glob("*.gguf"))}
    models = [file for file, kind in kinds.items() if kind not in (None, "clip")]
    if len(models) > 1:
        raise ValueError(
            f"{path} holds {len(models)} language models: "
            f"give one of {', '.join(str(file) for file in models)}"
        )
    if models:
        return Source(models[0].stem, gguf=models[0], mmproj=_mmproj(path))
    if kinds:
        raise ValueError(
            f"{path} holds GGUF files but no language model: "
            "export the model again with `mipha export --to gguf`"
        )
    return Source(path.resolve().name, checkpoint=model_folder(path))


def choose_engine(source: Source, wanted: EngineName = "auto") -> EngineName:
    """Return the engine for a source, which is installed and can serve it.

    Raises:
        ValueError: The engine cannot serve the source, or is not installed.
    """
    if wanted not in get_args(EngineName):
        raise ValueError(f"no engine {wanted!r}: use one of {', '.join(get_args(EngineName))}")

    # GGUF is for llama.cpp alone, and llama.cpp for GGUF alone.
    if source.gguf is not None:
        if wanted not in ("auto", "llama.cpp"):
            raise ValueError(
                f"{source.gguf} is GGUF, which {wanted} does not serve here: use --engine llama.cpp"
            )
        if shutil.which("llama-server") is None and find_spec("xllamacpp") is None:
            raise ValueError(
                "GGUF needs llama.cpp, which is not installed: pip install xllamacpp, "
                "or put llama-server on the PATH"
            )
        return "llama.cpp"
    if wanted == "llama.cpp":
        raise ValueError(
            f"{source.checkpoint} is no GGUF: make it with "
            f"`mipha export {source.checkpoint} --to gguf -o FOLDER` and serve FOLDER"
        )

    # Transformers serves every checkpoint, vLLM those that it reads.
    assert source.checkpoint is not None
    content = read_checkpoint(source.checkpoint)
    if wanted == "transformers":
        return wanted
    vllm = next(
        runtime
        for runtime in runtimes(content.config, content.processor, odd_keys(content))
        if runtime.name == "vLLM"
    )
    if wanted == "auto":
        is_better = vllm.status == "exact" and shutil.which("vllm") and _has_gpu()
        return "vllm" if is_better else "transformers"
    if vllm.status == "unsupported":
        raise ValueError(
            f"vLLM cannot serve {source.checkpoint}: {vllm.reason}; use --engine transformers"
        )
    if shutil.which("vllm") is None:
        raise ValueError(
            "--engine vllm needs the program vllm, which is not installed: "
            "pip install vllm, or use --engine transformers"
        )
    return "vllm"


def launch(
    source: Source, engine: EngineName, slots: int | None = None, dtype: str = "auto"
) -> ChildEngine:
    """Return an engine that is a program of its own, not started yet.

    Args:
        source: Model that is served.
        engine: "vllm" or "llama.cpp".
        slots: Conversations that llama.cpp answers at a time, each with memory for its whole
            context; None: 4.
        dtype: Dtype that vLLM computes in.

    Raises:
        ValueError: Slots are given for vLLM, which makes its own, or a dtype for llama.cpp, whose
            file has one.
    """
    from mipha.deploy.front import front_of, front_of_gguf
    from mipha.deploy.serve.child import ChildEngine  # needs packages of the extra `serve`

    port, key = _free_port(), secrets.token_hex(16)
    if engine == "vllm":
        if slots is not None:
            raise ValueError(
                "--batch-size has no effect on vLLM, which fills its batches by itself: "
                "leave it out"
            )
        assert source.checkpoint is not None
        command = vllm_command(source.checkpoint, source.name, port, dtype)
        front, environment = front_of(read_processor(source.checkpoint)), {"VLLM_API_KEY": key}
        return ChildEngine(engine, command, port, key, environment, source.name, front)

    if dtype != "auto":
        raise ValueError(
            "--dtype has no effect on llama.cpp, which computes by the kind of its file: "
            "export another kind"
        )
    assert engine == "llama.cpp" and source.gguf is not None
    command = llama_command(source, port, slots or _LLAMA_SLOTS)
    front, environment = front_of_gguf(source.mmproj), {"LLAMA_API_KEY": key}
    return ChildEngine(engine, command, port, key, environment, source.name, front)


def vllm_command(checkpoint: Path, name: str, port: int, dtype: str = "auto") -> list[str]:
    """Return the command that starts vLLM's server.

    Source: `vllm serve --help`, vLLM 0.32.
    """
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": name,
        "--dtype": dtype,
    }
    return [*_CHILD, "--", "vllm", "serve", str(checkpoint.resolve()), *_as_words(options)]


def llama_command(source: Source, port: int, slots: int) -> list[str]:
    """Return the command that starts llama.cpp's server: the one on the PATH, or the wheel's.

    Source: `llama-server --help`.
    """
    assert source.gguf is not None
    context = min(_MOST_CONTEXT, context_length(source.gguf) or _MOST_CONTEXT)
    program = (
        [*_CHILD, "--", "llama-server", "--no-webui"] if shutil.which("llama-server") else _CHILD
    )
    # Without a number llama.cpp takes all cores, and its threads spin while they wait for each
    # other: one core must be left for the front.
    threads = max(1, available_cores() - 1)

    options: dict[str, object] = {"--model": source.gguf}
    if source.mmproj:
        options["--mmproj"] = source.mmproj
    options |= {
        "--alias": source.name,
        "--host": "127.0.0.1",
        "--port": port,
        "--ctx-size": context * slots,
        "--parallel": slots,
        "--threads": threads,
    }
    return [*program, *_as_words(options), "--jinja"]


def _as_words(options: dict[str, object]) -> list[str]:
    return [str(word) for option in options.items() for word in option]


def _mmproj(folder: Path) -> Path | None:
    """Return the file of tower and projector in a folder; the largest is the most exact."""
    found = [file for file in folder.glob("*.gguf") if architecture(file) == "clip"]
    return max(found, key=lambda file: (file.stat().st_size, file.name), default=None)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
