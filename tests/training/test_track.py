"""Trackers follow the metrics: each step once, whatever was stopped; one that fails is named and left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mipha.run import Run
from mipha.training.checkpoint import StateWriter
from mipha.training.pipeline import train
from mipha.training.track import Trackers, check_trackers


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [("wanbd", ValueError, "no tracker 'wanbd': use tensorboard, wandb, trackio")],
)
def test_a_tracker_that_is_not_there_is_refused(name: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_trackers([name])


def test_a_package_that_is_not_installed_is_named_before_the_run_begins(
    tiny_run_recipe: Callable, tmp_path: Path
) -> None:
    missing = next((name for name in ("wandb", "trackio") if not _installed(name)), None)
    if missing is None:
        pytest.skip("all trackers are installed")
    with pytest.raises(
        ModuleNotFoundError, match=f"tracking with {missing} needs its package: pip install"
    ):
        train(tiny_run_recipe(), tmp_path / "run", track=[missing])
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_every_step_once_after_a_stop(
    tiny_run_recipe: Callable, tmp_path: Path, metrics: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps behind the last state are made twice, and tracked once."""
    pytest.importorskip("tensorboard")
    recipe = tiny_run_recipe("stages.finetune.checkpoint_every=2", "stages.pretrain.max_steps=1")
    folder = tmp_path / "run"

    def kill_in_the_second(self: StateWriter, step: int, *state: Any) -> None:
        if step == 4:
            raise RuntimeError("killed")
        save(self, step, *state)

    save = StateWriter.save
    monkeypatch.setattr(StateWriter, "save", kill_in_the_second)
    with pytest.raises(RuntimeError, match="killed"):
        train(recipe, folder)
    assert len(metrics(Run(folder).metrics("finetune"))) == 4
    monkeypatch.undo()
    train(recipe, folder)
    rows = metrics(Run(folder).metrics("finetune"))
    for key in ("loss", "learning_rate/projector", "tokens"):
        assert _tensorboard(folder / "finetune", key) == [
            (row["step"], pytest.approx(row[key])) for row in rows
        ], key


class _Broken(ModuleType):
    """A tracker whose server is gone after the first step."""

    def __init__(self, given: list[int]) -> None:
        super().__init__("wandb")
        self.given = given
        self.__spec__ = sys.__spec__  # so that it is found

    def init(self, **settings: Any) -> _Broken:
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.given.append(step)
        if step == 2:
            raise ConnectionError("the server\nis gone")

    def finish(self) -> None:
        raise AssertionError("a lost tracker is not finished")


def test_a_tracker_that_fails_is_named_once_and_left(
    tiny_run_recipe: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    given: list[int] = []
    monkeypatch.setitem(sys.modules, "wandb", _Broken(given))
    with Trackers(["wandb"], tmp_path / "finetune", tiny_run_recipe()) as trackers:
        for step in range(1, 5):
            trackers.log({"step": step, "loss": 1.0})
    assert given == [1, 2]
    said = capsys.readouterr().err
    assert (
        said
        == "mipha: tracking with wandb has failed (the server is gone); training goes on without it\n"
    )
    with Trackers(
        None, tmp_path / "other", tiny_run_recipe()
    ) as trackers:  # a process that is not the first
        trackers.log({"step": 1})
    assert not (tmp_path / "other").exists() and given == [1, 2]


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _tensorboard(stage: Path, key: str) -> list[tuple[int, float]]:
    """What is in the event files themselves, in the order of writing."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    events = [
        event
        for path in sorted((stage / "tensorboard").iterdir())
        for event in EventFileLoader(str(path)).Load()
    ]
    return [
        (event.step, value.tensor.float_val[0])
        for event in events
        for value in event.summary.value
        if value.tag == key
    ]
