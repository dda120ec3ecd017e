"""Arguments that several verbs take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mipha.lookup import read_yaml

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Recipe values to replace, such as seed=7."),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16 or float16; auto: bfloat16 on a GPU, float32 on a CPU."
    ),
]
Model = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of an exported model.")
]
Adapter = Annotated[
    Path | None,
    typer.Option(help="Adapter of this model, unmerged: a run, or a folder in PEFT's format."),
]


def split_names(groups: list[str] | None) -> list[str]:
    """Return the names of an option that takes them with commas, several times, or not at all."""
    return [name.strip() for group in groups or () for name in group.split(",") if name.strip()]


def parse_pairs(pairs: Sequence[str], option: str, example: str) -> dict[str, Any]:
    """Return the values of an option that takes KEY=VALUE several times, each value as YAML.

    Raises:
        ValueError: A pair has no `=`, or a value is not YAML.
    """
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"{option} {wrong[0]} has no `=`: write KEY=VALUE, such as {example}")
    split = (pair.split("=", 1) for pair in pairs)
    return {key: read_yaml(value, f"{option} {key}") for key, value in split}
