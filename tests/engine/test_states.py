"""Training states: the newest whole one is loaded, whenever the writer was killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from mipha.engine.states import (
    StateWriter,
    list_states,
    load_state,
    load_tensors,
    newest_state,
    save_tensors,
    seal_state,
)
from mipha.world import World

HERE = World(0, 1, torch.device("cpu"))


class Small(torch.nn.Module):
    """One part that trains and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


@pytest.fixture
def small() -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Small()
    return model, torch.optim.AdamW(model.trained.parameters(), lr=0.1)


def write(
    states: Path,
    step: int,
    model: Small,
    optimizer: torch.optim.Optimizer,
    position: dict | None = None,
) -> None:
    StateWriter(states, HERE).save(step, model, optimizer, position or {})


def take_step(model: Small, optimizer: torch.optim.Optimizer) -> None:
    model.frozen(model.trained(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_state_is_read_back(small: tuple, tmp_path: Path) -> None:
    model, optimizer = small
    take_step(model, optimizer)
    write(tmp_path, 1, model, optimizer, {"seed": 7})
    saved = model.trained.weight.detach().clone()
    take_step(model, optimizer)
    after = model.trained.weight.detach().clone()
    other = Small()
    other.frozen.load_state_dict(model.frozen.state_dict())
    other_optimizer = torch.optim.AdamW(other.trained.parameters(), lr=0.1)
    assert load_state(tmp_path, other, other_optimizer, HERE) == {"step": 1, "seed": 7}
    assert torch.equal(other.trained.weight, saved)
    take_step(other, other_optimizer)
    assert torch.equal(other.trained.weight, after), "the optimizer's moments came back too"


def test_no_state_is_no_state(small: tuple, tmp_path: Path) -> None:
    before = small[0].trained.weight.detach().clone()
    assert load_state(tmp_path / "nothing", *small, HERE) is None
    assert torch.equal(small[0].trained.weight, before)


def test_frozen_weights_are_not_written(small: tuple, tmp_path: Path) -> None:
    model, optimizer = small
    take_step(model, optimizer)
    write(tmp_path, 1, model, optimizer)
    sizes = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    model.frozen.weight = torch.nn.Parameter(torch.zeros(2000, 2000), requires_grad=False)
    write(tmp_path, 2, model, optimizer)
    again = json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())
    assert sum(again.values()) < sum(sizes.values()) + 1000


def test_the_last_states_are_kept(small: tuple, tmp_path: Path) -> None:
    for step in range(1, 6):
        take_step(*small)
        write(tmp_path, step, *small)
    assert [path.name for path in list_states(tmp_path)] == ["step-00000004", "step-00000005"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "damage", ["shorter", "gone", "no manifest", "half a manifest", "not published"]
)
def test_a_torn_state_falls_back_to_the_one_before(
    small: tuple, tmp_path: Path, damage: str
) -> None:
    model, optimizer = small
    for step in (1, 2):
        take_step(model, optimizer)
        write(tmp_path, step, model, optimizer)
        if step == 1:
            first = model.trained.weight.detach().clone()
    newest = tmp_path / "step-00000002"
    shard = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    if damage == "shorter":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "gone":
        shard.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "half a manifest":
        os.truncate(newest / "manifest.json", 10)
    else:
        newest.rename(tmp_path / ".step-00000002.partial")
    assert load_state(tmp_path, model, optimizer, HERE) == {"step": 1}
    assert torch.equal(model.trained.weight, first)
    take_step(model, optimizer)
    write(tmp_path, 2, model, optimizer)  # the torn one is in the way
    assert [path.name for path in list_states(tmp_path)] == ["step-00000001", "step-00000002"]


def test_a_state_of_the_right_size_that_cannot_be_read_falls_back_too(
    small: tuple, tmp_path: Path
) -> None:
    for step in (1, 2):
        take_step(*small)
        write(tmp_path, step, *small)
    for path in (tmp_path / "step-00000002").glob("*.distcp"):
        path.write_bytes(b"\0" * path.stat().st_size)
    position = load_state(tmp_path, *small, HERE)
    assert position == {"step": 1}


def test_what_a_killed_writer_left_is_overwritten(small: tuple, tmp_path: Path) -> None:
    beside = tmp_path / ".step-00000001.partial"
    beside.mkdir()
    (beside / "rubbish").touch()
    take_step(*small)
    write(tmp_path, 1, *small)
    assert not beside.exists()
    assert not (tmp_path / "step-00000001" / "rubbish").exists()
    shutil.rmtree(tmp_path / "step-00000001")
    assert list_states(tmp_path) == []


def test_as_many_are_kept_as_asked_for(small: tuple, tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, HERE, keep=3)
    for step in range(1, 6):
        writer.save(step, *small, {})
    assert [path.name for path in list_states(tmp_path)] == [
        f"step-{step:08d}" for step in (3, 4, 5)
    ]


def test_a_state_written_in_the_background_is_of_when_it_was_asked_for(
    small: tuple, tmp_path: Path
) -> None:
    model, optimizer = small
    writer = StateWriter(tmp_path, HERE, asynchronous=True)
    take_step(model, optimizer)
    saved = model.trained.weight.detach().clone()
    writer.save(1, model, optimizer, {"seed": 7})
    with torch.no_grad():
        model.trained.weight.zero_()  # training goes on
    writer.finish()
    assert load_state(tmp_path, model, optimizer, HERE) == {"step": 1, "seed": 7}
    assert torch.equal(model.trained.weight, saved)


def test_a_state_written_in_the_background_is_published_whole_or_not_at_all(
    small: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A held-back write publishes nothing, and the next save waits for it."""
    model, optimizer = small
    begun, let_go = threading.Event(), threading.Event()

    def held(*args: object, **options: object) -> object:
        begun.set()
        assert let_go.wait(60)
        return write_data(*args, **options)

    write_data = FileSystemWriter.write_data
    monkeypatch.setattr(FileSystemWriter, "write_data", held)
    writer = StateWriter(tmp_path, HERE, asynchronous=True)
    take_step(model, optimizer)
    writer.save(1, model, optimizer, {})
    assert begun.wait(60)
    writer.poll()
    assert list_states(tmp_path) == [] and load_state(tmp_path, model, optimizer, HERE) is None
    let_go.set()
    writer.save(2, model, optimizer, {})
    assert [path.name for path in list_states(tmp_path)][:1] == ["step-00000001"], (
        "published before the next was begun"
    )
    while len(list_states(tmp_path)) < 2:
        writer.poll()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_that_cannot_be_written_is_named_and_the_one_before_stays(
    small: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    model, optimizer = small
    writer = StateWriter(tmp_path, HERE, asynchronous=asynchronous)
    take_step(model, optimizer)
    writer.save(1, model, optimizer, {})
    writer.finish()

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(
        OSError,
        match=r"step-00000002 could not be written; the one before it is intact.*No space left",
    ):
        writer.save(2, model, optimizer, {})
        writer.finish()
    monkeypatch.undo()
    assert [path.name for path in list_states(tmp_path)] == ["step-00000001"]
    writer.save(2, model, optimizer, {})
    writer.finish()
    assert [path.name for path in list_states(tmp_path)] == ["step-00000001", "step-00000002"]


def test_named_tensors_are_read_back(small: tuple, tmp_path: Path) -> None:
    model, optimizer = small
    weights = dict(model.trained.named_parameters())
    assert load_tensors(tmp_path, weights, optimizer) is None
    for step in (2, 10, 100):
        take_step(model, optimizer)
        saved = model.trained.weight.detach().clone()
        save_tensors(tmp_path / f"checkpoint-{step}", weights, optimizer, {"price": step / 2})
    assert [state.name for state in list_states(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert len(list(tmp_path.iterdir())) == 2
    take_step(model, optimizer)
    after = model.trained.weight.detach().clone()

    other = Small()
    other.frozen.load_state_dict(model.frozen.state_dict())
    other_optimizer = torch.optim.AdamW(other.trained.parameters(), lr=0.1)
    position = load_tensors(tmp_path, dict(other.trained.named_parameters()), other_optimizer)
    assert position == {"step": 100, "price": 50.0}
    assert torch.equal(other.trained.weight, saved)
    take_step(other, other_optimizer)
    assert torch.equal(other.trained.weight, after), "the optimizer's moments came back too"


def test_a_killed_writer_of_named_tensors_leaves_the_state_before(
    small: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = small
    weights = dict(model.trained.named_parameters())
    save_tensors(tmp_path / "checkpoint-1", weights, optimizer, {})
    monkeypatch.setattr("mipha.engine.states.seal_state", lambda state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_tensors(tmp_path / "checkpoint-2", weights, optimizer, {})
    assert load_tensors(tmp_path, weights, optimizer) == {"step": 1}


def test_states_of_another_program_are_sealed_and_found_by_their_number(tmp_path: Path) -> None:
    for step in (2, 10, 14, 20):
        state = tmp_path / f"checkpoint-{step}"
        (state / "inside").mkdir(parents=True)
        (state / "inside" / "optimizer.pt").write_bytes(b"1234")
        if step != 20:
            seal_state(state)
    (tmp_path / "checkpoint-14" / "inside" / "optimizer.pt").write_bytes(b"12")  # cut short since
    assert newest_state(tmp_path) == tmp_path / "checkpoint-10"
    assert len(list(tmp_path.iterdir())) == 4
    assert newest_state(tmp_path, remove_torn=True) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert newest_state(tmp_path / "nothing", remove_torn=True) is None
