"""`mipha align`: the language model before it meets images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipha.cli.arguments import Overrides
from mipha.terminal import echo

Recipe = Annotated[str, typer.Argument(help="An alignment recipe's name, or a .yaml file.")]
Out = Annotated[
    Path,
    typer.Option(
        "-o",
        "--out",
        help="The step's folder; the same recipe and folder go on where they stopped.",
    ),
]

verbs = typer.Typer(
    help="Tune a language model on instructions and preferences, before it meets images.",
    no_args_is_help=True,
)


@verbs.command()
def sft(recipe: Recipe, out: Out, overrides: Overrides = None) -> None:
    """Supervised fine-tuning on instructions (Alpaca's layout)."""
    _train("sft", recipe, out, overrides)


@verbs.command()
def reward(recipe: Recipe, out: Out, overrides: Overrides = None) -> None:
    """A reward model from which response is better (PKU-SafeRLHF's layout)."""
    _train("reward", recipe, out, overrides)


@verbs.command()
def cost(recipe: Recipe, out: Out, overrides: Overrides = None) -> None:
    """A cost model from which response is safer, and which are safe."""
    _train("cost", recipe, out, overrides)


@verbs.command()
def dpo(recipe: Recipe, out: Out, overrides: Overrides = None) -> None:
    """Direct preference optimization, of a language model or of a finished multimodal one."""
    _train("dpo", recipe, out, overrides)


@verbs.command()
def rlhf(recipe: Recipe, out: Out, overrides: Overrides = None) -> None:
    """PPO against a reward model."""
    _train("rlhf", recipe, out, overrides)


@verbs.command("safe-rlhf")
def safe_rlhf(recipe: Recipe, out: Out, overrides: Overrides = None) -> None:
    """PPO-Lagrangian against a reward and a cost model."""
    _train("safe-rlhf", recipe, out, overrides)


@verbs.command("list")
def list_names() -> None:
    """List the alignment recipes."""
    from mipha.alignment.recipe import list_alignment_recipes, load_alignment_recipe

    for name in list_alignment_recipes():
        echo(f"{name:28} {load_alignment_recipe(name).description}")


def _train(step: str, name: str, out: Path, overrides: list[str] | None) -> None:
    from mipha.alignment.recipe import load_alignment_recipe

    recipe = load_alignment_recipe(name).override(*(overrides or ()))
    if recipe.step != step:
        raise ValueError(
            f"{name} is a recipe for `mipha align {recipe.step}`, not {step}: "
            "use that verb, or another recipe"
        )

    from mipha.alignment import train_step

    echo(f"aligned: {train_step(recipe, out)}")
