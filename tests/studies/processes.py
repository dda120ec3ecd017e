"""The processes of a study, faked: they leave the files of the real ones and compute nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest

from mipha.comparison.statistics import tally
from mipha.run import open_run


class FakeProcesses:
    """Stands in for `subprocess` in `mipha.studies.runner`.

    Args:
        kill_at: Number of the command in which this process kills itself, half of the work done.
        on_start: Called with the words of a command and its environment.
    """

    def __init__(
        self,
        kill_at: int | None = None,
        on_start: Callable[[Sequence[str], Mapping[str, str]], None] | None = None,
    ) -> None:
        self.commands: list[list[str]] = []
        self._kill_at, self._on_start = kill_at, on_start
        self._lock = Lock()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeProcesses:
        """Let the runner start these processes."""
        fake = SimpleNamespace(run=self.run, CalledProcessError=subprocess.CalledProcessError)
        monkeypatch.setattr("mipha.studies.runner.subprocess", fake)
        return self

    def run(self, command: Sequence[str], env: Mapping[str, str], **_: Any) -> None:
        """Do the work of `python -m mipha train`, `mipha evaluate` or the panel."""
        words = list(command[2:])
        with self._lock:
            number = len(self.commands)
            self.commands.append(words)
        if self._on_start is not None:
            self._on_start(words, env)

        steps = _steps_of(words)
        for step in steps[: len(steps) // 2] if number == self._kill_at else steps:
            step()
        if number == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _steps_of(words: list[str]) -> list[Callable[[], None]]:
    """Return the files of a command, each as a function that writes it."""
    if words[:2] == ["mipha", "train"]:
        run = open_run(words[words.index("-o") + 1])
        return [lambda name=name: _finish(run.folder, name) for name in run.recipe.stages]
    if words[:2] == ["mipha", "evaluate"]:
        folder = open_run(words[2]).evaluation(words[words.index("-b") + 1])
        return [lambda: _write(folder / "predictions.jsonl", ""), lambda: _score(folder)]
    if words[0] == "mipha.studies.first_token":
        found = {"image_tokens": 4, "prompt_tokens": 9, "milliseconds": 1.0}
        return [lambda: _write(Path(words[1]) / "first-token.json", json.dumps(found))]
    return [lambda: None, lambda: _write(Path(words[1]) / "panel.jsonl", "")]


def _finish(run: Path, stage: str) -> None:
    if not open_run(run).is_finished(stage):
        _write(run / stage / "metrics.jsonl", "")
        _write(run / stage / "checkpoint" / "config.json", "{}")
        _write(run / stage / "checkpoint" / "model.safetensors", "")


def _score(folder: Path) -> None:
    found = {"benchmark": folder.name, "split": "test", "blind": False}
    counts = {"num_questions": 4, "n_asked": 4, "n_failed": 0}
    _write(folder / "scores.json", json.dumps(found | counts))
    data = tally((f"i{image}", {"accuracy": float(image % 2)}) for image in range(4))
    _write(folder / "tally.json", json.dumps(found | data.as_json()))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
