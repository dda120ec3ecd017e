"""The verbs that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipha.cli.arguments import Overrides, is_first


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
    if is_first():
        write_model_card(run.final_checkpoint(), run)
        typer.echo(f"trained {chosen.name}: {run.final_checkpoint()}")


def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder; the same one goes on where it stopped.")] = Path("runs/quickstart"),
    limit: Annotated[int | None, typer.Option(help="Ask the first N test questions only.")] = None,
) -> None:
    """Train, measure and try a small assistant on this machine."""
    from mipha.quickstart import quickstart as tour

    tour(out, overrides or [], limit)
