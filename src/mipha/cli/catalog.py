"""The verbs that show what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mipha.cli.data import ImageRoot, RecipeName, Root, Stage, show_row


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


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="A recipe (name or .yaml), a vision tower or a language model; with --row, data."
        ),
    ],
    row: Annotated[
        int | None, typer.Option(help="Show this row of a data set, from 0, as the model sees it.")
    ] = None,
    recipe: RecipeName = None,
    stage: Stage = None,
    root: Root = None,
    image_root: ImageRoot = None,
) -> None:
    """Show a recipe in full, a part's catalog entry, or one row of a data set."""
    if row is not None:
        show_row(name, row, recipe, stage, root, image_root)
        return
    from dataclasses import asdict

    import yaml

    from mipha.catalog.language_models import LANGUAGE_MODELS
    from mipha.catalog.vision_towers import VISION_TOWERS
    from mipha.lookup import did_you_mean
    from mipha.recipe import list_recipes, load_recipe

    if recipe is not None or root or image_root:
        raise ValueError(
            "--recipe, --root and --image-root are for a row of a data set: "
            "give --row too, or leave them out"
        )
    parts: dict[str, Any] = {**VISION_TOWERS, **LANGUAGE_MODELS}
    if name in parts:
        typer.echo(
            yaml.safe_dump({name: asdict(parts[name])}, sort_keys=False, width=120), nl=False
        )
    elif name in list_recipes() or name.endswith((".yaml", ".yml")):
        typer.echo(load_recipe(name).dump(), nl=False)
    else:
        raise ValueError(
            f"no recipe or part {name!r}: {did_you_mean(name, [*list_recipes(), *parts])}"
        )


def _catalog() -> dict[str, dict[str, str]]:
    """Kind to name to one line: what `list` prints."""
    from mipha.catalog.language_models import LANGUAGE_MODELS
    from mipha.catalog.vision_towers import VISION_TOWERS
    from mipha.evaluation.benchmark import BENCHMARKS, list_benchmarks
    from mipha.lookup import files_in
    from mipha.recipe import list_recipes, load_recipe
    from mipha.studies.study import list_studies, load_study

    datasets = Path(__file__).parents[1] / "data" / "datasets"
    return {
        "study": {name: load_study(name).title for name in list_studies()},
        "recipe": {name: load_recipe(name).description for name in list_recipes()},
        "vision tower": {name: entry.source for name, entry in VISION_TOWERS.items()},
        "language model": {name: entry.source for name, entry in LANGUAGE_MODELS.items()},
        "dataset": {
            name: _first_line(datasets / f"{name}.py") for name in files_in(datasets, ".py")
        },
        "benchmark": {name: _first_line(BENCHMARKS / f"{name}.py") for name in list_benchmarks()},
    }


def _first_line(module: Path) -> str:
    """First line of a module's docstring, read without importing it: a dataset's module may import torch."""
    import ast

    return (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").partition("\n")[
        0
    ]
