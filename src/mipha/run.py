"""A run folder: every path in it is made here.

runs/lora/recipe.yaml              what was asked, with every default; marks the folder as a run
          provenance.json          what it was made with
          <stage>/metrics.jsonl    one line an optimizer step
          <stage>/answers.jsonl    what the model said about held-out images on the way
          <stage>/unreadable.jsonl images that were replaced by grey
          <stage>/tensorboard/     the metrics once more
          <stage>/states/          training states to resume from
          <stage>/tuning.json      what trained, and how far it moved
          <stage>/adapter/         of a stage with LoRA: the adapter in PEFT's format, and its base
          <stage>/checkpoint/      the exported standard model; whole when the stage is finished
          <stage>/checkpoint.json  size and sha256 of each of its files
          evaluation/<benchmark>/  predictions.jsonl, scores.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mipha.checkpoint_files import is_whole, weight_files
from mipha.files import read_json_object, write_whole
from mipha.processes import hold_folder
from mipha.recipe import Recipe, RecipeBase, load_recipe


@dataclass(frozen=True)
class Run:
    """One training run on disk; get one from `create_run` or `open_run`."""

    folder: Path

    @property
    def recipe(self) -> Recipe:
        """The recipe that this run was made from."""
        return load_recipe(self.folder / "recipe.yaml")

    def stage(self, stage: str) -> Path:
        """Return the folder of one stage."""
        return self.folder / stage

    def checkpoint(self, stage: str) -> Path:
        """Return the standard model folder that a stage exports when it is done."""
        return self.stage(stage) / "checkpoint"

    def checkpoint_record(self, stage: str) -> Path:
        """Return the file that records size and checksum of each file of a stage's checkpoint."""
        return self.stage(stage) / "checkpoint.json"

    def metrics(self, stage: str) -> Path:
        """Return the file of a stage's metrics, one JSON line an optimizer step."""
        return self.stage(stage) / "metrics.jsonl"

    def states(self, stage: str) -> Path:
        """Return the folder of a stage's training states."""
        return self.stage(stage) / "states"

    def record_data(self, stage: str, facts: dict[str, Any]) -> None:
        """Write into provenance.json what a stage is trained on.

        Args:
            facts: Number of samples and their hash, and the commits of sets of the hub.

        Raises:
            ValueError: The stage began with other data.
        """
        self._record(
            "data",
            stage,
            facts,
            lambda known: (
                f"the data of {stage} changed since {self.folder} began with it "
                f"({known['samples']} samples then, {facts['samples']} now): "
                "put the old data back, or train in another folder"
            ),
        )

    def commits(self, stage: str) -> dict[str, str]:
        """Return the commit of each address of the hub that a stage began with; none before."""
        path = self.folder / "provenance.json"
        if not path.is_file():
            return {}
        _, known = self._recorded("data")
        found: dict[str, str] = known.get(stage, {}).get("commits", {})
        return found

    def record_start(self, stage: str, facts: dict[str, Any]) -> None:
        """Write into provenance.json the checkpoint that a stage starts from.

        Args:
            facts: Its name and the hash of its weights.

        Raises:
            ValueError: The stage began from other weights.
        """
        self._record(
            "start",
            stage,
            facts,
            lambda known: (
                f"the weights of {facts['checkpoint']} changed since {self.folder} began with "
                "them: put the old ones back, or train in another folder"
            ),
        )

    def _record(
        self, key: str, stage: str, facts: dict[str, Any], changed: Callable[[dict[str, Any]], str]
    ) -> None:
        """Write facts about a stage; refuse others while its training states are there."""
        path = self.folder / "provenance.json"
        content, known = self._recorded(key)

        if known.get(stage) not in (None, facts) and self.states(stage).is_dir():
            raise ValueError(changed(known[stage]))

        known[stage] = facts
        write_whole(path, json.dumps(content, indent=2) + "\n")

    def _recorded(self, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the content of provenance.json, and its facts about the stages under a key.

        Raises:
            ValueError: It holds something else.
        """
        path, fix = self.folder / "provenance.json", "delete it, and it is written again"
        content = read_json_object(path, fix=fix)
        known = content.setdefault(key, {})
        fact = {"data": "samples", "start": "checkpoint"}[key]
        if not isinstance(known, dict) or not all(
            isinstance(facts, dict) and fact in facts and isinstance(facts.get("commits", {}), dict)
            for facts in known.values()
        ):
            raise ValueError(f"{path} holds {key} that are no facts about stages: {fix}")
        return content, known

    def evaluation(self, benchmark: str) -> Path:
        """Return the folder of one benchmark's predictions and scores."""
        return self.folder / "evaluation" / benchmark

    def is_finished(self, stage: str) -> bool:
        """Return whether a stage's model is there, with every weight file that it names."""
        return is_whole(self.checkpoint(stage))

    @property
    def is_trained(self) -> bool:
        """Whether the last stage, and thereby the run, is finished."""
        return self.is_finished(self.recipe.last_stage)

    def final_checkpoint(self) -> Path:
        """Return the last stage's exported model.

        Raises:
            FileNotFoundError: The last stage is not finished.
        """
        last = self.recipe.last_stage
        if not self.is_finished(last):
            raise FileNotFoundError(
                f"run {self.folder} has not finished {last}: "
                "run the same `mipha train` again to go on"
            )
        return self.checkpoint(last)


def open_run(folder: str | Path) -> Run:
    """Open an existing run.

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
            f"{folder} is not a run: it has no recipe.yaml; "
            "give the folder that `mipha train -o` made"
        )
    return Run(folder)


def create_run(folder: str | Path, recipe: Recipe) -> Run:
    """Make a run folder, or open the one of the same recipe.

    Args:
        folder: New, empty, or a run of a recipe with the same digest.
        recipe: Written to recipe.yaml in a new folder, and in a run where no stage has begun: a
            mistyped recipe that never trained leaves nothing to protect. Otherwise an existing
            recipe.yaml is never changed.

    Raises:
        ValueError: The folder holds a run of another recipe, or other files; nothing in it is
            touched.
    """
    run = Run(Path(folder))
    claim_folder(run.folder, recipe, _recipe_to_keep(run, recipe), "a run")
    return run


def check_run(folder: str | Path, recipe: Recipe) -> None:
    """Check that `create_run` would take a folder; nothing is created.

    Raises:
        ValueError: As `create_run`.
    """
    run = Run(Path(folder))
    check_claim(run.folder, recipe, _recipe_to_keep(run, recipe), "a run")


def _recipe_to_keep(run: Run, recipe: Recipe) -> Recipe | None:
    """Return the recipe that a run folder holds; None where nothing was made of it."""
    before = run.recipe if (run.folder / "recipe.yaml").is_file() else None
    if before is not None and before.digest() != recipe.digest():
        has_begun = any(run.stage(stage).exists() for stage in before.stages)
        before = before if has_begun else None
    return before


def hold_run(folder: Path) -> AbstractContextManager[None]:
    """Return a context that keeps a folder to this process while it trains there.

    A folder of something else is not touched: `claim_folder` refuses it.

    Raises:
        ValueError: Another process trains in the folder; names it.
    """
    return nullcontext() if _is_foreign(folder) else hold_folder(folder)


def claim_folder(folder: Path, recipe: RecipeBase, before: RecipeBase | None, what: str) -> None:
    """Make the folder of a recipe, or open the one that was made of the same recipe.

    Args:
        folder: New, empty, or with a recipe of the same digest.
        recipe: Written to recipe.yaml, unless there is one to keep.
        before: The recipe that the folder holds, and keeps; None: it holds none, or one that
            nothing was made of.
        what: Name of such a folder, for messages: "a run".

    Raises:
        ValueError: The folder holds another recipe or other files; nothing in it is touched.
    """
    check_claim(folder, recipe, before, what)

    # Write the recipe, and what it is carried out with.
    if before is None:
        write_whole(folder / "recipe.yaml", recipe.dump())
    if not (folder / "provenance.json").is_file():
        write_whole(folder / "provenance.json", json.dumps(provenance(), indent=2) + "\n")


def check_claim(folder: Path, recipe: RecipeBase, before: RecipeBase | None, what: str) -> None:
    """Check that `claim_folder` would take a folder; nothing is created.

    Raises:
        ValueError: As `claim_folder`.
    """
    if before is not None and before.digest() != recipe.digest():
        raise ValueError(
            f"{folder} holds {what} of another recipe ({_list_differences(before, recipe)}): "
            "choose another -o, or use the old recipe"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder: choose another -o")
    if _is_foreign(folder):
        raise ValueError(
            f"{folder} is not empty and not {what}: choose another -o, or empty the folder"
        )


def _is_foreign(folder: Path) -> bool:
    """Return whether a path is something else than a new folder or one with a recipe.

    Hidden files do not count: a run that was stopped while its first file was written has one.
    """
    if not folder.is_dir():
        return folder.exists()
    has_files = any(not path.name.startswith(".") for path in folder.iterdir())
    return has_files and not (folder / "recipe.yaml").is_file()


def _list_differences(before: RecipeBase, now: RecipeBase, most: int = 3) -> str:
    """Return the first keys in which two recipes differ, with both values, as a clause."""
    found = before.differences(now)
    listed = [
        f"{key} is {was!r} there and {asked!r} here"
        for key, (was, asked) in list(found.items())[:most]
    ]
    return "; ".join(listed + ([f"and {len(found) - most} more"] if len(found) > most else []))


def available_cores() -> int:
    """Return how many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_first_process() -> bool:
    """Return whether this process is the first of those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def model_folder(path: str | Path) -> Path:
    """Return the standard model folder that a run, or a model folder itself, stands for.

    Raises:
        FileNotFoundError: No such folder, the run is not finished, or weights are missing.
        ValueError: Neither a run nor a model, or its weights are pickles.
    """
    path = Path(path)
    if is_whole(path):
        return path
    if (path / "config.json").is_file():
        weight_files(path)  # says which are missing
    if path.is_dir() and not (path / "recipe.yaml").is_file():
        raise ValueError(
            f"{path} is neither a run (no recipe.yaml) nor a whole model "
            "(config.json and .safetensors): give one"
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"no run or model folder {path}: check the path, or make a run with "
            f"`mipha train RECIPE -o {path}`"
        )
    return open_run(path).final_checkpoint()


def adapter_folder(path: str | Path) -> Path:
    """Return the adapter that a run's last stage trained, or the adapter folder itself.

    Raises:
        FileNotFoundError: No such folder, or no adapter in it.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        return path
    if not (path / "recipe.yaml").is_file():
        raise FileNotFoundError(
            f"{path} has no adapter_config.json: give a run, the adapter/ folder of a stage, or "
            "one that peft wrote"
        )
    run = open_run(path)
    found = run.stage(run.recipe.last_stage) / "adapter"
    if not (found / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"the last stage of {path} has no adapter: train it with tuning lora, and to its end"
        )
    return found


def base_name(path: str | Path) -> str:
    """Return the name of the model that an adapter belongs to, without a path of this machine.

    Args:
        path: Run, or the adapter folder of one.
    """
    path = Path(path).resolve()
    folder = path if (path / "recipe.yaml").is_file() else path.parent.parent
    if (folder / "recipe.yaml").is_file():
        recipe = open_run(folder).recipe
        before = recipe.stage_before(recipe.last_stage)
        start = getattr(recipe.model, "checkpoint", None)
        if before is None and start is not None:
            return Path(start).name if Path(start).is_dir() else start
        return f"{folder.name}/{before or 'base'}"
    return Path(read_json_object(path / "adapter_config.json")["base_model_name_or_path"]).name


def provenance() -> dict[str, Any]:
    """Return the versions, commit, machine and time that this process makes a run with."""
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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that this file is part of, with `-dirty` if changed.

    None for an installed package.
    """
    here = Path(__file__).resolve()
    try:
        # An installed package may lie in another project's checkout: only a tracked file tells.
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
