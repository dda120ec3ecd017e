"""A study's folder: its runs, and the runs and stages that it takes over from other studies.

DIR/study.yaml              the study as it was asked for; `asked.json` holds its scale
    runs/<variant>/seed-<k> a run folder each
    logs/                   output of each run
    report.md, report.html  the report, with `scores.png`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mipha.files import read_json_object, whole_folder, write_whole
from mipha.recipe import Recipe
from mipha.run import Run, open_run
from mipha.studies.study import Experiment, load_study


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Args:
        variant: Its name.
        seed: Which repeat, from 0.
        recipe: With that seed.
        folder: Its run folder.
    """

    variant: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def run(self) -> Run:
        """Its run; the folder need not be there yet."""
        return Run(self.folder)

    @cached_property
    def made(self) -> dict[str, str]:
        """Digest of the model of each stage; two runs can share a stage where these agree."""
        return {stage: self.recipe.stage_digest(stage) for stage in self.recipe.stages}

    @property
    def is_trained(self) -> bool:
        """Whether the last stage is finished."""
        return self.run.is_finished(self.recipe.last_stage)

    @property
    def num_finished(self) -> int:
        """How many stages are finished, from the first on."""
        finished = [self.run.is_finished(stage) for stage in self.recipe.stages]
        return [*finished, False].index(False)


def jobs_of(experiment: Experiment, out: Path, seeds: int) -> list[Job]:
    """Return every run of a study, seed by seed.

    So a study that is stopped has compared all variants as often as it could.
    """
    return [
        Job(
            variant.name,
            seed,
            variant.with_seed(seed),
            out / "runs" / variant.name / f"seed-{seed}",
        )
        for seed in range(seeds)
        for variant in experiment.variants
    ]


def claim(experiment: Experiment, out: Path) -> None:
    """Mark a folder as this study's.

    Raises:
        ValueError: The folder holds another study, or other files.
    """
    if (out / "asked.json").is_file():
        # Both are read by today's schema: a digest that an older version wrote would refuse
        # whatever has gained a key with a default since.
        found = open_study(out)
        same = (found.name, found.scale) == (experiment.name, experiment.scale)
        if not same or found.digest() != experiment.digest():
            other = f"study {experiment.name} at scale {experiment.scale}"
            raise ValueError(
                f"{out} holds study {found.name} at scale {found.scale}, "
                f"not {'another version of it' if same else other}: choose another -o"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no study: choose another -o")

    write_whole(out / "study.yaml", experiment.study.dump())
    asked = {"study": experiment.name, "scale": experiment.scale}
    write_whole(out / "asked.json", json.dumps(asked) + "\n")


def open_study(out: Path) -> Experiment:
    """Open the study of a folder, at its scale.

    Raises:
        FileNotFoundError: The folder holds no study.
    """
    _check_is_study(out)
    return load_study(out / "study.yaml").at(read_json_object(out / "asked.json")["scale"])


def runs_in(out: Path) -> list[Job]:
    """Return the runs that a study's folder holds.

    Raises:
        FileNotFoundError: The folder holds no study.
    """
    _check_is_study(out)
    return [
        Job(
            path.parent.parent.name,
            int(path.parent.name.removeprefix("seed-")),
            open_run(path.parent).recipe,
            path.parent,
        )
        for path in sorted((out / "runs").glob("*/seed-*/recipe.yaml"))
    ]


def _check_is_study(out: Path) -> None:
    if not (out / "asked.json").is_file():
        raise FileNotFoundError(
            f"{out} holds no study: make one with `mipha study run NAME -o {out}`"
        )


def share_stages(job: Job, others: Iterable[Job]) -> None:
    """Give a run the stages that another run of the same parts, data and seed has made.

    The first stages of two runs are shared as far as their recipes agree. A stage that the run has
    begun itself stays its own.
    """
    stages = list(job.recipe.stages)
    done = job.num_finished
    if done == len(stages) or job.run.stage(stages[done]).exists():
        return

    # The more stages are shared, the better.
    others = [other for other in others if other is not job]
    for last in reversed(range(done, len(stages))):
        name = stages[last]
        for other in others:
            if other.made.get(name) == job.made[name] and other.run.is_finished(name):
                for stage in stages[done : last + 1]:
                    adopt_stage(other.folder, job.folder, stage)
                return


def awaits(job: Job, running: Iterable[Job]) -> bool:
    """Return whether a running job is making the stage that this one needs next."""
    done, stages = job.num_finished, list(job.recipe.stages)
    if done == len(stages) or job.run.stage(stages[done]).exists():
        return False
    return any(other.made.get(stages[done]) == job.made[stages[done]] for other in running)


def adopt_run(donor: Path, folder: Path) -> None:
    """Copy a finished run of the same recipe.

    Weights are shared where the disk can; the panel's answers are asked anew.
    """
    with whole_folder(folder) as partial:
        _copy(donor, partial, "states", "panel.jsonl")
        made_with = read_json_object(partial / "provenance.json")
        _write_provenance(partial, made_with | {"trained_as": str(donor.resolve())})


def adopt_stage(donor: Path, folder: Path, stage: str) -> None:
    """Copy one finished stage of another run; weights are shared where the disk can."""
    facts = read_json_object(donor / "provenance.json").get("data", {})
    with whole_folder(Run(folder).stage(stage)) as partial:
        _copy(Run(donor).stage(stage), partial, "states")

        # Provenance says where the stage is from, and on which data it was trained.
        made_with = read_json_object(folder / "provenance.json")
        made_with.setdefault(stage, f"of {donor.parent.name}, {donor.name}")
        if stage in facts:
            made_with.setdefault("data", {}).setdefault(stage, facts[stage])
        _write_provenance(folder, made_with)


def _copy(source: Path, target: Path, *left_out: str) -> None:
    """Copy a folder's content; weights, which are never written in place, are shared."""
    ignore = shutil.ignore_patterns(*left_out)
    shutil.copytree(source, target, copy_function=_link, ignore=ignore, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        with suppress(OSError):  # another file system: copied
            os.link(source, target)
            return
    shutil.copy2(source, target)


def _write_provenance(folder: Path, facts: dict[str, Any]) -> None:
    write_whole(folder / "provenance.json", json.dumps(facts, indent=2) + "\n")
