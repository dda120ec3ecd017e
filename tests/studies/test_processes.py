"""A study starts a process for each piece of work: killed, it goes on; several GPUs are shared."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Barrier, Lock

import pytest
import yaml

from mipha.api import run_study
from mipha.studies.runner import JudgeOptions
from mipha.studies.study import Study, load_study
from tests.studies.processes import FakeProcesses


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two variants of the quickstart that share no stage."""
    return write_study(tmp_path)


def write_study(folder: Path, **changes: object) -> Study:
    """Load a study of two variants, with some keys of its scale replaced."""
    scale = {
        "recipe": "quickstart",
        "axes": {"again": {"one": [], "other": ["seed=100"]}},
        "evaluate": [{"benchmark": "easy_vqa", "limit": 4}],
        "panel": [{"image": "easy_vqa:0", "kind": "shape"}],
    }
    tree = {"name": "own", "title": "Own", "source": "none", "scales": {"mini": scale | changes}}
    (folder / "own.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_study(folder / "own.yaml")


@pytest.mark.parametrize("kill_at", [0, 1, 5])
def test_a_killed_study_goes_on_where_it_stopped(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:  # the study that is killed, a process of its own
        FakeProcesses(kill_at=kill_at).install(monkeypatch)
        run_study(study, "mini", out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    # Every command once: those before the kill are done, and the one that was killed is repeated.
    again = FakeProcesses().install(monkeypatch)
    run_study(study, "mini", out)
    assert len(again.commands) == 6 - kill_at
    assert (out / "report.md").is_file() and (out / "report.html").is_file()
    nothing = FakeProcesses().install(monkeypatch)
    run_study(study, "mini", out)
    assert nothing.commands == []


def test_several_gpus_have_a_run_each(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    both_train, lock = Barrier(2, timeout=120), Lock()
    gpu_of: dict[str, set[str]] = {}

    def on_start(words: Sequence[str], environment: Mapping[str, str]) -> None:
        folder = re.search(r"runs/(\w+/seed-\d)", " ".join(words)).group(1)
        with lock:
            gpu_of.setdefault(folder, set()).add(environment["CUDA_VISIBLE_DEVICES"])
        if words[1] == "train":
            both_train.wait()  # breaks where runs do not train two at a time

    fake = FakeProcesses(on_start=on_start).install(monkeypatch)
    run_study(study, "mini", tmp_path / "out", seeds=2, slots=2)
    assert all(len(gpus) == 1 for gpus in gpu_of.values()), "a run stays on its GPU"
    assert Counter(gpu for (gpu,) in gpu_of.values()) == {"3": 2, "5": 2}
    assert Counter(words[1] for words in fake.commands)["train"] == 4


def test_more_runs_at_a_time_than_gpus_are_refused_before_anything_is_created(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    FakeProcesses().install(monkeypatch)
    with pytest.raises(ValueError, match="3 runs at a time want 3 GPUs, but 2 are visible"):
        run_study(study, "mini", tmp_path / "out", slots=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"evaluate": [{"benchmark": "easy_vqa", "split": "tset"}]}, "tset"),
        ({"evaluate": [{"benchmark": "pope", "data_root": "nowhere"}], "panel": []}, "nowhere"),
        ({"panel": [{"image": "no.png", "question": "?", "kind": "k"}]}, "no.png is not there"),
        (
            {"evaluate": [{"benchmark": "mmvet", "data_root": "nowhere"}], "panel": []},
            "measures by mmvet alone, which a judge grades: give --judge URL",
        ),
    ],
)
def test_missing_data_and_judges_are_named_before_anything_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], sentence: str
) -> None:
    fake = FakeProcesses().install(monkeypatch)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        run_study(write_study(tmp_path, **changes), "mini", tmp_path / "out")
    assert not (tmp_path / "out").exists() and fake.commands == []


@pytest.mark.parametrize(
    ("judge", "sentence"),
    [
        (JudgeOptions(url="http://localhost:1/v1"), "--judge needs --judge-model"),
        (JudgeOptions(model="m"), "--judge-model has no effect without --judge"),
        (JudgeOptions(url="localhost", model="m"), "does not start with http"),
        (JudgeOptions(url="http://a/v1", model="m", replies=Path("r")), "are two judges"),
    ],
)
def test_a_judge_that_cannot_be_used_is_refused_before_anything_is_created(
    study: Study, tmp_path: Path, judge: JudgeOptions, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run_study(study, "mini", tmp_path / "out", judge=judge)
    assert not (tmp_path / "out").exists()
