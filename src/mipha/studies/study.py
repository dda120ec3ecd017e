"""A study: a base recipe, what is varied of it, how it is measured, and what the paper concluded; one strict YAML file.

    load_study("freezing") -> Study -> .variants("mini") -> the recipes to train

Two scales of one question: `paper` for GPUs and published weights, `mini` for two CPU cores and the quickstart's real parts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mipha.lookup import did_you_mean, files_in, read_named
from mipha.recipe import Recipe, load_recipe
from mipha.validation import validated

STUDIES = Path(__file__).parents[1] / "catalog" / "studies"

ScaleName = Literal["mini", "paper"]
Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Numbers(_Strict):
    """A numeric axis: one recipe key at several values, drawn as a curve."""

    key: str = Field(description="recipe key, such as stages.finetune.learning_rate")
    values: tuple[float | int, ...] = Field(min_length=2)


Axis = dict[str, tuple[str, ...]] | Numbers
"""Name of a choice to the recipe overrides that make it; or numbers."""


class Measured(_Strict):
    """One benchmark that every variant is asked."""

    benchmark: str
    data_root: Path | None = Field(None, description="its folder; null: the packaged copy")
    split: str | None = None
    limit: int | None = Field(None, ge=1, description="the first N questions only")
    metric: str | None = Field(
        None, description="what the variants are compared by; null: the benchmark's first"
    )


class Takeaway(_Strict):
    """What the paper concluded, as a statement about variants that runs can bear out or not.

    Exactly one of: `better` (each of them, than each of `than`), `on_par` (these two), `not_better` (each of them, than each of `than`).
    """

    claim: str
    source: str
    better: Names = ()
    not_better: Names = ()
    than: Names = ()
    on_par: Names = ()
    within: float = Field(
        2.0,
        gt=0,
        description="on par, or not better: differences up to this count as none, in the metric's unit",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Takeaway:
        if sum(map(bool, (self.better, self.not_better, self.on_par))) != 1:
            raise ValueError("a takeaway has exactly one of better, not_better and on_par")
        if bool(self.than) != bool(self.better or self.not_better):
            raise ValueError("`than` goes with better or not_better, and on_par has none")
        if self.on_par and len(self.on_par) != 2:
            raise ValueError("on_par names two variants")
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons that it is about."""
        return (
            [self.on_par]
            if self.on_par
            else list(itertools.product(self.better or self.not_better, self.than))
        )  # type: ignore[list-item]


class Question(_Strict):
    """One cell of the qualitative panel: every variant's answer stands side by side."""

    image: str = Field(
        description="a file, or `benchmark:N`: the picture of question N, from 0, of a benchmark that is measured"
    )
    question: str | None = Field(None, description="null: the benchmark's own")
    kind: str = Field(description="what it tests: counting, OCR, description ...")


class Scale(_Strict):
    """One size of the study."""

    recipe: str = Field(description="the base recipe")
    overrides: tuple[str, ...] = ()
    axes: dict[str, Axis] = Field(min_length=1)
    evaluate: tuple[Measured, ...] = Field(min_length=1)
    seeds: int = Field(1, ge=1)
    takeaways: tuple[Takeaway, ...] = ()
    panel: tuple[Question, ...] = ()
    note: str = Field("", description="what this scale can say, and what it cannot")


class Study(_Strict):
    """One experiment of the paper, at one or two scales."""

    name: str
    title: str
    source: str
    scales: dict[ScaleName, Scale] = Field(min_length=1)

    def scale(self, name: str) -> Scale:
        """One size of it.

        Raises:
            ValueError: The study has no such scale.
        """
        if name not in self.scales:
            raise ValueError(
                f"study {self.name!r} has no scale {name!r}: {did_you_mean(name, list(self.scales))}"
            )
        return self.scales[name]  # type: ignore[index]

    def variants(self, scale: str) -> list[Variant]:
        """Every combination of the axes' choices, as recipes with seed 0.

        Raises:
            ValueError: An override does not fit the recipe, or two variants are one.
        """
        size = self.scale(scale)
        base = load_recipe(size.recipe).override(*size.overrides)
        found: list[Variant] = []
        for choice in itertools.product(
            *(_choices(axis, values) for axis, values in size.axes.items())
        ):
            name = "-".join(label for label, _, _ in choice)
            try:
                recipe = base.override(
                    *(override for _, overrides, _ in choice for override in overrides)
                )
            except ValueError as error:
                raise ValueError(
                    f"study {self.name}, scale {scale}, variant {name}: {error}"
                ) from error
            same = next(
                (
                    other
                    for other in found
                    if other.recipe.digest() == recipe.digest() or other.name == name
                ),
                None,
            )
            if same:
                raise ValueError(
                    f"study {self.name}, scale {scale}: variants {same.name} and {name} are the same: remove one"
                )
            number = next((value for _, _, value in choice if value is not None), None)
            found.append(Variant(name, recipe, number))
        for takeaway in size.takeaways:
            for unknown in {name for pair in takeaway.pairs for name in pair} - {
                variant.name for variant in found
            }:
                known = [variant.name for variant in found]
                raise ValueError(
                    f"takeaway {takeaway.claim!r}: scale {scale} has no variant {unknown!r}; {did_you_mean(unknown, known)}"
                )
        return found

    def digest(self, scale: str) -> str:
        """Twelve hex digits of what is trained and asked at a scale, whatever is then said of it and however many seeds there are."""
        said_only = {
            "seeds": True,
            "takeaways": True,
            "panel": True,
            "note": True,
            "evaluate": {"__all__": {"metric"}},
        }
        content = self.scale(scale).model_dump(mode="json", exclude=said_only)
        content["recipes"] = [variant.recipe.digest() for variant in self.variants(scale)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Variant:
    """One point of the design space.

    Args:
        name: From the axes' choices.
        recipe: What is trained, with seed 0.
        number: Its value on a numeric axis.
    """

    name: str
    recipe: Recipe
    number: float | None = None

    def with_seed(self, seed: int) -> Recipe:
        """Its recipe for one of the repeats."""
        return self.recipe.override(f"seed={self.recipe.seed + seed}")


def pretrain_digest(recipe: Recipe) -> str:
    """Twelve hex digits that name what the first stage makes: two recipes that agree in these share it."""
    content = recipe.model_dump(mode="json", include={"seed", "precision", "model"})
    content["pretrain"] = recipe.stages.pretrain.model_dump(mode="json")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def list_studies() -> list[str]:
    """Names of the catalog's studies."""
    return files_in(STUDIES, ".yaml")


def load_study(name: str | Path) -> Study:
    """Read a study of the catalog, or a YAML file.

    Raises:
        FileNotFoundError: Neither a catalog name nor a file.
        ValueError: The file is not a valid study; the message names each key.
    """
    tree, path = read_named(name, STUDIES, "study")
    return validated(Study, tree, str(path), "study")


def _choices(axis: str, values: Axis) -> list[tuple[str, tuple[str, ...], Any]]:
    """(label, overrides, number) of every choice of an axis."""
    if isinstance(values, Numbers):
        return [(f"{axis}={value:g}", (f"{values.key}={value}",), value) for value in values.values]
    return [(label, overrides, None) for label, overrides in values.items()]
