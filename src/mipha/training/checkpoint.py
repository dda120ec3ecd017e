"""Training states: written into a fresh folder, published by a rename, so that the newest one there is always whole.

    states/step-00000120/   weights that train + optimizer (torch's distributed checkpoint, any number of processes)
                            position.json, manifest.json (the size of every file; written last)
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from mipha.run import write_whole
from mipha.training.shard import World

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
    with _alone_is_fine():
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
    """Load the newest whole state into model and optimizer.

    Returns:
        Its position, or null when there is none.
    """
    found = list_states(states)
    if not found:
        return None
    weights, optimizer_state = get_state_dict(model, optimizer, options=_TRAINED)
    state = {"model": weights, "optimizer": optimizer_state}
    with _alone_is_fine():
        dcp.load(state, checkpoint_id=found[-1], no_dist=world.size == 1)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_TRAINED)
    return json.loads((found[-1] / "position.json").read_text(encoding="utf-8"))


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns that a single process must be meant, even when told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
