"""The verbs that look at data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mipha.cli.arguments import Overrides
from mipha.terminal import echo

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    from mipha.recipe import AnyStageRecipe, DataRecipe, Recipe

Data = Annotated[
    str | None,
    typer.Argument(
        metavar="DATA",
        help="A file, folder (write ./name) or address, or a data set's name; without it, with "
        "--recipe: the data of the recipe's stages.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="How DATA are read, as a recipe's data set says it, such as min_ratings.relevance=2.",
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="Check tokens too, as this recipe would train on them."),
]
Stage = Annotated[
    str | None,
    typer.Option(
        help="The recipe's stage; without it the last that learns from answers for DATA, and all "
        "without DATA."
    ),
]
Root = Annotated[
    str | None, typer.Option(help="Where a named data set lies, if not in its package.")
]
ImageRoot = Annotated[
    list[Path] | None, typer.Option(help="Folder that images may lie in, beside the data's own.")
]


def check(
    data: Data = None,
    settings: Settings = None,
    recipe: RecipeName = None,
    stage: Stage = None,
    root: Root = None,
    image_root: ImageRoot = None,
    against: Annotated[
        str | None,
        typer.Option(help="Evaluation data whose images and questions must not be in this."),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write every finding to a JSON file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with histograms and examples.")
    ] = None,
    fix: Annotated[
        Path | None, typer.Option(help="Write a cleaned copy, and a list of what was changed.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only read the I-th of N parts of the rows, into --facts; run all N, anywhere.",
        ),
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of what --shard found; without --shard: report on all of it.",
        ),
    ] = None,
) -> None:
    """Check a whole data set, row by row, before it is trained on; exit code 1 if it has errors."""
    from mipha.data.alignment import pairs_to_check
    from mipha.data.check.fix import write_fixed
    from mipha.data.check.html import html_report
    from mipha.data.check.linter import check_data, check_shard
    from mipha.data.check.report import json_report, text_report
    from mipha.data.check.rows import CheckInputs
    from mipha.data.check.shards import parse_shard
    from mipha.data.dataset import data_recipe, load_data
    from mipha.files import write_whole
    from mipha.recipe import DpoStageRecipe
    from mipha.terminal import Console

    # Find what to check, and as which stage.
    loaded = _load_recipe(recipe, stage)
    chosen: list[tuple[DataRecipe | Path, AnyStageRecipe | None]]
    if data is not None:
        each = _stage_of_data(loaded, stage) if loaded else None
        if isinstance(each, DpoStageRecipe):
            chosen = [(Path(data), each)]
        else:
            named = data_recipe(data, root, image_root or (), settings=settings or ())
            chosen = [(named, each)]
    elif loaded is None or root or image_root:
        raise ValueError("give DATA, or only --recipe NAME for the data of a recipe's stages")
    else:
        stages = [loaded.stages[stage]] if stage else loaded.stages.values()
        chosen = [(one, each) for each in stages for one in _data_of(each)]
    if len(chosen) > 1 and (json_out or html or fix or facts):
        raise ValueError(
            f"--json, --html, --fix and --facts are written for one data set, and {recipe} has "
            f"{len(chosen)}: name one as DATA, or a stage with --stage"
        )
    has_pairs = any(isinstance(one, Path) for one, _ in chosen)
    if has_pairs and (root or image_root or settings or fix or facts):
        raise ValueError(
            "--root, --image-root, KEY=VALUE, --fix, --shard and --facts have no effect on the "
            "pairs of a dpo stage: leave them out"
        )
    part = parse_shard(shard) if shard else None
    if part and (facts is None or json_out or html or fix):
        raise ValueError(
            "--shard writes the facts of a part of the rows into --facts DIR, and nothing else: "
            "give that, and ask for reports when all parts are there, without --shard"
        )

    # Read a part of the rows.
    processor = _processor(loaded)
    if part and facts:
        ((one, each),) = chosen
        assert not isinstance(one, Path) and not isinstance(each, DpoStageRecipe)
        inputs = CheckInputs(load_data(one), processor, each, near=against is not None)
        echo(f"written: {check_shard(inputs, part, facts, progress=True)}")
        return

    # Check one after another.
    other = load_data(data_recipe(against)) if against else None
    num_errors = 0
    for one, each in chosen:
        if isinstance(each, DpoStageRecipe):
            read, each = pairs_to_check(Path(str(one)), each.skip_empty), each.as_answers
        else:
            read = load_data(one)
        result = check_data(
            read,
            each,
            processor,
            seed=loaded.seed if loaded else 0,
            against=other,
            progress=True,
            folder=facts,
        )
        num_errors += result.num_errors
        Console().print(text_report(result))

        for path, report in ((json_out, json_report), (html, html_report)):
            if path:
                write_whole(path, report(result))
                echo(f"written: {path}")
        if fix:
            fixed = write_fixed(result, fix)
            echo(
                f"{fixed.num_kept:,} rows kept in {fixed.file}; what was changed: {fixed.list_file}"
            )
            if fixed.note:
                echo(fixed.note)
    if num_errors:
        raise typer.Exit(1)


def fetch(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a .yaml file.")],
    overrides: Overrides = None,
) -> None:
    """Copy all data of a recipe that lie behind addresses into the cache; says their size first."""
    from mipha.data.dataset import load_data
    from mipha.recipe import load_recipe

    loaded = load_recipe(recipe).override(*(overrides or ()))
    entries = [one for stage in loaded.supervised_stages.values() for one in stage.data]
    remote = {str(one.model_dump(mode="json")): one for one in entries if isinstance(one.root, str)}
    if not remote:
        echo(f"all data of {loaded.name} are local: nothing to fetch")
    for one in remote.values():
        data = load_data(one)
        parts = "" if one.cache_gb is None else "; the rows themselves are read in training"
        echo(f"{one.root}: {len(data):,} rows in {data.folder}{parts}")


def show_row(
    data: str,
    settings: list[str] | None,
    row: int,
    recipe: str | None,
    stage: str | None,
    root: str | None,
    image_root: list[Path] | None,
    out: Path,
) -> None:
    """Print one sample as the model sees it, and write its images as the tower reads them."""
    from mipha.data.dataset import data_recipe, load_data
    from mipha.data.show import render, save_pixels, view_sample
    from mipha.recipe import DpoStageRecipe
    from mipha.terminal import Console

    loaded = _load_recipe(recipe, stage)
    chosen = _stage_of_data(loaded, stage) if loaded else None
    if isinstance(chosen, DpoStageRecipe):
        raise ValueError(
            "--stage names a dpo stage, whose pairs `mipha check` alone shows (--html)"
        )
    rows = load_data(data_recipe(data, root, image_root or (), settings=settings or ()))
    processor = _processor(loaded)
    if loaded and chosen and processor:
        from mipha.models.processing import set_padding

        set_padding(processor, loaded.model, chosen)
    view = view_sample(rows, row, chosen, processor)
    Console().print(render(view))
    for path in save_pixels(view, out):
        echo(f"as the tower reads it: {path}")


def _load_recipe(name: str | None, stage: str | None) -> Recipe | None:
    """Load the recipe, if one is named, and check that it has the stage."""
    if name is None:
        return None
    from mipha.recipe import load_recipe

    recipe = load_recipe(name)
    if stage is not None:
        recipe.check_has_stage(stage)
    return recipe


def _stage_of_data(recipe: Recipe, stage: str | None) -> AnyStageRecipe:
    """Return the stage that DATA are for: the named one, else the last that learns from answers."""
    if stage is not None:
        return recipe.stages[stage]
    return [*recipe.stages.values(), *recipe.supervised_stages.values()][-1]


def _data_of(stage: AnyStageRecipe) -> Iterable[DataRecipe | Path]:
    """Return the data sets of a stage; the file of its pairs is one."""
    return [stage.data] if isinstance(stage.data, Path) else stage.data


def _processor(recipe: Recipe | None) -> LlavaProcessor | None:
    """Load what the checks of tokens need; nothing without a recipe."""
    if recipe is None:
        return None
    from mipha.models.build import load_start_processor

    return load_start_processor(recipe.model)
