"""Training states: the newest whole one is loaded, whenever the writer was killed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from mipha.engine import states as states_module
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


def size_of(state: Path) -> int:
    """Return the bytes of all files that a state's manifest lists."""
    files = json.loads((state / "manifest.json").read_text())["files"]
    return sum(facts["bytes"] for facts in files.values())


def test_frozen_weights_are_not_written(small: tuple, tmp_path: Path) -> None:
    model, optimizer = small
    take_step(model, optimizer)
    write(tmp_path, 1, model, optimizer)
    size = size_of(tmp_path / "step-00000001")
    model.frozen.weight = torch.nn.Parameter(torch.zeros(2000, 2000), requires_grad=False)
    write(tmp_path, 2, model, optimizer)
    assert size_of(tmp_path / "step-00000002") < size + 1000


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
        match=r"step-00000002 could not be written; the one before it is intact.*No space left"
        r".* GB are free there",
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


# Damaged states: every bit counts, in every file.


def write_both(
    kind: str, states: Path, step: int, model: Small, optimizer: torch.optim.Optimizer
) -> Path:
    """Write a state of either kind; return its folder."""
    if kind == "named":
        state = states / f"checkpoint-{step}"
        save_tensors(state, dict(model.trained.named_parameters()), optimizer, {})
        return state
    StateWriter(states, HERE, asynchronous=kind == "background").save(step, model, optimizer, {})
    return states / f"step-{step:08d}"


def load_either(
    kind: str, states: Path, model: Small, optimizer: torch.optim.Optimizer
) -> dict | None:
    if kind == "named":
        return load_tensors(states, dict(model.trained.named_parameters()), optimizer)
    return load_state(states, model, optimizer, HERE)


def flip(path: Path, share: float = 0.5) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 1
    path.write_bytes(content)


KINDS = pytest.mark.parametrize("kind", ["model", "named"])


@KINDS
@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_flipped_bits_are_named_and_the_state_before_is_taken(
    kind: str,
    share: float,
    small: tuple,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    model, optimizer = small
    take_step(model, optimizer)
    newest = write_both(kind, tmp_path / "states", 1, model, optimizer)
    before = model.trained.weight.detach().clone()
    take_step(model, optimizer)
    newest = write_both(kind, tmp_path / "states", 2, model, optimizer)

    files = [path for path in newest.iterdir() if path.name != "manifest.json"]
    assert len(files) >= 3
    for path in files:
        states = tmp_path / path.name
        shutil.copytree(tmp_path / "states", states)
        flip(states / newest.name / path.name, share)
        assert load_either(kind, states, model, optimizer) == {"step": 1}, path.name
        assert torch.equal(model.trained.weight, before)
        said = capsys.readouterr().err
        assert f"{newest.name} is damaged: {path.name} is not what was written" in said


@KINDS
def test_no_undamaged_state_is_an_error_and_deletes_nothing(
    kind: str, small: tuple, tmp_path: Path
) -> None:
    take_step(*small)
    state = write_both(kind, tmp_path, 1, *small)
    flip(next(path for path in state.iterdir() if path.suffix in (".distcp", ".safetensors")))
    with pytest.raises(ValueError, match=r"none of the 1 training states in .* can be read"):
        load_either(kind, tmp_path, *small)
    assert state.is_dir()


@KINDS
def test_a_state_of_an_older_version_is_named_and_stays(
    kind: str, small: tuple, tmp_path: Path
) -> None:
    take_step(*small)
    state = write_both(kind, tmp_path, 1, *small)
    sizes = {path.name: path.stat().st_size for path in state.iterdir()}
    (state / "manifest.json").write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match=r"is a training state of an older version of mipha"):
        load_either(kind, tmp_path, *small)
    assert state.is_dir()


def test_a_manifest_of_something_else_is_no_manifest(small: tuple, tmp_path: Path) -> None:
    take_step(*small)
    state = write_both("model", tmp_path, 1, *small)
    for content in ("[]", "{}", "null", '{"files": []}', '{"files": {"position.json": 3}}'):
        (state / "manifest.json").write_text(content)
        assert list_states(tmp_path) == []


def test_each_process_hashes_its_own_files_where_it_writes_them(
    small: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step(*small)
    hashed = []

    def describe(path: Path) -> dict:
        hashed.append((path.name, threading.current_thread() is threading.main_thread()))
        return described(path)

    described = states_module.describe_file
    monkeypatch.setattr(states_module, "describe_file", describe)
    writer = StateWriter(tmp_path, HERE, asynchronous=True)
    writer.save(1, *small, {})
    writer.finish()
    in_main_thread = {name for name, is_main in hashed if is_main}
    assert [name for name, is_main in hashed if not is_main] == ["__0_0.distcp"]
    assert in_main_thread == {"metadata.json", "position.json"}
    assert not list(tmp_path.rglob("*sums.json"))


# States of strangers: reading one runs no code.


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def reseal(state: Path) -> None:
    """Make the manifest of a state fit its files again, as whoever changed them would."""
    (state / "manifest.json").unlink()
    seal_state(state)


PLACES = ("metadata.json", "position.json", "__0_0.distcp", "a value", "a path outside")


@pytest.mark.parametrize("place", PLACES)
def test_a_state_of_a_stranger_runs_no_code(
    place: str,
    small: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    mark = tmp_path / "mark"
    take_step(*small)
    write(tmp_path / "states", 1, *small)

    # Write a state with a pickle in the place of one value.
    if place == "a value":
        content = states_module._content

        def with_evil(*args: object) -> dict:
            found = content(*args)
            found["optimizer"]["param_groups"][0]["weight_decay"] = Evil(mark)
            return found

        monkeypatch.setattr(states_module, "_content", with_evil)
    write(tmp_path / "states", 2, *small)
    monkeypatch.undo()

    # Or replace one of its files by a pickle.
    state = tmp_path / "states" / "step-00000002"
    if (state / place).is_file():
        (state / place).write_bytes(pickle.dumps(Evil(mark)))
    if place == "a path outside":
        written = (state / "metadata.json").read_text()
        assert '"__0_0.distcp"' in written
        written = written.replace('"__0_0.distcp"', '"../step-00000001/__0_0.distcp"')
        (state / "metadata.json").write_text(written)
    (state / ".metadata").write_bytes(pickle.dumps(Evil(mark)))  # where torch would look
    reseal(state)

    assert load_state(tmp_path / "states", *small, HERE) == {"step": 1}
    assert not mark.exists()
    assert "going on from the one before it" in capsys.readouterr().err


@pytest.mark.parametrize("step", [-5, "2", None, True])
def test_a_state_without_a_number_of_steps_is_passed_over(
    step: object, small: tuple, tmp_path: Path
) -> None:
    take_step(*small)
    for number in (1, 2):
        write(tmp_path, number, *small)
    state = tmp_path / "step-00000002"
    (state / "position.json").write_text(json.dumps({"step": step}))
    reseal(state)
    assert load_state(tmp_path, *small, HERE) == {"step": 1}


def test_named_tensors_are_no_pickles(small: tuple, tmp_path: Path) -> None:
    take_step(*small)
    state = write_both("named", tmp_path, 1, *small)
    assert {path.suffix for path in state.iterdir()} == {".json", ".safetensors"}
