"""Trackers get each step once, also after a resume; a tracker that fails is named and dropped."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mipha.engine.trackers import Trackers, check_trackers, last_tracked


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [("wanbd", ValueError, "no tracker 'wanbd': use tensorboard, wandb, trackio")],
)
def test_a_tracker_that_is_not_there_is_refused(name: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_trackers([name])


class _Broken(ModuleType):
    """A tracker whose server is gone after the first step."""

    def __init__(self, given: list[int]) -> None:
        super().__init__("wandb")
        self.given = given
        self.__spec__ = sys.__spec__  # so that it is found

    def init(self, **settings: Any) -> _Broken:
        self.settings = settings
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.given.append(step)
        if step == 2:
            raise ConnectionError("the server\nis gone")

    def finish(self) -> None:
        raise AssertionError("a lost tracker is not finished")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_fails_is_named_once_and_left(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    given: list[int] = []
    monkeypatch.setitem(sys.modules, name, _Broken(given))
    with Trackers([name], tmp_path / "finetune", "run", {}) as trackers:
        for step in range(1, 5):
            trackers.log({"step": step, "loss": 1.0})
    assert given == [1, 2]
    said = capsys.readouterr().err
    assert (
        said == f"mipha: tracking with {name} has failed (the server is gone); "
        "training goes on without it\n"
    )
    # A process that is not the first.
    with Trackers(None, tmp_path / "other", "run", {}) as trackers:
        trackers.log({"step": 1})
    assert not (tmp_path / "other").exists() and given == [1, 2]


def test_a_resumed_run_goes_on_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = _Broken([])
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with Trackers(["wandb"], tmp_path / "finetune", "run", {"seed": 3}) as trackers:
        trackers.log({"step": 2})  # fails, so it is not finished
    asked = {key: wandb.settings[key] for key in ("id", "name", "resume", "config")}
    assert asked == {"id": "run", "name": "run", "resume": "allow", "config": {"seed": 3}}


def test_a_step_that_was_tracked_before_a_resume_is_not_tracked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, record = tmp_path / "metrics.jsonl", tmp_path / "tracked.json"
    assert last_tracked(metrics, record) == 0
    metrics.write_text('{"step": 1}\n{"step": 4}\n')
    assert last_tracked(metrics, record) == 4
    metrics.write_text('{"step": 1}\n')
    for _ in range(2):  # after a second resume too
        assert last_tracked(metrics, record) == 4, "metrics were dropped, what was tracked was not"
    record.write_text("{}")
    with pytest.raises(ValueError, match=r"tracked\.json has no number of a step"):
        last_tracked(metrics, record)
    record.unlink()
    assert last_tracked(metrics, record) == 1, "without the record the metrics tell"

    given: list[int] = []
    monkeypatch.setitem(sys.modules, "wandb", _Broken(given))
    with Trackers(["wandb"], tmp_path, "run", {}, tracked=4) as trackers:
        for step in range(3, 7):
            trackers.log({"step": step, "loss": 1.0})
    assert given == [5, 6]
