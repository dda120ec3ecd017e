"""The tour: train, measure, show examples; on easy-VQA, or on photographs of one's own.

It runs the same commands that a user would type.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mipha.api import check_training
from mipha.comparison.figures import contact_sheet
from mipha.data.images import open_image
from mipha.evaluation.benchmark import Question, load_benchmark
from mipha.evaluation.predict import read_predictions
from mipha.files import cache_folder, read_json_object, write_whole
from mipha.photographs import TUXPAINT, split_photographs, tuxpaint_photographs
from mipha.photographs import Split as PhotographSplit
from mipha.preflight import check_writable
from mipha.processes import child_environment
from mipha.recipe import DataRecipe, Recipe, load_recipe
from mipha.run import Run, available_cores
from mipha.terminal import Console

BENCHMARK = "easy_vqa"
BEFORE_LIMIT = 2000
"""Questions that the model is asked before its last stage, when it rambles: enough to tell a few
percent from a hundred."""


SHOWN_SHARE = 0.005
"""Share of the images that are held out to be asked about while the model trains: some 16."""

MOST_PROCESSES = 4
"""Processes that ask the test questions; each holds the model, about 1 GB."""

_TORCHRUN = """
import sys
from mipha.processes import end_with_parent
end_with_parent()
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except SignalException:
    sys.exit(130)
except ChildFailedError as error:
    sys.exit(max(1, error.get_first_failure()[1].exitcode))
"""
"""torchrun that ends with the tour, and without a traceback: its processes say what went wrong."""


@dataclass(frozen=True)
class Phase:
    """One command of the tour.

    Args:
        command: Arguments of `mipha`.
        processes: Processes that share the work, started by torchrun where there are several.
    """

    name: str
    command: tuple[str, ...]
    processes: int = 1

    @property
    def shown(self) -> str:
        """The command as a user types it."""
        return shlex.join(
            [*(["torchrun", *self._options, "-m"] if self._options else []), "mipha", *self.command]
        )

    @property
    def arguments(self) -> list[str]:
        """The command as it is run, with this Python."""
        start = ["-c", _TORCHRUN, *self._options, "-m"] if self._options else ["-m"]
        return [sys.executable, *start, "mipha", *self.command]

    @property
    def _options(self) -> list[str]:
        several = ["--standalone", "--nproc-per-node", str(self.processes)]
        return several if self.processes > 1 else []


def quickstart(
    folder: Path,
    overrides: Sequence[str] = (),
    limit: int | None = None,
    baselines: bool = False,
) -> None:
    """Train the quickstart recipe, evaluate it, and sum up.

    Args:
        folder: Run folder; started again, the tour goes on where it stopped.
        overrides: Recipe overrides for all trainings.
        limit: Ask the first N test questions only.
        baselines: Also ask the model before its last stage, and train and ask a blind one.
    """
    recipe = load_recipe("quickstart").override(*overrides)
    check_training(recipe.override(*_watching(recipe)), folder)
    console, ledger = Console(), folder / "quickstart.json"
    for phase in phases(folder, overrides, limit, baselines):
        _run_phase(phase, ledger, console)
    _sum_up(folder, console)


def phases(
    folder: Path, overrides: Sequence[str], limit: int | None, baselines: bool = False
) -> list[Phase]:
    """Return the commands of the tour, in order.

    Raises:
        ValueError: An override does not fit the recipe.
    """
    recipe = load_recipe("quickstart").override(*overrides)
    last, blind = recipe.last_stage, str(folder / "blind")

    # Questions are shared by processes of one thread each: threads of one process wait for one
    # another in each of thousands of small products.
    processes = min(available_cores(), MOST_PROCESSES)
    dtype = ("--dtype", "bfloat16") if _computes_in_bfloat16() else ()
    some = ("-b", BENCHMARK, "--batch-size", "128", *dtype)
    ask = (*some, *(("--limit", str(limit)) if limit else ()))

    found = [
        Phase("train", ("train", "quickstart", "-o", str(folder), *overrides, *_watching(recipe))),
        Phase("evaluate", ("evaluate", str(folder), *ask), processes),
    ]
    if not baselines:
        return found

    if before := recipe.stage_before(last):
        few = (*some, "--limit", str(min(limit or BEFORE_LIMIT, BEFORE_LIMIT)))
        model, out = str(Run(folder).checkpoint(before)), str(folder / f"before-{last}")
        command = ("evaluate", model, *few, "-o", out)
        found.append(Phase(f"evaluate before {last}", command, processes))
    return [
        *found,
        Phase("train blind", ("train", "quickstart-blind", "-o", blind, *overrides)),
        Phase("evaluate blind", ("evaluate", blind, *ask, "--blind"), processes),
    ]


def _watching(recipe: Recipe) -> list[str]:
    """Return overrides with which each stage shows what the model says about a few held-out images.

    At the end of a stage, and every 30 steps of the last one.
    """
    quiet = [name for name, stage in recipe.stages.items() if not stage.held_out]
    found = [f"stages.{name}.held_out={SHOWN_SHARE}" for name in quiet]
    if recipe.last_stage in quiet:
        found.append(f"stages.{recipe.last_stage}.validate_every=30")
    return found


def photographs(photos: str, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Train on photographs of one's own, ask about those that were kept out, and sum up.

    Args:
        photos: Folder of images with captions beside them or with a metadata file; or `tuxpaint`,
            the photographs of a Debian package.
        folder: Folder of the split, the run and the contact sheet; started again, the tour goes
            on where it stopped.
        overrides: Recipe overrides.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds too few photographs or faulty ones, or an override does not fit.
    """
    recipe = load_recipe("photos").override(*overrides)
    check_writable(folder)
    source = tuxpaint_photographs(cache_folder()) if photos == TUXPAINT else Path(photos)
    split = split_photographs(source, folder / "data")

    console, run, roots = Console(), Run(folder / "run"), f"image_root={source.resolve()}"
    data = [
        value
        for stage in recipe.stages
        for value in (f"data.{stage}={split.train.resolve()}", f"data.{stage}.{roots}")
    ]
    check_training(recipe.override(*data), run.folder)
    test = ("--data", str(split.test), "--image-root", str(source), "--metric", "exact")
    for phase in (
        Phase("check", ("check", str(source))),
        Phase("train", ("train", "photos", "-o", str(run.folder), *data, *overrides)),
        Phase("evaluate", ("evaluate", str(run.folder), *test, "--max-new-tokens", "32")),
    ):
        _run_phase(phase, folder / "quickstart.json", console)
    _sum_up_photographs(split, source, run, folder, console)


def _sum_up_photographs(
    split: PhotographSplit, source: Path, run: Run, folder: Path, console: Console
) -> None:
    """Print the share of right answers to each question, and draw right and wrong ones."""
    from mipha.evaluation.own_data import plan_own_data
    from mipha.own_data import normalised

    data = DataRecipe(dataset="auto", root=split.test, image_root=(source,))
    questions = plan_own_data(data, "exact").questions
    predictions = read_predictions(run.evaluation(split.test.stem))
    right = {
        question.id: any(
            normalised(predictions[question.id]) == normalised(answer)
            for answer in question.facts["answers"]
        )
        for question in questions
    }

    # A row for each question that is asked often.
    table = Table(title="\nPhotographs that were kept out of training", title_justify="left")
    table.add_column("question")
    for column in ("right %", "most frequent answer %", "photographs"):
        table.add_column(column, justify="right")
    asked: dict[str, list[Question]] = {}
    for question in questions:
        asked.setdefault(question.text, []).append(question)
    for text, same in sorted(asked.items(), key=lambda item: -len(item[1]))[:5]:
        gold = Counter(normalised(question.facts["answers"][0]) for question in same)
        shares = [sum(right[question.id] for question in same), gold.most_common(1)[0][1]]
        cells = [f"{100 * share / len(same):.1f}" for share in shares]
        table.add_row(Text(text), *cells, str(len(same)))
    console.print(table)
    console.print(_cost_table(read_json_object(folder / "quickstart.json")))

    # As many right answers as wrong ones, spread over the question that has most of both.
    def rarer(same: Sequence[Question]) -> int:
        num_right = sum(right[question.id] for question in same)
        return min(num_right, len(same) - num_right)

    mixed = [same for same in asked.values() if rarer(same)]
    shown = max(mixed, key=rarer, default=questions)
    examples = [
        question
        for group in (True, False)
        for question in _spread([q for q in shown if right[q.id] is group], 5)
    ]
    sheet = folder / "contact-sheet.png"
    contact_sheet(
        [(open_image(q.image), q.text, predictions[q.id], q.facts["answers"][0]) for q in examples],
        sheet,
    )
    console.print(f"\ncontact sheet: {sheet}", soft_wrap=True)
    _print_next(run.folder, examples[0].image, console)


def _spread(items: Sequence[Any], num: int) -> list[Any]:
    """Return some items, chosen by place and not by success."""
    num = min(num, len(items))
    return [items[place * len(items) // num] for place in range(num)]


def _computes_in_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16; torch is not needed to ask."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "avx512_bf16" in flags.read_text(encoding="utf-8")


def _run_phase(phase: Phase, ledger: Path, console: Console) -> None:
    """Run a command in a process of its own, and add its time and peak memory to the ledger."""
    done = read_json_object(ledger) if ledger.is_file() else {}
    record = done.get(phase.name, {"seconds": 0.0, "peak_memory_gib": 0.0, "finished": False})
    if record["finished"]:
        return

    # Run it, and wait for it also after an interrupt.
    console.print(Text(f"\n$ {phase.shown}", style="bold"), soft_wrap=True)
    started = time.monotonic()
    threads = {"OMP_NUM_THREADS": "1", "LOGLEVEL": "ERROR"} if phase.processes > 1 else {}
    child = subprocess.Popen(phase.arguments, env=os.environ | child_environment() | threads)
    interrupted = False
    while True:
        try:
            _, status, usage = os.wait4(child.pid, 0)
            break
        except KeyboardInterrupt:  # the command got it too, and saves before it ends
            interrupted = True

    # Write down its time and memory.
    child.returncode = os.waitstatus_to_exitcode(status)
    record["seconds"] += time.monotonic() - started
    record["peak_memory_gib"] = max(
        record["peak_memory_gib"], usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    )
    record["finished"] = child.returncode == 0
    if ledger.parent.is_dir():
        write_whole(ledger, json.dumps(done | {phase.name: record}, indent=2) + "\n")

    if interrupted or child.returncode == 130:
        raise KeyboardInterrupt
    if child.returncode:
        raise ValueError(
            f"`{phase.shown}` ended with exit code {child.returncode}: "
            "its message is above; fix the cause and start again"
        )


def _sum_up(folder: Path, console: Console) -> None:
    """Print scores, costs and examples, and draw the contact sheet."""
    run = Run(folder)
    console.print(_score_table(run))
    console.print(_cost_table(read_json_object(folder / "quickstart.json")))

    # A few questions with their answers, printed and drawn.
    examples = _examples(
        load_benchmark(BENCHMARK).questions(None, "test"),
        read_predictions(run.evaluation(BENCHMARK)),
    )
    for question, text in examples:
        published = f"[dim](published: {question.facts['answer']})"
        console.print(f"{question.image.name:>9}  {question.text}  [bold]{text}[/]  {published}")
    sheet = folder / "contact-sheet.png"
    contact_sheet(
        [
            (open_image(question.image), question.text, text, question.facts["answer"])
            for question, text in examples
        ],
        sheet,
    )

    # Say where everything is, and the next commands.
    curves = ", ".join(str(run.stage(stage) / "loss.png") for stage in run.recipe.stages)
    console.print(f"\ncontact sheet: {sheet}\nloss curves:   {curves}", soft_wrap=True)
    _print_next(folder, examples[0][0].image, console)


def _print_next(run: Path, image: Any, console: Console) -> None:
    """Print the three commands that one is likely to want now."""
    program = Path(sys.executable).with_name("mipha")
    program = os.path.relpath(program) if program.is_file() else f"{sys.executable} -m mipha"
    for title, command in (
        ("Talk to it", ("chat", str(run), "--image", str(image))),
        ("Serve it, with a web page", ("serve", str(run))),
        (
            "Tune it on your own images (docs/own-data.md)",
            ("tune", str(run), "./pictures", "-o", "runs/mine"),
        ),
    ):
        line = f"\n{title}:\n  {program} {shlex.join(command)}"
        console.print(Text(line), soft_wrap=True)


def _score_table(run: Run) -> Table:
    """Return the model's scores, those of the baselines below them."""
    seen, last = _scores(run.evaluation(BENCHMARK)), run.recipe.last_stage
    asked = f"{seen['n_asked']:,} of {seen['num_questions']:,} questions"
    table = Table(title=f"\neasy-VQA, official test split: {asked}", title_justify="left")
    table.add_column("")
    for column in ("accuracy %", "95 % interval", "questions"):
        table.add_column(column, justify="right")

    for row in seen["scores"]:
        if row["unit"] == "%" and not row["metric"].startswith("answer_"):
            style = "bold" if row["metric"] == "accuracy" else ""
            table.add_row(row["metric"].replace("_", " "), *_cells(row), style=style)
    table.add_section()

    # Baselines: without a model, trained blind, before the last stage.
    for name, value in seen["baselines"].items():
        cells = (f"{value:.2f}", "", f"{seen['n_asked']:,}")
        table.add_row(f"baseline: {name.replace('_', ' ')}", *cells, style="dim")
    measured = {
        "same model trained blind": Run(run.folder / "blind").evaluation(f"{BENCHMARK}-blind"),
        f"before {last}": run.folder / f"before-{last}" / BENCHMARK,
    }
    for name, folder in measured.items():
        if not (folder / "scores.json").is_file():
            continue
        cells = _cells(_scores(folder)["scores"][0])
        table.add_row(f"baseline: {name}", *cells, style="dim")
    return table


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return a score, its interval and its number of questions as text."""
    return f"{row['value']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}", f"{row['n']:,}"


def _cost_table(ledger: dict[str, Any]) -> Table:
    """Return the time and memory of each command."""
    table = Table(title="\nTime and peak memory", title_justify="left")
    table.add_column("phase")
    for column in ("minutes", "GiB"):
        table.add_column(column, justify="right")
    for name, record in ledger.items():
        table.add_row(name, f"{record['seconds'] / 60:.1f}", f"{record['peak_memory_gib']:.2f}")
    return table


def _scores(folder: Path) -> dict[str, Any]:
    return read_json_object(folder / "scores.json")


def _examples(
    questions: Sequence[Question], predictions: dict[str, str], num: int = 5
) -> list[tuple[Question, str]]:
    """Return questions about images spread over the split, each of another kind in turn.

    They are chosen by place, not by success.
    """
    kinds = ("yes_no", "shape", "colour")
    by_image: dict[Any, list[Question]] = {}
    for question in questions:
        if question.id in predictions:
            by_image.setdefault(question.facts["image"], []).append(question)

    examples = []
    for number, asked in enumerate(_spread(list(by_image.values()), num)):
        kind = kinds[number % len(kinds)]
        question = next((one for one in asked if one.facts["kind"] == kind), asked[0])
        examples.append((question, predictions[question.id]))
    return examples
