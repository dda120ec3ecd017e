"""A study: a base recipe, its variants, their benchmarks, and the conclusions of the paper.

    load_study("freezing") -> Study -> .at("mini") -> Experiment -> .variants: recipes to train

Two scales of one question: `paper` for GPUs and published weights, `mini` for two CPU cores and the
quickstart's real parts. One strict YAML file, overridden like a recipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from mipha.comparison.results import published_table
from mipha.lookup import did_you_mean, files_in, read_named
from mipha.recipe import Recipe, RecipeBase, Strict, digest_of, load_recipe

STUDIES = Path(__file__).parents[1] / "catalog" / "studies"

ScaleName = Literal["mini", "paper"]
Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


class Numbers(Strict):
    """A numeric axis: one recipe key at several values, drawn as a curve."""

    key: str = Field(description="recipe key, such as stages.finetune.learning_rate")
    values: tuple[float | int, ...] = Field(min_length=2)


Axis = dict[str, tuple[str, ...]] | Numbers
"""Name of a choice to the recipe overrides that make it; or numbers."""


class Measured(Strict):
    """One benchmark that every variant is asked."""

    benchmark: str
    data_root: Path | None = Field(None, description="its folder; None: the packaged copy")
    split: str | None = None
    limit: int | None = Field(None, ge=1, description="the first N questions only")
    metric: str | None = Field(
        None, description="the metric that compares the variants; None: the benchmark's first"
    )


class Takeaway(Strict):
    """A conclusion of the paper, as a statement about variants that runs can support or refute.

    Exactly one of: `better` (each of them, than each of `than`), `not_better` (likewise), and
    `on_par` (these two).
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
        description="on par, or not better: differences up to this count as none, "
        "in the metric's unit",
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
        if self.on_par:
            first, second = self.on_par
            return [(first, second)]
        return list(itertools.product(self.better or self.not_better, self.than))


class PanelQuestion(Strict):
    """One cell of the qualitative panel: every variant's answer stands side by side."""

    image: str = Field(
        description="a file, or `benchmark:N`: the image of question N, from 0, "
        "of a benchmark that is measured"
    )
    question: str | None = Field(None, description="None: the benchmark's own")
    kind: str = Field(description="ability that it tests: counting, OCR, description ...")


class Beside(Strict):
    """A published table whose rows stand beside the scores of the variants."""

    table: int = Field(
        ge=1, le=4, description="table of the paper, see `mipha list published-table`"
    )
    rows: dict[str, str] = Field(min_length=1, description="variant to the name of its row")


class Scale(Strict):
    """One size of the study."""

    recipe: str = Field(description="the base recipe")
    overrides: tuple[str, ...] = ()
    axes: dict[str, Axis] = Field(min_length=1)
    evaluate: tuple[Measured, ...] = Field(min_length=1)
    seeds: int = Field(1, ge=1)
    takeaways: tuple[Takeaway, ...] = ()
    panel: tuple[PanelQuestion, ...] = ()
    beside: Beside | None = None
    times_first_token: bool = Field(
        False,
        description="measure the tokens of an image and the time to the first token of an answer, "
        "on one thread, for the first seed of each variant",
    )
    note: str = Field("", description="limits of this scale, for the report")


class Study(RecipeBase):
    """One experiment of the paper, at one or two scales."""

    kind: ClassVar[str] = "study"

    title: str
    source: str
    scales: dict[ScaleName, Scale] = Field(min_length=1)

    def at(self, scale: str) -> Experiment:
        """Return the study at one scale, with its variants.

        Raises:
            ValueError: The study has no such scale, an override does not fit the recipe, two
                variants are the same, or a takeaway or a published row names an unknown variant.
        """
        if scale not in self.scales:
            near = did_you_mean(scale, list(self.scales))
            raise ValueError(f"study {self.name!r} has no scale {scale!r}: {near}")
        asked = self.scales[scale]
        variants = _make_variants(asked, f"study {self.name}, scale {scale}")

        names = [variant.name for variant in variants]
        for takeaway in asked.takeaways:
            for name in itertools.chain(*takeaway.pairs):
                if name not in names:
                    raise ValueError(
                        f"takeaway {takeaway.claim!r}: scale {scale} has no variant {name!r}; "
                        f"{did_you_mean(name, names)}"
                    )
        if asked.beside is not None:
            _check_beside(asked.beside, names, f"study {self.name}, scale {scale}")
        return Experiment(self, scale, asked, tuple(variants))


@dataclass(frozen=True)
class Variant:
    """One point of the design space.

    Args:
        name: From the axes' choices.
        recipe: Recipe with seed 0.
        number: Its value on a numeric axis.
    """

    name: str
    recipe: Recipe
    number: float | None = None

    def with_seed(self, seed: int) -> Recipe:
        """Return its recipe for one of the repeats."""
        return self.recipe.override(f"seed={self.recipe.seed + seed}")


@dataclass(frozen=True)
class Experiment:
    """A study at one scale, with its variants. Get one from `Study.at`.

    Args:
        study: The study.
        scale: Name of the scale.
        asked: The scale's recipe, benchmarks, takeaways and panel.
        variants: Every combination of the axes' choices, as recipes with seed 0.
    """

    study: Study
    scale: str
    asked: Scale
    variants: tuple[Variant, ...]

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.study.name

    def digest(self) -> str:
        """Return twelve hex digits that name the recipes and the questions.

        Takeaways, panel, published rows, first tokens, note and the number of seeds do not count.
        """
        said_only = {
            "seeds": True,
            "takeaways": True,
            "panel": True,
            "beside": True,
            "times_first_token": True,
            "note": True,
            "evaluate": {"__all__": {"metric"}},
        }
        content = self.asked.model_dump(mode="json", exclude=said_only)
        content["recipes"] = [variant.recipe.digest() for variant in self.variants]
        return digest_of(content)


def list_studies() -> list[str]:
    """Return the names of the catalog's studies."""
    return files_in(STUDIES, ".yaml")


def load_study(name: str | Path) -> Study:
    """Read a study of the catalog, or a YAML file.

    Raises:
        FileNotFoundError: Neither a catalog name nor a file.
        ValueError: The file is not a valid study; the message names each key.
    """
    tree, path = read_named(name, STUDIES, "study")
    return Study.parse(tree, str(path))


def _check_beside(beside: Beside, variants: Sequence[str], where: str) -> None:
    """Check that a published table has the rows, and the study the variants."""
    rows = [row.name for row in published_table(beside.table)]
    for variant, row in beside.rows.items():
        if variant not in variants:
            raise ValueError(
                f"{where}: `beside` names no variant {variant!r}; {did_you_mean(variant, variants)}"
            )
        if row not in rows:
            raise ValueError(
                f"{where}: table {beside.table} of the paper has no row {row!r}; "
                f"{did_you_mean(row, rows)}"
            )


def _make_variants(asked: Scale, where: str) -> list[Variant]:
    """Return every combination of the axes' choices; `where` names the scale in messages."""
    base = load_recipe(asked.recipe).override(*asked.overrides)
    found: list[Variant] = []
    for choice in itertools.product(*(_choices(*axis) for axis in asked.axes.items())):
        name = "-".join(label for label, _, _ in choice)
        try:
            recipe = base.override(*itertools.chain(*(overrides for _, overrides, _ in choice)))
        except ValueError as error:
            raise ValueError(f"{where}, variant {name}: {error}") from error

        for other in found:
            if name == other.name or recipe.digest() == other.recipe.digest():
                raise ValueError(
                    f"{where}: variants {other.name} and {name} are the same: remove one"
                )
        number = next((value for _, _, value in choice if value is not None), None)
        found.append(Variant(name, recipe, number))
    return found


def _choices(axis: str, values: Axis) -> Sequence[tuple[str, tuple[str, ...], Any]]:
    """Return (label, overrides, number) of every choice of an axis."""
    if isinstance(values, Numbers):
        return [(f"{axis}={value:g}", (f"{values.key}={value}",), value) for value in values.values]
    return [(label, overrides, None) for label, overrides in values.items()]
