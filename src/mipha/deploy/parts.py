"""What a model was made of, as far as it is known: for its card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.catalog.vision_towers import VISION_TOWERS
from mipha.recipe import Recipe

_HUB_LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0"}
"""The hub's identifiers of licences that a tower and a language model of the catalog share; it calls a mixture `other`."""


@dataclass(frozen=True)
class Part:
    """What a model was made of.

    Args:
        role: vision tower or language model.
        name: As the recipe says it, a local folder by its last name.
        hub_id: Where the hub has it; None where it does not, or nothing is known.
        licence: Of its weights; None where nothing is known.
        source: Who published it; empty where nothing is known.
    """

    role: str
    name: str
    hub_id: str | None
    licence: str | None
    source: str


def parts_of(config: dict[str, Any], recipe: Recipe | None) -> list[Part]:
    """The parts that the recipe names; without one, the kinds that the config tells of."""
    if recipe is None:
        kinds = {"vision tower": config["vision_config"], "language model": config["text_config"]}
        return [
            Part(role, f"a {kind.get('model_type')}", None, None, "")
            for role, kind in kinds.items()
        ]
    found = []
    for role, name, catalog in (
        ("vision tower", recipe.model.vision_tower, VISION_TOWERS),
        ("language model", recipe.model.language_model, LANGUAGE_MODELS),
    ):
        entry = catalog.get(name)
        path = entry.path if entry else name
        hub_id = (
            path
            if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).is_dir()
            else None
        )
        known = (entry.licence, entry.source) if entry else (None, "")
        found.append(Part(role, without_folders(name) if hub_id is None else name, hub_id, *known))
    return found


def hub_licence(parts: Sequence[Part]) -> str:
    """The hub's identifier for a model of these parts: theirs where they have the same, `other` where not."""
    licences = {part.licence for part in parts}
    if None in licences:
        return "unknown"
    (one, *more) = licences
    return "other" if more else _HUB_LICENCES.get(str(one), "other")


def without_folders(value: Any) -> Any:
    """A tree of plain values in which every path of this machine is its last name: a card is public."""
    if isinstance(value, dict):
        short: dict[Any, Any] = {}
        for key, inner in value.items():
            name = without_folders(key)
            while name in short:  # files of one name in two folders
                name += "'"
            short[name] = without_folders(inner)
        return short
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    return (
        Path(value).name if isinstance(value, str) and re.match(r"(/|~|\.\.?/)", value) else value
    )
