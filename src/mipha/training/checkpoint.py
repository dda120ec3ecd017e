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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from mipha.run import write_whole
from mipha.world import World

KEEP = 2
"""States kept: the newest, and the one before it in case the newest turns out unreadable."""

_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_state(states: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, Any], world: World) -> None:
    """Write a training state; every process calls it.

    Args:
        step: Optimizer steps done.
        position: What else a resumed run needs; must fit JSON.
    """
    final = states / f"step-{step:08d}"
    beside = states / f".{final.name}.partial"
    if world.is_first:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    world.barrier()
    weights, optimizer_state = get_state_dict(model, optimizer, options=_TRAINED)
    with _as_os_error(f"the training state {final} could not be written; the one before it is intact"):
        dcp.save({"model": weights, "optimizer": optimizer_state}, checkpoint_id=beside, no_dist=world.size == 1)
    if world.is_first:
        write_whole(beside / "position.json", json.dumps({"step": step, **position}))
        sizes = {path.name: path.stat().st_size for path in beside.iterdir()}
        write_whole(beside / "manifest.json", json.dumps(sizes))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        for old in list_states(states)[:-KEEP]:
            shutil.rmtree(old)
    world.barrier()


def list_states(states: Path) -> list[Path]:
    """Whole states, oldest first."""
    return sorted(path for path in states.glob("step-*") if _is_whole(path))


def load_state(states: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any] | None:
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
        except OSError as error:  # told to every process; what was read of it, the state before overwrites
            print(f"mipha: {error}; going on from the one before it", file=sys.stderr)
            continue
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_TRAINED)
        return json.loads((folder / "position.json").read_text(encoding="utf-8"))
    if found:
        raise ValueError(f"none of the {len(found)} training states in {states} can be read: delete that folder to start this stage anew")
    return None


@contextmanager
def _as_os_error(sentence: str) -> Iterator[None]:
    """torch reports a full disk or a damaged file as a BaseException of its own, which `except Exception` does not catch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # said even to one process that asked for no others
        try:
            yield
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise OSError(f"{sentence}: {cause}") from error


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
