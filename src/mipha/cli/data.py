"""The verbs that look at data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[
    str,
    typer.Argument(metavar="DATA", help="A file or folder (write ./name), or a data set's name."),
]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="Check tokens too, as this recipe would train on them."),
]
Stage = Annotated[str, typer.Option(help="The recipe's stage: pretrain or finetune.")]
ImageRoot = Annotated[
    list[Path] | None, typer.Option(help="Folder that images may lie in, beside the data's own.")
]


def check(
    data: Data,
    recipe: RecipeName = None,
    stage: Stage = "finetune",
    image_root: ImageRoot = None,
    against: Annotated[
        str | None,
        typer.Option(help="Evaluation data whose pictures and questions must not be in this."),
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
) -> None:
    """Check a whole data set, row by row, before it is trained on; exit code 1 if it has errors."""
    from rich.console import Console

    from mipha.data.check.fix import write_fixed
    from mipha.data.check.html import html_report
    from mipha.data.check.linter import check_data
    from mipha.data.check.report import json_report, text_report
    from mipha.data.check.source import data_recipe, open_source
    from mipha.files import write_whole

    source = open_source(data_recipe(data, image_root=image_root or ()))
    other = open_source(data_recipe(against)) if against else None
    result = check_data(source, **_tokens(recipe, stage), against=other, progress=True)
    Console().print(text_report(result))
    for path, report in ((json_out, json_report), (html, html_report)):
        if path:
            write_whole(path, report(result))
            typer.echo(f"written: {path}")
    if fix:
        fixed = write_fixed(result, fix)
        typer.echo(
            f"{fixed.num_kept:,} rows kept in {fixed.file}; what was changed: {fixed.list_file}"
        )
        if fixed.note:
            typer.echo(fixed.note)
    if result.num_errors:
        raise typer.Exit(1)


def show_row(
    data: str, row: int, recipe: str | None, stage: str, image_root: list[Path] | None
) -> None:
    """Print one sample as the model sees it, and write its images as the tower reads them."""
    from rich.console import Console

    from mipha.data.check.source import data_recipe, open_source
    from mipha.data.show import render, save_pixels, view_sample

    tokens = _tokens(recipe, stage)
    tokens.pop("seed", None)
    view = view_sample(open_source(data_recipe(data, image_root=image_root or ())), row, **tokens)
    Console().print(render(view))
    for path in save_pixels(view, Path(".")):
        typer.echo(f"as the tower reads it: {path}")


def _tokens(name: str | None, stage: str) -> dict[str, Any]:
    """What the checks of tokens need: nothing without a recipe."""
    if name is None:
        return {}
    from mipha.recipe import STAGES, load_recipe

    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}: choose {' or '.join(STAGES)}")
    recipe = load_recipe(name)

    from mipha.models.build import load_parts_processor

    return {
        "stage": getattr(recipe.stages, stage),
        "processor": load_parts_processor(recipe.model),
        "seed": recipe.seed,
    }
