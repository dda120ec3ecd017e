"""Training states: written beside, sealed with a manifest, published by a rename.

A state is a folder whose name ends in the number of steps done. It counts only when the manifest in
it says that it is whole, so a reader never resumes from half a state, whenever the writer died.

states/step-00000120/   StateWriter: a model on any number of processes
                        *.distcp, .metadata   weights that train and optimizer
                        position.json         what else a resumed run needs
                        manifest.json         the size of every file; written last
states/checkpoint-120/  save_tensors: named weights of one process
                        weights.safetensors, optimizer.pt, position.json, manifest.json
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from mipha.files import begin_folder, partial_name, publish_folder, whole_folder, write_whole
from mipha.world import World

KEEP = 2
"""States that stay: the newest, and the one before it in case the newest cannot be read."""

_MANIFEST = "manifest.json"
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
_ALONE = "torch.distributed is disabled"


# The manifest: the one place that says whether a state is whole.


def seal_state(state: Path) -> None:
    """Write the manifest of a state; its last file.

    Args:
        state: Folder with all other files in it; also one that another program wrote.
    """
    sizes = {
        path.relative_to(state).as_posix(): path.stat().st_size
        for path in sorted(state.rglob("*"))
        if path.is_file() and path.name != _MANIFEST
    }
    write_whole(state / _MANIFEST, json.dumps(sizes, indent=1) + "\n")


def is_whole(state: Path) -> bool:
    """Whether a state has its manifest, and every file at the size that the manifest says."""
    try:
        sizes = json.loads((state / _MANIFEST).read_text(encoding="utf-8"))
        return all((state / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def list_states(states: Path) -> list[Path]:
    """Return the whole states of a folder, oldest first."""
    return [state for state in _numbered(states) if is_whole(state)]


def newest_state(states: Path, remove_torn: bool = False) -> Path | None:
    """Return the newest whole state of a folder; None where there is none.

    Args:
        remove_torn: Delete the states that are not whole. A trainer that picks its states itself
            would take them for whole ones.
    """
    whole = list_states(states)
    if remove_torn:
        for state in set(_numbered(states)) - set(whole):
            shutil.rmtree(state)
    return whole[-1] if whole else None


def _numbered(states: Path) -> list[Path]:
    """All states by their number, whole or not; not those that are still being written."""
    found = [path for path in states.glob("*-*") if re.fullmatch(r"[a-z]+-\d+", path.name)]
    return sorted(found, key=_step)


def _step(state: Path) -> int:
    return int(state.name.rpartition("-")[2])


def _drop_old(states: Path, keep: int) -> None:
    for old in list_states(states)[:-keep]:
        shutil.rmtree(old)


# Named weights of one process.


def save_tensors(
    state: Path,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    position: Mapping[str, Any],
    keep: int = KEEP,
) -> None:
    """Write a state of named weights, and drop the oldest states beside it.

    Args:
        state: Folder of the state; its name ends in the number of steps done.
        weights: Parameters that train, by name.
        position: Values that a resumed run needs besides; must fit JSON.
        keep: Number of states that stay.
    """
    with whole_folder(state) as beside:
        tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
        save_file(tensors, beside / "weights.safetensors")
        torch.save(optimizer.state_dict(), beside / "optimizer.pt")
        write_whole(beside / "position.json", json.dumps({"step": _step(state), **position}))
        seal_state(beside)
    _drop_old(state.parent, keep)


def load_tensors(
    states: Path, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Load the newest whole state into named weights and their optimizer.

    Returns:
        The position that was saved; None where there is no state.
    """
    newest = newest_state(states, remove_torn=True)
    if newest is None:
        return None

    saved = load_file(newest / "weights.safetensors")
    assert saved.keys() == weights.keys(), f"{newest} has other weights than those that train"
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])

    moments = torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(moments)
    return _read_position(newest)


# A model on any number of processes, in torch's distributed checkpoint format.


class StateWriter:
    """Writes the states of a model; every process has one and makes the same calls in order.

    Args:
        states: Folder of the states.
        keep: Number of states that stay.
        asynchronous: Write in the background. The weights are copied first, so training goes on at
            once. The next `save`, `poll` or `finish` that finds the state whole on every process
            publishes it, always before another state is begun.
    """

    def __init__(
        self, states: Path, world: World, keep: int = KEEP, asynchronous: bool = False
    ) -> None:
        self.states, self.world, self.keep, self.asynchronous = states, world, keep, asynchronous
        if asynchronous:
            # The thread that writes has no warning filters of its own.
            warnings.filterwarnings("ignore", message=_ALONE)
        self._pending: tuple[Future[Any], Path, dict[str, Any]] | None = None
        # Training runs its own collectives at the same time, and two threads must not share a
        # group. This group is for files, so it is on the CPU.
        self._group = dist.new_group(backend="gloo") if asynchronous and world.size > 1 else None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        position: dict[str, Any],
    ) -> None:
        """Write a state, or begin to.

        Args:
            step: Number of optimizer steps done.
            position: Values that a resumed run needs besides; must fit JSON.

        Raises:
            OSError: This state, or the one that was begun before, could not be written.
        """
        self.finish()
        state = self.states / f"step-{step:08d}"
        if self.world.is_first:
            begin_folder(state)
        self.world.barrier()

        content, position = _content(model, optimizer), {"step": step, **position}
        where = {"checkpoint_id": partial_name(state), "no_dist": self.world.size == 1}
        with _as_os_error(_not_written(state)):
            if self.asynchronous:
                future = dcp.async_save(content, process_group=self._group, **where)
                assert isinstance(future, Future)
                self._pending = (future, state, position)
                return
            dcp.save(content, **where)
        self._publish(state, position)

    def poll(self) -> None:
        """Publish a state that was written in the meantime."""
        if self._pending:
            done = torch.tensor(int(self._pending[0].done()), device=self.world.device)
            if int(self.world.total(done)) == self.world.size:
                self.finish()

    def finish(self) -> None:
        """Wait for the state that is being written, and publish it.

        Raises:
            OSError: The state could not be written.
        """
        if self._pending:
            (future, state, position), self._pending = self._pending, None
            with _as_os_error(_not_written(state)):
                future.result()
            self.world.barrier()
            self._publish(state, position)

    def _publish(self, state: Path, position: dict[str, Any]) -> None:
        if self.world.is_first:
            beside = partial_name(state)
            write_whole(beside / "position.json", json.dumps(position))
            seal_state(beside)
            publish_folder(beside, state)
            _drop_old(self.states, self.keep)
        self.world.barrier()


def load_state(
    states: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> dict[str, Any] | None:
    """Load the newest state that can be read into a model and its optimizer.

    Every process calls it, with any number of processes, whatever number wrote the state.

    Returns:
        The position that was saved; None where there is no state.

    Raises:
        ValueError: There are states, but none can be read.
    """
    found = list_states(states)
    for state in reversed(found):
        content = _content(model, optimizer)
        try:
            with _as_os_error(f"the training state {state} cannot be read"):
                dcp.load(content, checkpoint_id=state, no_dist=world.size == 1)
        except OSError as error:
            # Every process gets this error. The state before overwrites what was read of this one.
            print(f"mipha: {error}; going on from the one before it", file=sys.stderr)
            continue
        set_state_dict(
            model,
            optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
            options=_TRAINED,
        )
        return _read_position(state)

    if found:
        raise ValueError(
            f"none of the {len(found)} training states in {states} can be read: "
            "delete that folder to start this stage anew"
        )
    return None


def _content(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a state holds: the weights that train, and the optimizer's moments of them."""
    weights, moments = get_state_dict(model, optimizer, options=_TRAINED)
    return {"model": weights, "optimizer": moments}


def _read_position(state: Path) -> dict[str, Any]:
    return json.loads((state / "position.json").read_text(encoding="utf-8"))


@contextmanager
def _as_os_error(sentence: str) -> Iterator[None]:
    """Turn torch's report of a full disk or a damaged file into an OSError.

    torch raises a BaseException of its own, which `except Exception` does not catch.
    """
    with warnings.catch_warnings():
        # torch warns even a single process that asked for no others.
        warnings.filterwarnings("ignore", message=_ALONE)
        try:
            yield
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise OSError(f"{sentence}: {cause}") from error


def _not_written(state: Path) -> str:
    return f"the training state {state} could not be written; the one before it is intact"
