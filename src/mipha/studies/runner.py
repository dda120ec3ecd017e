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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mipha.api import check_training
from mipha.errors import import_optional
from mipha.evaluation.benchmark import load_benchmark
from mipha.evaluation.evaluate import plan_benchmarks
from mipha.evaluation.judge import Endpoint, Replay
from mipha.files import read_json
from mipha.processes import child_environment, hold_folder
from mipha.run import available_cores, create_run
from mipha.studies.findings import compared_by
from mipha.studies.first_token import first_token_of
from mipha.studies.folder import (
    Job,
    adopt_run,
    awaits,
    claim,
    jobs_of,
    runs_in,
    share_stages,
)
from mipha.studies.panel import asked_of
from mipha.studies.study import Experiment, Measured, Scale
from mipha.terminal import Console

console = Console()

_LOOK_EVERY = 5.0
"""Seconds between looks into every run for the bar: on two cores more often would be felt."""


@dataclass(frozen=True)
class JudgeOptions:
    """The judge of a study's runs, in the options of `mipha evaluate`.

    Args:
        url: Base URL of a server that grades.
        model: Name of its model.
        replies: File of recorded replies, used instead of a server.
    """

    url: str | None = None
    model: str | None = None
    replies: Path | None = None

    def check(self) -> None:
        """Check that `mipha evaluate` would take these options.

        Raises:
            ValueError: Two judges, a URL without a model, or malformed replies.
            FileNotFoundError: No such file of replies.
        """
        if self.replies is not None and self.url is not None:
            raise ValueError("--judge-replies and --judge are two judges: give one")
        if self.replies is not None:
            Replay(self.replies)
        elif self.url is None:
            raise ValueError("--judge-model has no effect without --judge: give its URL")
        elif self.model is None:
            raise ValueError("--judge needs --judge-model, the name of a model that the server has")
        else:
            Endpoint(self.url, self.model)

    @property
    def arguments(self) -> list[str]:
        """The options as words of a command."""
        given = {
            "--judge": self.url,
            "--judge-model": self.model,
            "--judge-replies": self.replies,
        }
        return [part for key, value in given.items() if value for part in (key, str(value))]


@dataclass(frozen=True)
class Work:
    """Everything that the runs of a study have in common.

    Args:
        out: Folder of the study.
        scale: Name of the scale.
        asked: The scale, with the benchmarks that can be scored.
        judge: Judge of the benchmarks that want one.
    """

    out: Path
    scale: str
    asked: Scale
    judge: JudgeOptions | None = None


def run_missing(
    experiment: Experiment,
    out: Path,
    seeds: int | None = None,
    slots: int = 1,
    slurm: dict[str, Any] | None = None,
    share: Sequence[str | Path] = (),
    judge: JudgeOptions | None = None,
) -> None:
    """Train and evaluate the runs of a study that are missing.

    Arguments and errors are those of `mipha.api.run_study`.
    """
    # Check everything that can be checked before anything is trained.
    jobs, others, asked, donors = _check(experiment, out, seeds, share, judge)
    gpus = _gpus(slots) if slurm is None else []
    claim(experiment, out)
    with hold_folder(out):
        # Make the run folders; whole runs are taken over from the first study that has them.
        for job in jobs:
            if not job.folder.exists() and (donor := donors.get(job.recipe.digest())):
                adopt_run(donor, job.folder)
            create_run(job.folder, job.recipe)

        # Run the missing ones.
        missing = [job for job in jobs if not _is_done(job, asked)]
        console.print(
            f"{experiment.study.title}: {len(jobs)} runs, {len(jobs) - len(missing)} of them done"
        )
        work = Work(out, experiment.scale, asked, judge)
        with _progress(jobs) as watch, _executor(slots, slurm, out / "logs") as submit:
            failed = _run_all(
                missing,
                [*jobs, *others],
                start=lambda job, gpu: submit(make, job, work, _environment(slots, gpu)),
                gpus=gpus,
                slots=slots if slurm is None else None,
                watch=watch,
            )
    if failed:
        logs = ", ".join(str(_log(out, job)) for job in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(jobs)} runs failed: see {logs}, "
            "fix the cause and run the same command again"
        )


def list_runs(
    experiment: Experiment,
    out: Path,
    seeds: int | None = None,
    share: Sequence[str | Path] = (),
    judge: JudgeOptions | None = None,
) -> list[tuple[str, int, str]]:
    """Return variant, seed and what is to be done for each run of a study; nothing is created.

    Arguments and errors are those of `mipha.api.run_study`.
    """
    jobs, others, asked, donors = _check(experiment, out, seeds, share, judge)

    # A stage that another run trains, or has trained, is taken over.
    made = {
        other.recipe.stage_digest(name)
        for other in [*others, *jobs]
        for name in other.recipe.stages
        if other.is_trained
    }
    listed = []
    for job in jobs:
        digests = {job.recipe.stage_digest(name): name for name in job.recipe.stages}
        own = [name for digest, name in digests.items() if digest not in made]
        made |= digests.keys()
        if _is_done(job, asked):
            todo = "done"
        elif job.is_trained:
            todo = "measure"
        elif donor := donors.get(job.recipe.digest()):
            todo = f"take over {donor}"
        else:
            todo = f"train {', '.join(own)}" if own else "take over all stages"
        listed.append((job.variant, job.seed, todo))
    return listed


def _check(
    experiment: Experiment,
    out: Path,
    seeds: int | None,
    share: Sequence[str | Path],
    judge: JudgeOptions | None,
) -> tuple[list[Job], list[Job], Scale, dict[str, Path]]:
    """Check everything that can be checked before anything is trained.

    Returns:
        The runs of the study, those of the folders to share from, the scale with the benchmarks
        that can be scored, and the folders of finished runs to take over by the recipe's digest.
    """
    others = [job for folder in share for job in runs_in(Path(folder))]
    jobs = jobs_of(experiment, out, seeds or experiment.asked.seeds)
    asked = _askable(experiment, judge)
    donors = {other.recipe.digest(): other.folder for other in reversed(others) if other.is_trained}
    if not all(_is_done(job, asked) for job in jobs):
        _check_data(asked, experiment.asked.evaluate)
    for job in jobs:
        if job.recipe.digest() not in donors:
            check_training(job.recipe, job.folder)
    return jobs, others, asked, donors


def _askable(experiment: Experiment, judge: JudgeOptions | None) -> Scale:
    """Return the scale with the benchmarks that can be scored, and say which are left out.

    Raises:
        ValueError: A benchmark has no such metric, the judge cannot be used, or no benchmark
            remains.
    """
    if judge is not None:
        judge.check()
    for wanted in experiment.asked.evaluate:
        compared_by(wanted)

    judged = [
        wanted.benchmark
        for wanted in experiment.asked.evaluate
        if load_benchmark(wanted.benchmark).judge == "required"
    ]
    if judge is not None or not judged:
        return experiment.asked

    # Without a judge, a run would train for days and then fail at its evaluation.
    kept = tuple(wanted for wanted in experiment.asked.evaluate if wanted.benchmark not in judged)
    fix = "give --judge URL --judge-model NAME, or --judge-replies FILE"
    names = " and ".join(judged)
    if not kept:
        raise ValueError(f"the study measures by {names} alone, which a judge grades: {fix}")
    console.print(f"{names}: graded by a judge and left out; to measure it too, {fix}")
    return experiment.asked.model_copy(update={"evaluate": kept})


def _check_data(asked: Scale, measured: Sequence[Measured]) -> None:
    """Read the questions of every benchmark and of the panel, and see that their images are there.

    Args:
        asked: Scale with the benchmarks that are measured.
        measured: All benchmarks of the study; the panel may use images of each.
    """
    for wanted in asked.evaluate:
        plan_benchmarks([wanted.benchmark], wanted.data_root, wanted.split)
    asked_of(asked.panel, measured)


def make(job: Job, work: Work, environment: dict[str, str]) -> None:
    """Train, evaluate and question one run, each in a process with memory of its own.

    Raises:
        CalledProcessError: A process failed; the log says why.
    """
    folder, asked = str(job.folder), work.asked
    judge = work.judge.arguments if work.judge else []

    # The commands that are missing, as a user would type them.
    commands = []
    if not job.is_trained:
        commands.append(["mipha", "train", str(job.folder / "recipe.yaml"), "-o", folder])
    for wanted in asked.evaluate:
        if not _is_measured(job.folder, wanted):
            command = ["mipha", "evaluate", folder, "-b", wanted.benchmark, *_options(wanted)]
            commands.append([*command, *judge])
    study = [folder, str(work.out / "study.yaml"), work.scale]
    if _wants_panel(job, asked):
        commands.append(["mipha.studies.panel", *study])
    if _wants_first_token(job, asked):
        commands.append(["mipha.studies.first_token", *study])

    log = _log(work.out, job)
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
        and not _wants_first_token(job, asked)
        and all(_is_measured(job.folder, wanted) for wanted in asked.evaluate)
    )


def _wants_panel(job: Job, asked: Scale) -> bool:
    """Return whether a run has yet to answer the panel; the first seed speaks for its variant."""
    return bool(asked.panel) and job.seed == 0 and not (job.folder / "panel.jsonl").is_file()


def _wants_first_token(job: Job, asked: Scale) -> bool:
    """Return whether a run has yet to be timed; the seeds of a variant are of one size."""
    return asked.times_first_token and job.seed == 0 and first_token_of(job.folder) is None


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
