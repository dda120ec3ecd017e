"""Arguments that several verbs take, and who prints among several processes."""

from __future__ import annotations

import os
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


def is_first() -> bool:
    """Whether this process, of those that `torchrun` started, writes what is written once."""
    return os.environ.get("RANK", "0") == "0"
