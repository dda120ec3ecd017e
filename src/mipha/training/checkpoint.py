"""Training states: written into a fresh folder, published by a rename, so that the newest one there is always whole.

states/step-00000120/   weights that train + optimizer (torch's distributed checkpoint, any number of processes)
                        position.json, manifest.json (the size of every file; written last)
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from mipha.files import write_whole
from mipha.world import World

_ALONE = "torch.distributed is disabled"
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class StateWriter:
    """Writes a stage's training states; every process has one and calls the same methods in the same order.

    Args:
        states: Folder of the stage's states.
        keep: How many stay; with two, the one before the newest is there in case that turns out unreadable.
        asynchronous: Write in the background. The weights are copied first, so training goes on at once; a state is published by
            the first `save`, `poll` or `finish` that finds it whole on every process, and always before the next is begun.
    """

    def __init__(
        self, states: Path, world: World, keep: int = 2, asynchronous: bool = False
    ) -> None:
        self.states, self.world, self.keep, self.asynchronous = states, world, keep, asynchronous
        if asynchronous:
            warnings.filterwarnings(
                "ignore", message=_ALONE
            )  # the thread that writes has no context of its own
        self._pending: tuple[Future[Any], Path, dict[str, Any]] | None = None
        # Training's own collectives run at the same time: two threads must not share a group. This one is for files, so on the CPU.
        self._group = dist.new_group(backend="gloo") if asynchronous and world.size > 1 else None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        position: dict[str, Any],
    ) -> None:
        """Write a training state, or begin to.

        Args:
            step: Optimizer steps done.
            position: What else a resumed run needs; must fit JSON.

        Raises:
            OSError: This state, or the one begun before, could not be written.
        """
        self.finish()
        final = self.states / f"step-{step:08d}"
        beside = _beside(final)
        if self.world.is_first:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        self.world.barrier()
        weights, optimizer_state = get_state_dict(model, optimizer, options=_TRAINED)
        state, position = (
            {"model": weights, "optimizer": optimizer_state},
            {"step": step, **position},
        )
        with _as_os_error(_not_written(final)):
            if self.asynchronous:
                future = dcp.async_save(
                    state,
                    checkpoint_id=beside,
                    no_dist=self.world.size == 1,
                    process_group=self._group,
                )
                assert isinstance(future, Future)
                self._pending = (future, final, position)
                return
            dcp.save(state, checkpoint_id=beside, no_dist=self.world.size == 1)
        self._publish(final, position)

    def poll(self) -> None:
        """Publish a state that was written in the meantime."""
        if self._pending:
            done = torch.tensor(int(self._pending[0].done()), device=self.world.device)
            if int(self.world.total(done)) == self.world.size:
                self.finish()

    def finish(self) -> None:
        """Wait for a state that is being written, and publish it.

        Raises:
            OSError: It could not be written.
        """
        if self._pending:
            (future, final, position), self._pending = self._pending, None
            with _as_os_error(_not_written(final)):
                future.result()
            self.world.barrier()
            self._publish(final, position)

    def _publish(self, final: Path, position: dict[str, Any]) -> None:
        beside = _beside(final)
        if self.world.is_first:
            write_whole(beside / "position.json", json.dumps(position))
            sizes = {path.name: path.stat().st_size for path in beside.iterdir()}
            write_whole(beside / "manifest.json", json.dumps(sizes))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
            for old in list_states(self.states)[: -self.keep]:
                shutil.rmtree(old)
        self.world.barrier()


def check_writable(folder: Path) -> None:
    """Write a file in a folder and remove it, before hours are spent on what cannot be kept.

    Raises:
        OSError: It cannot be written there.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({error.strerror}): choose another -o, or get the right to write there"
        ) from error


def list_states(states: Path) -> list[Path]:
    """Whole states, oldest first."""
    return sorted(path for path in states.glob("step-*") if _is_whole(path))


def load_state(
    states: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> dict[str, Any] | None:
    """Load the newest state that can be read into model and optimizer; every process calls it.

    Returns:
        Its position, or null when there is none.

    Raises:
        ValueError: There are states, but none can be read.
    """
    found = list_states(states)
    for folder in reversed(found):
        weights, optimizer_state = get_state_dict(model, optimizer, options=_TRAINED)
        state = {"model": weights, "optimizer": optimizer_state}
        try:
            with _as_os_error(f"the training state {folder} cannot be read"):
                dcp.load(state, checkpoint_id=folder, no_dist=world.size == 1)
        except (
            OSError
        ) as error:  # told to every process; what was read of it, the state before overwrites
            print(f"mipha: {error}; going on from the one before it", file=sys.stderr)
            continue
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_TRAINED,
        )
        return json.loads((folder / "position.json").read_text(encoding="utf-8"))
    if found:
        raise ValueError(
            f"none of the {len(found)} training states in {states} can be read: delete that folder to start this stage anew"
        )
    return None


@contextmanager
def _as_os_error(sentence: str) -> Iterator[None]:
    """torch reports a full disk or a damaged file as a BaseException of its own, which `except Exception` does not catch."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=_ALONE
        )  # said even to one process that asked for no others
        try:
            yield
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise OSError(f"{sentence}: {cause}") from error


def _not_written(final: Path) -> str:
    return f"the training state {final} could not be written; the one before it is intact"


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
