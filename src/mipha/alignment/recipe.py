"""An alignment recipe: everything that decides one step of aligning a language model, in one strict YAML file.

    load_alignment_recipe("phi-2-sft") -> SftRecipe -> .override("data=alpaca_data.json", "lora.rank=64") -> sft(recipe, out)

One file is one step (`step: sft | reward | cost | dpo | rlhf | safe-rlhf`), so a key that a step would ignore is an unknown key.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mipha.lookup import files_in, read_named, read_yaml
from mipha.recipe import LoraRecipe
from mipha.validation import validated

RECIPES = Path(__file__).parent.parent / "catalog" / "alignment"


class StepRecipe(BaseModel):
    """What every step has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    seed: int = Field(
        0,
        ge=0,
        description="of the order, of every random start, and of which prompts are held out",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the device computes in it, else float32"
    )
    language_model: str = Field(
        description="what is trained: catalog name, folder (the model/ of another step, say) or hub id"
    )
    chat_template: str | None = Field(
        None,
        description="name in catalog/chat_templates or a .jinja file; null: the language model's own",
    )
    data: Path = Field(description="the published file")
    skip_empty: bool = Field(
        False,
        description="leave out, and count, rows with an empty text or the same response twice; false: refuse them",
    )
    held_out: float = Field(
        0.05, ge=0, lt=1, description="share of the prompts kept out of training, for validation"
    )
    held_out_data: Path | None = Field(
        None, description="a file of its own for validation, in place of held_out"
    )
    max_tokens: int = Field(
        512, ge=8, description="longest conversation; a longer one is an error, never cut"
    )
    tuning: Literal["full", "lora"] = "full"
    lora: LoraRecipe | None = Field(
        None, description="shape of the adapters, of every linear layer but the head"
    )
    learning_rate: float = Field(gt=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps; null: all epochs"
    )
    batch_size: int = Field(ge=1, description="rows per optimizer step")
    micro_batch: int = Field(1, ge=1, description="rows per forward pass; a divisor of batch_size")
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    activation_checkpointing: bool = False
    checkpoint_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    validate_every: int | None = Field(
        None, ge=1, description="optimizer steps between validations; null: at the end only"
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        if self.lora is not None and self.tuning != "lora":
            raise ValueError(
                f"lora has no effect with tuning={self.tuning}: remove it, or set tuning=lora"
            )
        if self.held_out_data is not None and self.held_out:
            raise ValueError(
                "held_out and held_out_data are two ways to hold rows out: set held_out=0, or held_out_data=null"
            )
        if self.validate_every is not None and not (self.held_out or self.held_out_data):
            raise ValueError(
                f"validate_every={self.validate_every} has no effect with nothing held out: set held_out=0.05, or remove it"
            )
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}: change one of them"
            )
        return self

    def override(self, *assignments: str) -> Self:
        """This recipe with some values replaced.

        Args:
            assignments: `key=value` or `lora.key=value`; the value is read as YAML.

        Raises:
            ValueError: An assignment has no `=`, names an unknown key, or its value does not fit.
        """
        tree = self.model_dump(mode="json", exclude_unset=True)
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ValueError(
                    f"override {assignment!r} has no `=`: write key=value, for example seed=7"
                )
            value = read_yaml(text, f"override {assignment!r}: the value")
            *group, last = key.strip().split(".")
            if group not in ([], ["lora"]):
                raise ValueError(f"override {assignment!r}: only lora is a group of keys")
            node = tree if not group else tree.setdefault("lora", {})
            if node is None:  # lora: null was said before
                node = tree["lora"] = {}
            node[last] = value
        return parse_alignment_recipe(
            tree,
            f"recipe {self.name!r} with {', '.join(assignments)}" if assignments else self.name,
        )

    def dump(self) -> str:
        """This recipe as YAML with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    def digest(self) -> str:
        """Twelve hex digits that name what this recipe trains; name and description do not count."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: StepRecipe) -> list[str]:
        """The keys in which another recipe differs."""
        mine, theirs = self._content(), other._content()
        return sorted(
            key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)
        )

    def _content(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"name", "description"})


class SftRecipe(StepRecipe):
    """Supervised fine-tuning: instructions and their responses, in Alpaca's layout."""

    step: Literal["sft"]
    packing: bool = Field(
        True,
        description="several isolated conversations a row of max_tokens; batch_size then counts such rows",
    )


class PreferenceRecipe(StepRecipe):
    """A reward or a cost model from pairs of responses, in the layout of PKU-SafeRLHF-10K."""

    step: Literal["reward", "cost"]
    regularization: float = Field(
        0.001,
        ge=0,
        description="weight of the mean square of the scores, which keeps them near zero",
    )


class DpoRecipe(StepRecipe):
    """Direct preference optimisation on the same pairs, without a reward model."""

    step: Literal["dpo"]
    language_model: str = Field(
        description="as in every step; or the run of a finished model, whose data are answers about pictures"
    )
    prefer: Literal["better", "safer"] = Field(
        "better", description="which label says what response is preferred"
    )
    beta: float = Field(
        0.1, gt=0, description="how dear it is to leave the model that it starts from"
    )


def step_recipes() -> dict[str, type[StepRecipe]]:
    """The recipe class of every step."""
    from mipha.alignment.rlhf_recipe import (
        RlhfRecipe,
        SafeRlhfRecipe,
    )  # which builds on this module

    preferences = {"reward": PreferenceRecipe, "cost": PreferenceRecipe, "dpo": DpoRecipe}
    return {"sft": SftRecipe, **preferences, "rlhf": RlhfRecipe, "safe-rlhf": SafeRlhfRecipe}


def list_alignment_recipes() -> list[str]:
    """Names of the catalog's alignment recipes."""
    return files_in(RECIPES, ".yaml")


def load_alignment_recipe(name: str | Path) -> StepRecipe:
    """Read a recipe of the catalog, or a YAML file.

    Raises:
        FileNotFoundError: Neither a catalog name nor a file.
        ValueError: The file is not a valid recipe; the message names each key.
    """
    tree, path = read_named(name, RECIPES, "alignment recipe")
    return parse_alignment_recipe(tree, source=str(path))


def parse_alignment_recipe(tree: Any, source: str) -> StepRecipe:
    """Check a tree of plain values against the schema of its step.

    Raises:
        ValueError: Names the source and, a line each, the key, the value and the mend.
    """
    step, steps = tree.get("step") if isinstance(tree, dict) else None, step_recipes()
    if step not in steps:
        raise ValueError(
            f"{source} is not a valid alignment recipe: step is {step!r}, but must be {', '.join(steps)}"
        )
    return validated(steps[step], tree, source, f"{step} recipe")
