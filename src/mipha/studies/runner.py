"""Train and measure what a study lacks: one process a run, as many at a time as there are slots; killed, it goes on where it stopped.

What another study has trained by the same recipe is taken over where its folder is given: whole runs, or their first stages.
"""

from __future__ import annotations

import json
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

from mipha.recipe import STAGES
from mipha.run import available_cores, create_run, open_run
from mipha.studies.findings import compared_by
from mipha.studies.folder import Job, claim, is_trained, jobs_of, runs_in
from mipha.studies.sharing import adopt_pretrain, adopt_run, pretrain_donor
from mipha.studies.study import Measured, Scale, Study, pretrain_digest

console = Console()

_LOOK_EVERY = 5.0
"""Seconds between looks into every run for the bar: on two cores more often would be felt."""


def run_study(
    study: Study,
    scale: str,
    out: str | Path,
    seeds: int | None = None,
    slots: int = 1,
    slurm: dict[str, Any] | None = None,
    share: Sequence[str | Path] = (),
) -> Path:
    """Train and evaluate the runs that are missing.

    Args:
        study: What is compared.
        scale: `mini` or `paper`.
        out: Folder of this study; the same one goes on where it stopped.
        seeds: Repeats of every variant; null: as the study says. More of them may be asked for later.
        slots: Runs at a time; with several GPUs each run sees one of them.
        slurm: Parameters of a SLURM job for submitit, a job a run, in place of processes on this machine.
        share: Folders of other studies, whose runs and first stages of the same recipes are taken over in place of being trained again.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: A folder to share from holds no study.
        ValueError: The folder holds another study, a run in it was made with another recipe, or a benchmark has no such metric.
        RuntimeError: Runs failed; names their logs. The others were finished.
    """
    size, out = study.scale(scale), Path(out)
    for wanted in size.evaluate:
        compared_by(wanted)  # known before anything is trained
    others = [job for folder in share for job in runs_in(Path(folder))]
    claim(study, scale, out)
    jobs = jobs_of(study, scale, out, seeds or size.seeds)
    donors = {
        other.recipe.digest(): other.folder for other in reversed(others) if is_trained(other)
    }  # the first of several
    for job in jobs:
        if not job.folder.exists() and (donor := donors.get(job.recipe.digest())):
            adopt_run(donor, job.folder)
        create_run(
            job.folder, job.recipe
        )  # refuses a run of another recipe, before anything is trained
    missing = [job for job in jobs if not _is_done(job, size)]
    console.print(f"{study.title}: {len(jobs)} runs, {len(jobs) - len(missing)} of them done")
    with _progress(jobs) as watch:
        failed = _run_all(
            missing,
            [*jobs, *others],
            lambda job, environment: (make, job, study, scale, out, environment),
            slots,
            slurm,
            out / "logs",
            watch,
        )
    if failed:
        logs = ", ".join(str(_log(out, job)) for job in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(jobs)} runs failed: see {logs}, mend it and run the same command again"
        )
    return out


def make(job: Job, study: Study, scale: str, out: Path, environment: dict[str, str]) -> None:
    """Train, evaluate and question one run in processes of its own: what one leaves in memory is not the next one's.

    Raises:
        CalledProcessError: It failed; the log says why.
    """
    program = [sys.executable, "-m"]
    commands = (
        []
        if is_trained(job)
        else [["mipha", "train", str(job.folder / "recipe.yaml"), "-o", str(job.folder)]]
    )
    size = study.scale(scale)
    for wanted in (wanted for wanted in size.evaluate if not _is_measured(job.folder, wanted)):
        options = {
            "--data-root": wanted.data_root,
            "--split": wanted.split,
            "--limit": wanted.limit,
        }
        given = [
            part
            for key, value in options.items()
            if value is not None
            for part in (key, str(value))
        ]
        commands.append(["mipha", "evaluate", str(job.folder), "-b", wanted.benchmark, *given])
    if _wants_panel(job, size):
        commands.append(["mipha.studies.panel", str(job.folder), str(out / "study.yaml"), scale])
    log = _log(out, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for command in commands:
            subprocess.run(
                [*program, *command],
                check=True,
                stdout=file,
                stderr=file,
                env=os.environ | environment,
            )


def _is_done(job: Job, size: Scale) -> bool:
    return (
        is_trained(job)
        and not _wants_panel(job, size)
        and all(_is_measured(job.folder, wanted) for wanted in size.evaluate)
    )


def _wants_panel(job: Job, size: Scale) -> bool:
    """Whether it has yet to answer the panel; one run of each variant speaks for it."""
    return bool(size.panel) and job.seed == 0 and not (job.folder / "panel.jsonl").is_file()


def _is_measured(folder: Path, wanted: Measured) -> bool:
    """Whether the benchmark's scores are there, over as many questions as the study asks."""
    for file in (folder / "evaluation").glob("*/scores.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
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
    jobs: list[Job],
    every: list[Job],
    call: Callable[[Job, dict[str, str]], tuple],
    slots: int,
    slurm: dict[str, Any] | None,
    logs: Path,
    watch: Callable[[], None],
) -> list[Job]:
    """Run jobs, each when a slot is free and its first stage is its own to train or is there to be shared; returns the failed ones."""
    waiting, failed = list(jobs), []
    running: dict[Any, tuple[Job, str | None]] = {}
    gpus = _gpus(slots) if slurm is None else []
    with _executor(slots, slurm, logs) as submit:
        while waiting or running:
            for job in waiting[:]:
                if slurm is None and len(running) >= slots:
                    break
                if not open_run(job.folder).is_finished("pretrain"):
                    if donor := pretrain_donor(job, every):
                        adopt_pretrain(donor.folder, job.folder)
                    elif any(
                        pretrain_digest(other.recipe) == pretrain_digest(job.recipe)
                        for other, _ in running.values()
                    ):
                        continue  # being made: it will be shared
                gpu = gpus.pop() if gpus else None
                environment = _threads(slots) if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
                running[submit(*call(job, environment))] = (job, gpu)
                waiting.remove(job)
            time.sleep(0.5)
            for future in [future for future in running if future.done()]:
                job, gpu = running.pop(future)
                gpus += [gpu] if gpu is not None else []
                if future.exception():
                    failed.append(job)
            watch()
    return failed


def _gpus(slots: int) -> list[str]:
    """The GPU of each slot, where every run is to see one of several."""
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


def _threads(slots: int) -> dict[str, str]:
    """Runs side by side on a CPU share its cores: with all of them each, they would wait for one another."""
    if slots == 1:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, available_cores() // slots))}


@contextmanager
def _executor(slots: int, slurm: dict[str, Any] | None, logs: Path) -> Iterator[Callable[..., Any]]:
    """What starts a job: a thread that waits for its processes, or SLURM."""
    if slurm is None:
        with ThreadPoolExecutor(slots) as pool:
            yield pool.submit
        return
    yield _submitit(slurm, logs / "slurm").submit


def _submitit(parameters: dict[str, Any], folder: Path) -> Any:
    """SLURM, or where there is none processes of this machine."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "SLURM jobs need submitit: pip install 'mipha-vlm[slurm]'", name="submitit"
        ) from error
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
    """A bar over the whole study; the time that is left follows from the pace of this start."""
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
        look()  # what was finished since


def _share_done(job: Job) -> float:
    """How much of a run's training is done, by its optimizer steps where the recipe says how many there are."""
    run = open_run(job.folder)
    if is_trained(job):
        return 1.0
    planned = sum(getattr(job.recipe.stages, stage).max_steps or 0 for stage in STAGES)
    if not planned:
        return 0.0
    files = [path for path in map(run.metrics, STAGES) if path.is_file()]
    return min(
        1.0, sum(path.read_bytes().count(b"\n") for path in files) / planned
    )  # lines are counted, not read
