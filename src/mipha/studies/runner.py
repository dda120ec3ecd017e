"""Train and measure the missing runs of a study, in processes of their own, a few at a time.

A study that was killed goes on where it stopped. Whole runs, or their first stages, are taken over
from the folder of another study that trained the same recipes.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mipha.errors import import_optional
from mipha.files import read_json
from mipha.processes import child_environment, hold_folder
from mipha.run import available_cores, create_run
from mipha.studies.findings import compared_by
from mipha.studies.folder import (
    Job,
    adopt_run,
    awaits,
    claim,
    jobs_of,
    runs_in,
    share_stages,
)
from mipha.studies.study import Experiment, Measured, Scale

console = Console()

_LOOK_EVERY = 5.0
"""Seconds between looks into every run for the bar: on two cores more often would be felt."""


def run_missing(
    experiment: Experiment,
    out: Path,
    seeds: int | None = None,
    slots: int = 1,
    slurm: dict[str, Any] | None = None,
    share: Sequence[str | Path] = (),
) -> None:
    """Train and evaluate the runs of a study that are missing.

    Arguments and errors are those of `mipha.api.run_study`.
    """
    # Check everything that can be checked before anything is trained.
    for wanted in experiment.asked.evaluate:
        compared_by(wanted)
    others = [job for folder in share for job in runs_in(Path(folder))]
    claim(experiment, out)
    with hold_folder(out):
        _run_missing(experiment, out, seeds, slots, slurm, others)


def _run_missing(
    experiment: Experiment,
    out: Path,
    seeds: int | None,
    slots: int,
    slurm: dict[str, Any] | None,
    others: list[Job],
) -> None:
    # Make the run folders; whole runs are taken over from the first study that has them.
    jobs = jobs_of(experiment, out, seeds or experiment.asked.seeds)
    donors = {other.recipe.digest(): other.folder for other in reversed(others) if other.is_trained}
    for job in jobs:
        if not job.folder.exists() and (donor := donors.get(job.recipe.digest())):
            adopt_run(donor, job.folder)
        create_run(job.folder, job.recipe)

    # Run the missing ones.
    missing = [job for job in jobs if not _is_done(job, experiment.asked)]
    console.print(
        f"{experiment.study.title}: {len(jobs)} runs, {len(jobs) - len(missing)} of them done"
    )
    with _progress(jobs) as watch, _executor(slots, slurm, out / "logs") as submit:
        failed = _run_all(
            missing,
            [*jobs, *others],
            start=lambda job, gpu: submit(make, job, experiment, out, _environment(slots, gpu)),
            gpus=_gpus(slots) if slurm is None else [],
            slots=slots if slurm is None else None,
            watch=watch,
        )
    if failed:
        logs = ", ".join(str(_log(out, job)) for job in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(jobs)} runs failed: see {logs}, "
            "fix the cause and run the same command again"
        )


def make(job: Job, experiment: Experiment, out: Path, environment: dict[str, str]) -> None:
    """Train, evaluate and question one run, each in a process with memory of its own.

    Raises:
        CalledProcessError: A process failed; the log says why.
    """
    folder, asked = str(job.folder), experiment.asked
    commands = []
    if not job.is_trained:
        commands.append(["mipha", "train", str(job.folder / "recipe.yaml"), "-o", folder])
    for wanted in asked.evaluate:
        if not _is_measured(job.folder, wanted):
            commands.append(
                ["mipha", "evaluate", folder, "-b", wanted.benchmark, *_options(wanted)]
            )
    if _wants_panel(job, asked):
        study = str(out / "study.yaml")
        commands.append(["mipha.studies.panel", folder, study, experiment.scale])

    log = _log(out, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for command in commands:
            subprocess.run(
                [sys.executable, "-m", *command],
                check=True,
                stdout=file,
                stderr=file,
                env=os.environ | environment | child_environment(),
            )


def _options(wanted: Measured) -> list[str]:
    """Return the options of `mipha evaluate` that a benchmark is asked with."""
    options = {
        "--data-root": wanted.data_root,
        "--split": wanted.split,
        "--limit": wanted.limit,
    }
    given = {key: str(value) for key, value in options.items() if value is not None}
    return [part for pair in given.items() for part in pair]


def _is_done(job: Job, asked: Scale) -> bool:
    return (
        job.is_trained
        and not _wants_panel(job, asked)
        and all(_is_measured(job.folder, wanted) for wanted in asked.evaluate)
    )


def _wants_panel(job: Job, asked: Scale) -> bool:
    """Return whether a run has yet to answer the panel; the first seed speaks for its variant."""
    return bool(asked.panel) and job.seed == 0 and not (job.folder / "panel.jsonl").is_file()


def _is_measured(folder: Path, wanted: Measured) -> bool:
    """Return whether a benchmark's scores are there, over as many questions as the study asks."""
    for file in (folder / "evaluation").glob("*/scores.json"):
        found = read_json(file)
        asked = min(wanted.limit or found["num_questions"], found["num_questions"])
        same = (
            found["benchmark"] == wanted.benchmark
            and wanted.split in (None, found["split"])
            and not found["blind"]
        )
        if same and not found["n_failed"] and found["n_asked"] >= asked:
            return True
    return False


def _log(out: Path, job: Job) -> Path:
    return out / "logs" / f"{job.variant}-seed-{job.seed}.log"


def _run_all(
    jobs: Sequence[Job],
    every: Sequence[Job],
    start: Callable[[Job, str | None], Any],
    gpus: list[str],
    slots: int | None,
    watch: Callable[[], None],
) -> list[Job]:
    """Run jobs, each when a slot is free and its next stage is made by no other.

    Args:
        jobs: Jobs to run.
        every: Runs whose stages may be shared.
        start: Starts a job on a GPU, or without one; returns its future.
        gpus: The GPU of each slot, where every run is to see one of several.
        slots: Jobs at a time; None: any number.
        watch: Called twice a second.

    Returns:
        The jobs that failed.
    """
    waiting, failed = list(jobs), []
    running: dict[Any, tuple[Job, str | None]] = {}
    while waiting or running:
        # Start every job that can start.
        for job in waiting[:]:
            if slots is not None and len(running) >= slots:
                break
            share_stages(job, every)
            if awaits(job, [other for other, _ in running.values()]):
                continue
            gpu = gpus.pop() if gpus else None
            running[start(job, gpu)] = (job, gpu)
            waiting.remove(job)

        # Collect the jobs that have ended.
        time.sleep(0.5)
        for future in [future for future in running if future.done()]:
            job, gpu = running.pop(future)
            gpus += [gpu] if gpu is not None else []
            if future.exception():
                failed.append(job)
        watch()
    return failed


def _gpus(slots: int) -> list[str]:
    """Return the GPU of each slot, where every run is to see one of several."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        known = [name for name in visible.split(",") if name]
    else:
        known = [
            path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))
        ]
    if slots > 1 and known and slots > len(known):
        raise ValueError(
            f"{slots} runs at a time want {slots} GPUs, but {len(known)} are visible: lower --jobs"
        )
    return known[:slots] if slots > 1 else []


def _environment(slots: int, gpu: str | None = None) -> dict[str, str]:
    """Return the environment in which a run has its GPU, or its share of the CPU's cores."""
    if gpu is not None:
        return {"CUDA_VISIBLE_DEVICES": gpu}
    if slots == 1:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, available_cores() // slots))}


@contextmanager
def _executor(slots: int, slurm: dict[str, Any] | None, logs: Path) -> Iterator[Callable[..., Any]]:
    """Yield the function that starts a job: in a thread here, or through SLURM."""
    if slurm is None:
        with ThreadPoolExecutor(slots) as pool:
            yield pool.submit
        return
    yield _submitit(slurm, logs / "slurm").submit


def _submitit(parameters: dict[str, Any], folder: Path) -> Any:
    """Return the executor of SLURM, or where there is none, of processes on this machine."""
    submitit = import_optional("submitit", "a SLURM job", "slurm")
    executor = submitit.AutoExecutor(folder=folder)
    try:
        executor.update_parameters(**parameters)
    except (NameError, AssertionError) as error:
        raise ValueError(f"--slurm: {str(error).splitlines()[0]}") from error
    if executor.cluster != "slurm":
        console.print("no SLURM on this machine: the jobs are processes here, all at once")
    return executor


@contextmanager
def _progress(jobs: list[Job]) -> Iterator[Callable[[], None]]:
    """Show a bar over the whole study; the pace since this start tells the time that is left."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(20),
        TextColumn("{task.completed:.1f} of {task.total} runs"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("study", total=len(jobs))

        looked = -math.inf

        def look() -> None:
            nonlocal looked
            looked = time.monotonic()
            progress.update(task, completed=sum(map(_share_done, jobs)))

        look()
        yield lambda: look() if time.monotonic() - looked > _LOOK_EVERY else None
        look()  # for the runs that finished since


def _share_done(job: Job) -> float:
    """Return how much of a run's training is done, where the recipe says how many steps it has."""
    if job.is_trained:
        return 1.0
    planned = sum(stage.max_steps or 0 for stage in job.recipe.stages.values())
    if not planned:
        return 0.0
    files = [path for path in map(job.run.metrics, job.recipe.stages) if path.is_file()]
    steps = sum(path.read_bytes().count(b"\n") for path in files)  # counted, not parsed
    return min(1.0, steps / planned)
