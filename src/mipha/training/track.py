"""Trackers that follow `metrics.jsonl`: TensorBoard wherever it is installed, others where they are asked for.

The file stays the source. A tracker that fails is named once and left; training goes on without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from mipha.recipe import Recipe

TRACKERS = ("tensorboard", "wandb", "trackio")


class Tracker(NamedTuple):
    """Where metrics go besides their file."""

    name: str
    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not there, before anything is built.

    Raises:
        ValueError: There is none of this name.
        ModuleNotFoundError: Its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"no tracker {name!r}: use {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise ModuleNotFoundError(
                f"tracking with {name} needs its package: pip install {name}, or leave {name} out",
                name=name,
            )


class Trackers:
    """A stage's trackers; TensorBoard is one of them wherever it is installed.

    Args:
        names: Those asked for; null tracks nothing, as all processes but the first.
        folder: Of the stage; TensorBoard's events go into `tensorboard/` there.
    """

    def __init__(self, names: Sequence[str] | None, folder: Path, recipe: Recipe) -> None:
        installed = ["tensorboard"] if find_spec("tensorboard") else []
        self._trackers: list[Tracker] = []
        for name in dict.fromkeys([*installed, *names]) if names is not None else ():
            if tracker := _unless_it_fails(name, lambda name=name: _open(name, folder, recipe)):
                self._trackers.append(tracker)

    def log(self, metrics: dict[str, Any]) -> None:
        """Track a step; each is given once, whatever was killed and resumed."""
        numbers = {
            key: value
            for key, value in metrics.items()
            if key != "step" and isinstance(value, (int, float))
        }
        self._trackers = [
            tracker
            for tracker in self._trackers
            if _unless_it_fails(
                tracker.name, lambda tracker=tracker: tracker.log(metrics["step"], numbers) or True
            )
        ]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exception: object) -> None:
        for tracker in self._trackers:
            _unless_it_fails(tracker.name, tracker.close)


def _open(name: str, folder: Path, recipe: Recipe) -> Tracker:
    run, settings = (
        f"{folder.parent.name}-{folder.name}-{recipe.digest()}",
        recipe.model_dump(mode="json"),
    )
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def log(step: int, numbers: dict[str, float]) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()  # a step that a killed process was given is not given again

        return Tracker(name, log, writer.close)
    if name == "wandb":
        import wandb

        session = wandb.init(
            project="mipha", id=run, name=run, config=settings, resume="allow", dir=str(folder)
        )
        return Tracker(name, lambda step, numbers: session.log(numbers, step=step), session.finish)
    import trackio

    board = trackio.init(project="mipha", name=run, config=settings, resume="allow")
    return Tracker(name, lambda step, numbers: board.log(numbers, step=step), board.finish)


def _unless_it_fails(name: str, do: Callable[[], Any]) -> Any:
    """What a tracker gives; null, and one sentence, where it fails: its code, its server and its account are not the training's affair."""
    try:
        return do()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(
            f"mipha: tracking with {name} has failed ({reason}); training goes on without it",
            file=sys.stderr,
        )
        return None
