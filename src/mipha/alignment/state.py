"""States of RLHF to resume from, as those of the other steps: `checkpoints/checkpoint-N`, whole or not taken.

weights.safetensors   what trains   optimizer.pt   its moments, read as tensors only   position.json   lambda and its window
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mipha.alignment.step import mark_complete, newest_checkpoint
from mipha.files import write_whole

KEEP = 2
"""States kept: the newest, and the one before it."""


def save_state(
    states: Path,
    step: int,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    position: Mapping[str, Any],
) -> None:
    """Write a state beside and rename it into place.

    Args:
        step: Steps done.
        weights: What trains, by name.
        position: What else a resumed run needs; must fit JSON.
    """
    final = states / f"checkpoint-{step}"
    beside = states / f".{final.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(
        {name: weight.detach().contiguous() for name, weight in weights.items()},
        beside / "weights.safetensors",
    )
    torch.save(optimizer.state_dict(), beside / "optimizer.pt")
    write_whole(beside / "position.json", json.dumps({"step": step, **position}))
    mark_complete(beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    for old in sorted(
        states.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])
    )[:-KEEP]:
        shutil.rmtree(old)


def load_state(
    states: Path, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Load the newest whole state.

    Returns:
        Its position, or null where there is none.
    """
    newest = newest_checkpoint(states)
    if newest is None:
        return None
    saved = load_file(newest / "weights.safetensors")
    assert saved.keys() == weights.keys(), "the state is of other weights than the recipe trains"
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
    optimizer.load_state_dict(
        torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)
    )
    return json.loads((newest / "position.json").read_text(encoding="utf-8"))
