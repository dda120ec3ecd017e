"""Trackers that follow metrics.jsonl: TensorBoard wherever it is installed, others when asked for.

The file stays the source. A tracker that fails is named once and dropped; training goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from mipha.errors import MissingPackage, import_optional
from mipha.files import read_json_object, read_lines, step_of, write_whole
from mipha.terminal import echo

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "mipha"


class Tracker(NamedTuple):
    """One place that metrics go to besides their file."""

    name: str
    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot be used, before anything is built.

    Raises:
        ValueError: No tracker has this name.
        MissingPackage: The package of the tracker is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"no tracker {name!r}: use {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise MissingPackage(name, f"tracking with {name}", name)


class Trackers:
    """The trackers of one training; a context that closes them.

    Args:
        names: Trackers that were asked for; None tracks nothing, for all processes but the first.
        folder: Folder that trackers write into; TensorBoard's events go into `tensorboard/` there.
        run: Name of the run, the same after a resume.
        settings: Settings that are shown with the run.
        tracked: Last step that the trackers were given before a resume.
    """

    def __init__(
        self,
        names: Sequence[str] | None,
        folder: Path,
        run: str,
        settings: Mapping[str, Any],
        tracked: int = 0,
    ) -> None:
        self._tracked = tracked
        self._trackers: list[Tracker] = []
        if names is None:
            return
        installed = ["tensorboard"] if find_spec("tensorboard") else []
        for name in dict.fromkeys([*installed, *names]):
            tracker = _unless_it_fails(
                name, lambda name=name: _OPEN[name](folder, run, dict(settings))
            )
            if tracker:
                self._trackers.append(tracker)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Track a step; a step that is made again after a resume is not tracked again."""
        step = metrics["step"]
        if step <= self._tracked:
            return

        numbers = {
            key: value
            for key, value in metrics.items()
            if key != "step" and isinstance(value, (int, float))
        }
        # One that fails is dropped.
        self._trackers = [
            tracker
            for tracker in self._trackers
            if _unless_it_fails(
                tracker.name, lambda tracker=tracker: tracker.log(step, numbers) or True
            )
        ]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exception: object) -> None:
        for tracker in self._trackers:
            _unless_it_fails(tracker.name, tracker.close)


def last_tracked(metrics_jsonl: Path, record: Path) -> int:
    """Return the last step that trackers were given; call it before metrics are dropped.

    Metrics of steps behind the newest state are dropped and made again, but a tracker keeps what it
    was given. So the number is kept apart.

    Args:
        record: File that the number is kept in.
    """
    known = 0
    if record.is_file():
        fix = "delete it, and steps are tracked again"
        known = read_json_object(record, fix=fix).get("step")
        if type(known) is not int:
            raise ValueError(f"{record} has no number of a step: {fix}")
    steps = (step_of(line, metrics_jsonl) for line in read_lines(metrics_jsonl))
    last = max(steps, default=0)
    write_whole(record, json.dumps({"step": max(known, last)}))
    return max(known, last)


def _open_tensorboard(folder: Path, run: str, settings: dict[str, Any]) -> Tracker:
    tensorboard = import_optional("torch.utils.tensorboard", "TensorBoard", "tensorboard")
    writer = tensorboard.SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # a killed process cannot do it later, and the step is not given again

    return Tracker("tensorboard", log, writer.close)


def _open_wandb(folder: Path, run: str, settings: dict[str, Any]) -> Tracker:
    wandb = import_optional("wandb", "tracking with wandb", "wandb")
    session = wandb.init(
        project=PROJECT, id=run, name=run, config=settings, resume="allow", dir=str(folder)
    )
    return Tracker("wandb", lambda step, numbers: session.log(numbers, step=step), session.finish)


def _open_trackio(folder: Path, run: str, settings: dict[str, Any]) -> Tracker:
    trackio = import_optional("trackio", "tracking with trackio", "trackio")
    board = trackio.init(project=PROJECT, name=run, config=settings, resume="allow")
    return Tracker("trackio", lambda step, numbers: board.log(numbers, step=step), board.finish)


_OPEN = {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "trackio": _open_trackio}


def _unless_it_fails(name: str, do: Callable[[], Any]) -> Any:
    """Return what a tracker gives; None, and one sentence, where it fails.

    Its code, its server and its account must not end a training.
    """
    try:
        return do()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        echo(
            f"mipha: tracking with {name} has failed ({reason}); training goes on without it",
            err=True,
        )
        return None
