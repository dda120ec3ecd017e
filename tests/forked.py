"""The program in a process of its own, without the seconds that its imports take.

    pytest --starts--> fork server: imports torch, transformers and mipha once
                          `--forks--> python -m mipha ARGUMENTS, killed or waited for

What `python -m` does before the imports is tested in test_cli.py.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

_CONTEXT = multiprocessing.get_context("forkserver")
_preloaded: list[str] = []


def preload(*modules: str) -> None:
    """Let the fork server import modules too; no effect when it has begun."""
    _preloaded.extend(modules)
    _CONTEXT.set_forkserver_preload(_preloaded)


preload("mipha.training.pipeline", "mipha.evaluation.evaluate")


def start_function(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start a process that calls a function."""
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def start(
    command: Sequence[object], output: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start the process of `python -m MODULE ...` or `python FILE ...`.

    Args:
        command: Module, or file that ends in .py, and its arguments.
        output: File that everything it says is added to.
        environment: Its environment variables; this process's by default.
    """
    variables = dict(os.environ if environment is None else environment)
    words = [str(word) for word in command]
    return start_function(_run, words, str(output), variables, os.getcwd())


def _run(command: list[str], output: str, environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if "MIPHA_PARENT" in environment:
        os.environ["MIPHA_PARENT"] = str(os.getppid())  # the fork server
    os.chdir(folder)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    sys.argv = command
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def run(
    command: Sequence[str], *, check: bool, stdout: IO[bytes], env: Mapping[str, str], **_: Any
) -> None:
    """Do what `subprocess.run` does in `mipha.studies.runner`."""
    process = start(command[2:], Path(stdout.name), env)
    process.join()
    if check and process.exitcode:
        raise subprocess.CalledProcessError(process.exitcode, command)
