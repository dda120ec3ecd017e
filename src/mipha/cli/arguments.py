"""Arguments that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Recipe values to replace, such as seed=7."),
]
Model = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of an exported model.")
]


def split_names(groups: list[str] | None) -> list[str]:
    """Return the names of an option that takes them with commas, several times, or not at all."""
    return [name.strip() for group in groups or () for name in group.split(",") if name.strip()]
