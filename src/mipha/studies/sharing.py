"""What was trained once is not trained again: a first stage, or a whole run, of the same recipe is taken over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mipha.files import write_whole
from mipha.run import open_run
from mipha.studies.folder import Job
from mipha.studies.study import pretrain_digest


def pretrain_donor(job: Job, jobs: Iterable[Job]) -> Job | None:
    """Another run whose finished first stage is this one's too, and was not begun here."""
    if open_run(job.folder).stage("pretrain").exists():
        return None
    wanted = pretrain_digest(job.recipe)
    same = (other for other in jobs if other is not job and pretrain_digest(other.recipe) == wanted)
    return next((other for other in same if open_run(other.folder).is_finished("pretrain")), None)


def adopt_run(donor: Path, folder: Path) -> None:
    """Copy a finished run of the same recipe; weights are shared where the disk can, and the panel's answers are asked anew."""
    beside = folder.with_name(f".{folder.name}.partial")
    _copy(donor, beside, "states", "panel.jsonl")
    _note(beside, trained_as=str(donor.resolve()))
    beside.rename(folder)


def adopt_pretrain(donor: Path, folder: Path) -> None:
    """Give a run the first stage that another run of the same parts, data and seed has made; weights are shared where the disk can."""
    source, target = open_run(donor), open_run(folder)
    beside = target.stage("pretrain").with_name(".pretrain.partial")
    _copy(source.stage("pretrain"), beside, "states")
    trained_on = json.loads((donor / "provenance.json").read_text(encoding="utf-8")).get("data", {})
    own = json.loads((folder / "provenance.json").read_text(encoding="utf-8")).get("data", {})
    _note(folder, pretrain=f"of {donor.parent.name}, {donor.name}", data=trained_on | own)
    beside.rename(target.stage("pretrain"))


def _copy(source: Path, target: Path, *left_out: str) -> None:
    """A folder once more; weights, which are never written in place, are shared."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns(*left_out))


def _note(folder: Path, **facts: Any) -> None:
    """Add to a run's provenance."""
    path = folder / "provenance.json"
    write_whole(
        path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | facts, indent=2) + "\n"
    )


def _link(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        with suppress(OSError):  # another file system: copied
            os.link(source, target)
            return
    shutil.copy2(source, target)
