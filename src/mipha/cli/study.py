"""The verbs of a study: `mipha study run`, `mipha study report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mipha.cli.arguments import parse_pairs
from mipha.cli.results import JudgeModel, JudgeReplies, JudgeUrl
from mipha.terminal import echo

if TYPE_CHECKING:
    from mipha.studies.runner import JudgeOptions
    from mipha.studies.study import Experiment

verbs = typer.Typer(
    help="Train and compare the variants of one of the paper's experiments, or of your own.",
    no_args_is_help=True,
)


@verbs.command()
def run(
    name: Annotated[str, typer.Argument(help="A study's name, or a .yaml file.")],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", help="The study's folder; the same one goes on where it stopped."
        ),
    ],
    scale: Annotated[
        str,
        typer.Option(
            help="mini: two CPU cores and the quickstart's parts; "
            "paper: GPUs and published weights."
        ),
    ] = "mini",
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Repeats of every variant; more may be asked for later."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at a time, a GPU each where there are several.")
    ] = 1,
    share: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Another study's folder: its runs of the same recipes are taken over.",
        ),
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A SLURM job a run: submitit's parameters, such as slurm_partition=gpu.",
        ),
    ] = None,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_replies: JudgeReplies = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check everything and list the runs.")
    ] = False,
) -> None:
    """Train and evaluate the missing runs, then write the report."""
    from mipha.api import run_study
    from mipha.studies.runner import JudgeOptions
    from mipha.studies.study import load_study

    parameters = parse_pairs(slurm, "--slurm", "slurm_partition=gpu") if slurm else None
    given = judge or judge_model or judge_replies
    options = JudgeOptions(judge, judge_model, judge_replies) if given else None
    if dry_run:
        _list_runs(load_study(name).at(scale), out, seeds, share or (), options)
        return
    folder = run_study(load_study(name), scale, out, seeds, jobs, parameters, share or (), options)
    for report in ("report.md", "report.html"):
        echo(f"written: {folder / report}")


def _list_runs(
    experiment: Experiment,
    out: Path,
    seeds: int | None,
    share: Sequence[Path],
    judge: JudgeOptions | None,
) -> None:
    """Print each run and what is to be done for it."""
    from rich.table import Table

    from mipha.studies.runner import list_runs
    from mipha.terminal import Console

    table = Table(box=None, pad_edge=False)
    for column in ("variant", "seed", "to do"):
        table.add_column(column, overflow="fold")
    for variant, seed, todo in list_runs(experiment, out, seeds, share, judge):
        table.add_row(variant, str(seed), todo)
    Console().print(table)
    echo("mipha plan tells the hours of a recipe; mipha show, the recipe and the overrides")


@verbs.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A study's folder; not all of its runs need be finished."
        ),
    ],
) -> None:
    """Write the report anew from the runs that are there."""
    from rich.markdown import Markdown

    from mipha.studies.folder import open_study
    from mipha.studies.report import write_report
    from mipha.terminal import Console

    text, page = write_report(open_study(folder), folder)
    Console().print(Markdown(text.read_text(encoding="utf-8")))
    echo(f"written: {text} and {page}")
