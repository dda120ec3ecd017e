"""The verbs: parse, call one function, print. Torch is imported inside a verb, so `mipha --help` is instant."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mipha.cli_data import ImageRoot, RecipeName, Stage, check, show_row

if TYPE_CHECKING:
    from mipha.assistant import Assistant
    from mipha.evaluation.benchmark import Judge


class _Verbs(TyperGroup):
    """Every verb in one place that turns what a user can mend into one sentence, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own bars say what takes long
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\nstopped; run the same command again to go on", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            sentence = None if ctx.params.get("debug") else _sentence(error)
            if sentence is None:
                raise
            typer.echo(f"mipha: {sentence}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Verbs, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Recipe values to replace, such as seed=7.")]
Model = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of an exported model.")]
JudgeUrl = Annotated[
    str | None, typer.Option("--judge", help="Base URL of an OpenAI-compatible server that grades; key in $MIPHA_JUDGE_KEY.")
]
JudgeModel = Annotated[str | None, typer.Option(help="Name of the judge's model.")]
JudgeReplies = Annotated[Path | None, typer.Option(help="Recorded replies of a judge, in place of one.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", envvar="MIPHA_DEBUG", help="Show tracebacks.")] = False) -> None:
    """Build, train and evaluate multimodal small language models: a vision tower, a projector, a small language model."""


@app.command("list")
def list_names() -> None:
    """List recipes, parts, datasets and benchmarks."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("kind", "name", "what it is"):
        table.add_column(column, overflow="fold")
    for kind, entries in _catalog().items():
        for number, (name, text) in enumerate(entries.items()):
            table.add_row("" if number else kind, name, text)
    Console().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A recipe (name or .yaml), a vision tower or a language model; with --row, data.")],
    row: Annotated[int | None, typer.Option(help="Show this row of a data set, from 0, as the model sees it.")] = None,
    recipe: RecipeName = None,
    stage: Stage = "finetune",
    image_root: ImageRoot = None,
) -> None:
    """Show a recipe in full, a part's catalog entry, or one row of a data set."""
    if row is not None:
        show_row(name, row, recipe, stage, image_root)
        return
    from dataclasses import asdict

    import yaml

    from mipha.catalog.language_models import LANGUAGE_MODELS
    from mipha.catalog.vision_towers import VISION_TOWERS
    from mipha.lookup import did_you_mean
    from mipha.recipe import list_recipes, load_recipe

    if recipe is not None or image_root:
        raise ValueError("--recipe and --image-root are for a row of a data set: give --row too, or leave them out")
    parts: dict[str, Any] = {**VISION_TOWERS, **LANGUAGE_MODELS}
    if name in parts:
        typer.echo(yaml.safe_dump({name: asdict(parts[name])}, sort_keys=False, width=120), nl=False)
    elif name in list_recipes() or name.endswith((".yaml", ".yml")):
        typer.echo(load_recipe(name).dump(), nl=False)
    else:
        raise ValueError(f"no recipe or part {name!r}: {did_you_mean(name, [*list_recipes(), *parts])}")


app.command()(check)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a .yaml file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder; the same recipe and folder go on where they stopped.")],
    overrides: Overrides = None,
) -> None:
    """Train a recipe: pretrain, then finetune."""
    from mipha.recipe import load_recipe

    chosen = load_recipe(recipe).override(*(overrides or ()))

    from mipha.deploy.model_card import write_model_card
    from mipha.training.pipeline import train as train_recipe

    run = train_recipe(chosen, out)
    if _is_first():
        write_model_card(run.final_checkpoint(), run)
        typer.echo(f"trained {chosen.name}: {run.final_checkpoint()}")


@app.command()
def evaluate(
    run: Model,
    benchmarks: Annotated[list[str], typer.Option("-b", "--benchmarks", help="Names, with commas or several -b.")],
    data_root: Annotated[Path | None, typer.Option(help="The benchmark's folder; with several, the folder above them.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions a forward pass.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Ask the first N questions only.")] = None,
    split: Annotated[str | None, typer.Option(help="Another split than the benchmark's own.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where results go, if not into the run.")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Show grey in place of every picture.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the files, and show three prompts a benchmark.")] = False,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_replies: JudgeReplies = None,
) -> None:
    """Measure a model; exit code 1 if a question failed."""
    from mipha.deploy.model_card import write_model_card
    from mipha.evaluation.evaluate import evaluate as measure
    from mipha.evaluation.evaluate import plan
    from mipha.evaluation.tables import print_plan, print_results
    from mipha.run import open_run

    names = [name.strip() for group in benchmarks for name in group.split(",") if name.strip()]
    if dry_run:
        print_plan(plan(names, data_root, split), run)
        return
    grader = _judge(judge, judge_model, judge_replies, out or run)
    results = measure(run, names, data_root, batch_size, limit, split, out, blind=blind, judge=grader)
    print_results(results)
    if out is None and _is_first():
        evaluated = open_run(run)
        write_model_card(evaluated.final_checkpoint(), evaluated)  # with these scores
    if any(result.n_failed for result in results):
        raise typer.Exit(1)


@app.command()
def score(
    benchmark: Annotated[str, typer.Argument(help="A benchmark's name.")],
    annotations: Annotated[Path, typer.Option(help="Official annotation file, or the folder with the official files.")],
    predictions: Annotated[Path, typer.Option(help='A line {"question_id": ..., "text": ...} a question, in any order.')],
    json_out: Annotated[Path, typer.Option("--json", help="Where the scores go.")],
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_replies: JudgeReplies = None,
) -> None:
    """Score any model's predictions; needs neither the model nor the images."""
    import json

    from mipha.evaluation.benchmark import load_benchmark
    from mipha.evaluation.score import score_file
    from mipha.evaluation.tables import print_scored
    from mipha.run import write_whole

    grader = _judge(judge, judge_model, judge_replies, json_out.parent)
    content = score_file(load_benchmark(benchmark), annotations, predictions, grader)
    write_whole(json_out, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    print_scored(content)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run, a folder of results, or a file of `mipha score --json`.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The same, of the model to compare with.")],
    paired: Annotated[bool, typer.Option("--paired", help="Question by question; so far the only way, with or without this.")] = True,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the comparison to a file too.")] = None,
) -> None:
    """Compare two models on the questions that both answered: A minus B."""
    import json
    from dataclasses import asdict

    from mipha.evaluation.paired import compare_paired
    from mipha.evaluation.tables import print_paired
    from mipha.run import write_whole

    rows = compare_paired(first, second)
    if json_out:
        write_whole(json_out, json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    print_paired(rows)


@app.command("import")
def import_checkpoint(
    source: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="A released Mipha, or an original LLaVA-1.5-style checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="New folder for the standard checkpoint.")],
    vision_tower: Annotated[str | None, typer.Option(help="Folder or hub id of the tower, where the checkpoint only names one.")] = None,
) -> None:
    """Turn a released checkpoint into a standard one, every tensor accounted for."""
    from mipha.models.upstream import import_upstream

    typer.echo(str(import_upstream(source, out, vision_tower)))
    typer.echo(f"imported: {out}")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run, or a model folder.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the findings to a file too.")] = None,
) -> None:
    """Load a checkpoint without mipha and compare; exit code 1 if stock transformers does not give the same."""
    import json

    from mipha.deploy.verify import print_verification
    from mipha.deploy.verify import verify as verify_checkpoint
    from mipha.run import write_whole

    found = verify_checkpoint(checkpoint)
    if json_out:
        write_whole(json_out, json.dumps(found.as_json(), indent=2) + "\n")
    print_verification(found)
    raise typer.Exit(0 if found.exact else 1)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run or a model folder; with --merge an adapter folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="New folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="RUN is an adapter: write its base with the adapter in its weights.")] = False,
    base: Annotated[Path | None, typer.Option(help="With --merge: the base model, if not the one that the adapter names.")] = None,
) -> None:
    """Write a model folder with its card, ready for `hf upload`."""
    from mipha.deploy.model_card import export_for_hub, write_model_card

    if base is not None and not merge:
        raise ValueError("--base has no effect without --merge: leave it out")
    if merge:
        from mipha.models.adapters import merge_adapter

        merge_adapter(source, out, base)
        write_model_card(out)
    else:
        export_for_hub(source, out)
    typer.echo(f"exported: {out}")


@app.command()
def chat(run: Model, image: Annotated[Path | None, typer.Option(help="The picture to talk about.")] = None) -> None:
    """Talk about a picture; /image PATH, /reset and /quit."""
    from mipha.run import model_folder

    folder = model_folder(run)
    if image is not None and not image.is_file():
        raise FileNotFoundError(f"no image {image}: give the path of a picture")

    from mipha.assistant import load

    _converse(load(folder), image)


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder; the same one goes on where it stopped.")] = Path("runs/quickstart"),
    limit: Annotated[int | None, typer.Option(help="Ask the first N test questions only.")] = None,
) -> None:
    """Train, measure and try a small assistant on this machine."""
    from mipha.quickstart import quickstart as tour

    tour(out, overrides or [], limit)


def main() -> None:
    """Entry point of the `mipha` program."""
    app()


def _converse(assistant: Assistant, image: Path | None) -> None:
    """Read questions until /quit, the end of the input, or Ctrl-C; answers stream."""
    session = assistant.chat(image)
    typer.echo("ask something; /image PATH for another picture, /reset to forget the conversation, /quit to leave")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        verb, _, rest = line.partition(" ")
        path = Path(rest.strip().strip("'\"")).expanduser()
        if line == "/quit":
            return
        if line == "/reset":
            session = assistant.chat(image)
        elif verb == "/image" and path.is_file():
            image = path
            session = assistant.chat(image)
        elif verb == "/image":
            typer.echo(f"no image {path}")
        elif line.startswith("/"):
            typer.echo(f"no command {verb}: /image PATH, /reset or /quit")
        elif line:
            try:
                for piece in session.ask(line):
                    typer.echo(piece, nl=False)
                typer.echo()
            except (ValueError, FileNotFoundError) as error:
                typer.echo(str(error))
            except KeyboardInterrupt:
                # The answer is still being made behind our back: its half-filled cache must not be gone on with.
                session = assistant.chat(image)
                typer.echo("\n(stopped, and the conversation is forgotten)")


def _is_first() -> bool:
    """Whether this process, of those that `torchrun` started, writes what is written once."""
    return os.environ.get("RANK", "0") == "0"


def _judge(url: str | None, model: str | None, replies: Path | None, folder: Path) -> Judge | None:
    """The judge that the options ask for."""
    from mipha.evaluation.judge import Endpoint, Replay

    if replies is not None and url is not None:
        raise ValueError("--judge-replies and --judge are two judges: give one")
    if replies is not None:
        return Replay(replies)
    if url is None:
        return None
    if model is None:
        raise ValueError("--judge needs --judge-model, the name of a model that the server has")
    return Endpoint(url, model, os.environ.get("MIPHA_JUDGE_KEY"), record=folder / "judge-replies.jsonl")


def _catalog() -> dict[str, dict[str, str]]:
    """Kind to name to one line: what `list` prints."""
    from mipha.catalog.language_models import LANGUAGE_MODELS
    from mipha.catalog.vision_towers import VISION_TOWERS
    from mipha.evaluation.benchmark import BENCHMARKS, list_benchmarks
    from mipha.lookup import files_in
    from mipha.recipe import list_recipes, load_recipe

    datasets = Path(__file__).parent / "data" / "datasets"
    return {
        "recipe": {name: load_recipe(name).description for name in list_recipes()},
        "vision tower": {name: entry.source for name, entry in VISION_TOWERS.items()},
        "language model": {name: entry.source for name, entry in LANGUAGE_MODELS.items()},
        "dataset": {name: _first_line(datasets / f"{name}.py") for name in files_in(datasets, ".py")},
        "benchmark": {name: _first_line(BENCHMARKS / f"{name}.py") for name in list_benchmarks()},
    }


def _first_line(module: Path) -> str:
    """First line of a module's docstring, read without importing it: a dataset's module may import torch."""
    import ast

    return (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _sentence(error: Exception) -> str | None:
    """What went wrong, for what a user can mend; None for our own mistakes, which keep their traceback."""
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "").partition(".")[0] == "mipha":
            return None
        bare = str(error).startswith("No module named")
        return f"the package {error.name!r} is not installed: pip install {error.name}" if bare else str(error)
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or 'no space left'}): free some space and run the same command again to go on"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error)
    # Torch is not imported for the name's sake.
    if type(error).__name__ == "OutOfMemoryError":
        return "the accelerator's memory is full: lower --batch-size (evaluate), or micro_batch_rows or row_tokens (train)"
    return None
