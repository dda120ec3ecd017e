"""A run folder: every path in it is made here, and every file in it is written through here.

runs/lora/recipe.yaml              what was asked, every default written out; marks the folder as a run
          provenance.json          what it was made with
          <stage>/metrics.jsonl    one line an optimizer step
          <stage>/answers.jsonl    what the model said about held-out images on the way
          <stage>/unreadable.jsonl images that grey stood in for
          <stage>/tensorboard/     the metrics once more
          <stage>/states/          training states to resume from
          <stage>/tuning.json      what trained, and how far it moved
          <stage>/adapter/         of a stage with LoRA: the adapter in PEFT's format, and which base it is of
          <stage>/checkpoint/      the exported standard model; there, and whole, when the stage is finished
          evaluation/<benchmark>/  predictions.jsonl, scores.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mipha.files import write_whole
from mipha.recipe import STAGES, Recipe, load_recipe


@dataclass(frozen=True)
class Run:
    """One training run on disk; get one from `create_run` or `open_run`."""

    folder: Path

    @property
    def recipe(self) -> Recipe:
        """The recipe that this run was made from."""
        return load_recipe(self.folder / "recipe.yaml")

    def stage(self, stage: str) -> Path:
        """Folder of one stage."""
        assert stage in STAGES, stage
        return self.folder / stage

    def checkpoint(self, stage: str) -> Path:
        """The standard model folder that the stage exports when it is done."""
        return self.stage(stage) / "checkpoint"

    def metrics(self, stage: str) -> Path:
        """The stage's metrics, one JSON line an optimizer step."""
        return self.stage(stage) / "metrics.jsonl"

    def states(self, stage: str) -> Path:
        """Folder of the stage's training states."""
        return self.stage(stage) / "states"

    def record_data(self, stage: str, facts: dict[str, Any]) -> None:
        """Write into provenance.json what a stage is trained on.

        Args:
            facts: Number of samples and their hash.

        Raises:
            ValueError: The stage began with other data.
        """
        path = self.folder / "provenance.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content.setdefault("data", {})
        if known.get(stage) not in (None, facts) and self.states(stage).is_dir():
            raise ValueError(
                f"the data of {stage} changed since {self.folder} began with it ({known[stage]['samples']} samples then, "
                f"{facts['samples']} now): put the old data back, or train in another folder"
            )
        known[stage] = facts
        write_whole(path, json.dumps(content, indent=2) + "\n")

    def evaluation(self, benchmark: str) -> Path:
        """Folder of one benchmark's predictions and scores."""
        return self.folder / "evaluation" / benchmark

    def is_finished(self, stage: str) -> bool:
        """Whether the stage's exported model is there, with every weight file that it names."""
        return _is_model(self.checkpoint(stage))

    def final_checkpoint(self) -> Path:
        """The last stage's exported model.

        Raises:
            FileNotFoundError: The last stage is not finished.
        """
        if not self.is_finished(STAGES[-1]):
            raise FileNotFoundError(
                f"run {self.folder} has not finished {STAGES[-1]}: run the same `mipha train` again to go on"
            )
        return self.checkpoint(STAGES[-1])


def open_run(folder: str | Path) -> Run:
    """An existing run.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: The folder is not a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no run folder {folder}: make one with `mipha train RECIPE -o {folder}`"
        )
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(
            f"{folder} is not a run: it has no recipe.yaml; give the folder that `mipha train -o` made"
        )
    return Run(folder)


def create_run(folder: str | Path, recipe: Recipe) -> Run:
    """A new run folder, or the existing one of the same recipe.

    Args:
        folder: New, empty, or a run of a recipe with the same digest.
        recipe: Written to recipe.yaml in a new folder, and in a run where no stage has begun: a mistyped recipe that never
            trained leaves nothing to protect. Otherwise an existing recipe.yaml is never changed.

    Raises:
        ValueError: The folder holds a run of another recipe, or other files; nothing in it is touched.
    """
    folder = Path(folder)
    run = Run(folder)
    if (folder / "recipe.yaml").is_file():
        if run.recipe.digest() != recipe.digest():
            if any(run.stage(stage).exists() for stage in STAGES):
                differences = _differences(run.recipe, recipe)
                raise ValueError(
                    f"{folder} holds a run of another recipe ({differences}): choose another -o, or train with the old recipe"
                )
            write_whole(folder / "recipe.yaml", recipe.dump())
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a run folder: choose another -o")
    # Hidden files do not count: a run that was stopped while its first file was written has one.
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and not a run: choose another -o, or empty the folder"
        )
    else:
        write_whole(folder / "recipe.yaml", recipe.dump())
    if not (folder / "provenance.json").is_file():
        write_whole(folder / "provenance.json", json.dumps(provenance(), indent=2) + "\n")
    return run


def available_cores() -> int:
    """Cores that this process may use, of those that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def model_folder(path: str | Path) -> Path:
    """The standard model folder that a run, or a model folder itself, stands for.

    Raises:
        FileNotFoundError: No such folder, or the run is not finished.
        ValueError: Neither a run nor a model.
    """
    path = Path(path)
    if _is_model(path):
        return path
    if path.is_dir() and not (path / "recipe.yaml").is_file():
        raise ValueError(
            f"{path} is neither a run (no recipe.yaml) nor a whole model (config.json and .safetensors): give one"
        )
    return open_run(path).final_checkpoint()


def provenance() -> dict[str, Any]:
    """What this process would make a run with: versions, commit, machine, time."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        **{
            package: _version(package)
            for package in ("mipha-vlm", "torch", "transformers", "peft", "trl")
        },
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def _is_model(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    return all(
        (folder / name).is_file()
        for name in set(json.loads(index.read_text())["weight_map"].values())
    )


def _differences(old: Recipe, new: Recipe, most: int = 3) -> str:
    """The first keys in which two recipes differ, with both values."""
    exclude = {"name", "description"}
    was, asked = (
        flat(old.model_dump(mode="json", exclude=exclude)),
        flat(new.model_dump(mode="json", exclude=exclude)),
    )
    keys = [key for key in dict.fromkeys([*was, *asked]) if was.get(key) != asked.get(key)]
    listed = [f"{key} is {was.get(key)!r} there and {asked.get(key)!r} here" for key in keys[:most]]
    return "; ".join(listed + ([f"and {len(keys) - most} more"] if len(keys) > most else []))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of plain values as one level: dotted key to value."""
    if not isinstance(tree, (dict, list)) or not tree:
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        key: value
        for name, node in items
        for key, value in flat(node, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that this file is part of, `-dirty` if changed; None for an installed package."""
    here = Path(__file__).resolve()
    try:
        # An installed package may lie in some other project's checkout: only a tracked file tells of our own.
        for command in (
            ["ls-files", "--error-unmatch", here.name],
            ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            git = ["git", "--no-optional-locks", *command]
            done = subprocess.run(
                git, cwd=here.parent, capture_output=True, text=True, timeout=20, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
