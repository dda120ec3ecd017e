"""Alignment recipes: everything that decides one step of aligning a language model, in YAML.

    load_alignment_recipe("phi-2-sft") -> SftRecipe -> .override("data=alpaca_data.json")

One file is one step (`step: sft | reward | cost | dpo | rlhf | safe-rlhf`), so a key that a step
would ignore is an unknown key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mipha.lookup import files_in, read_named
from mipha.recipe import DpoStageRecipe, LoraRecipe, Recipe, RecipeBase, TrlRecipe
from mipha.validation import validated

RECIPES = Path(__file__).parent.parent / "catalog" / "alignment"


class StepRecipe(TrlRecipe, RecipeBase):
    """The fields that every step has."""

    kind: ClassVar[str] = "alignment recipe"

    description: str = ""
    seed: int = Field(
        0,
        ge=0,
        description="of the order, of all random starts and of the choice of held-out prompts",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the device computes in it, else float32"
    )
    language_model: str = Field(
        description="what is trained: catalog name, hub id, "
        "or folder (for example the model/ of another step)"
    )
    chat_template: str | None = Field(
        None,
        description="name in catalog/chat_templates or a .jinja file; "
        "None: the language model's own",
    )
    held_out_data: Path | None = Field(
        None, description="a separate file for validation, instead of held_out"
    )

    @classmethod
    def parse(cls, tree: Any, source: str) -> Any:
        """Check a tree of plain values against the schema of the step that it names.

        Raises:
            ValueError: Names the source and, a line each, the key, the value and the fix.
        """
        step = tree.get("step") if isinstance(tree, dict) else None
        if not isinstance(step, str) or step not in STEPS:
            raise ValueError(
                f"{source} is not a valid alignment recipe: "
                f"step is {str(step)[:60]!r}, but must be {', '.join(STEPS)}"
            )
        return validated(STEPS[step], tree, source, f"{step} recipe")

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.held_out_data is not None and self.held_out:
            raise ValueError(
                "held_out and held_out_data are two ways to hold rows out: "
                "set held_out=0, or held_out_data=null"
            )
        return self

    @property
    def holds_out(self) -> bool:
        """Whether rows are kept out of training, or lie in a file of their own."""
        return self.held_out > 0 or self.held_out_data is not None


class SftRecipe(StepRecipe):
    """Supervised fine-tuning: instructions and their responses, in Alpaca's layout."""

    step: Literal["sft"]
    packing: bool = Field(
        True,
        description="several isolated conversations a row of max_tokens; "
        "batch_size then counts such rows",
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
        description="as in every step; "
        "or the run of a finished model, whose data are answers about images"
    )
    prefer: Literal["better", "safer"] = Field(
        "better", description="which label says what response is preferred"
    )
    beta: float = Field(
        0.1, gt=0, description="how dear it is to leave the model that it starts from"
    )


def dpo_recipe(recipe: Recipe, name: str, stage: DpoStageRecipe, start: str) -> DpoRecipe:
    """Return the step that a dpo stage of a training recipe is.

    Args:
        recipe: Recipe of the whole run.
        name: Name of the stage.
        stage: Its settings.
        start: Checkpoint that it starts from.

    Raises:
        ValueError: A setting has no effect, or two contradict.
    """
    tree = stage.model_dump(mode="json", exclude={"kind"}, exclude_unset=True)
    tree.setdefault("max_tokens", stage.max_tokens)
    shared: dict[str, Any] = {"seed": recipe.seed, "precision": recipe.precision}
    if recipe.stage_before(name) is None:  # later stages start from a model that has its template
        shared["chat_template"] = recipe.model.chat_template
    return DpoRecipe.parse(
        {"name": name, "step": "dpo", "language_model": start} | shared | tree,
        f"stages.{name} of {recipe.name}",
    )


def _known_tuning(value: Any) -> Any:
    if not re.fullmatch("full|lora|last-[1-9][0-9]*", str(value)):
        raise ValueError(
            "the policy is tuned full, lora or last-N (its last N layers), for example last-4"
        )
    return value


class RlhfRecipe(StepRecipe):
    """PPO on a reward model.

    `data` gives prompts: a preference file. Only the prompts of its training side are used.
    The defaults are the settings of the reference program.

    Source: https://github.com/PKU-Alignment/safe-rlhf and arXiv:2310.12773, from memory.
    """

    step: Literal["rlhf"]
    reward_model: Path = Field(description="model/ folder of the reward step")
    cost_model: Path | None = Field(
        None, description="model/ folder of the cost step; rlhf only reports what it says"
    )
    instructions: Path | None = Field(
        None, description="Alpaca file whose language-model loss is added (PTX); None: no such loss"
    )
    ptx_weight: float = Field(
        16.0, ge=0, description="of the loss on the instructions, a mean over tokens"
    )
    ptx_batch: int | None = Field(
        None, ge=1, description="instructions per optimizer step; None: as many as responses"
    )
    tuning: Annotated[str, BeforeValidator(_known_tuning)] = Field(
        "full", description="full, lora or last-N"
    )
    critic_layers: int = Field(
        2,
        ge=1,
        description="last layers that each critic has of its own, above frozen ones it shares",
    )
    learning_rate: float = Field(1e-5, gt=0)
    critic_learning_rate: float = Field(5e-6, gt=0)
    batch_size: int = Field(
        ge=1,
        description="prompts per step: each is answered once, then all answers are learned from",
    )
    minibatches: int = Field(1, ge=1, description="optimizer steps per pass over a step's answers")
    ppo_epochs: int = Field(1, ge=1, description="passes over a step's answers")
    max_new_tokens: int = Field(
        128, ge=1, description="longest response; max_tokens bounds prompt and response together"
    )
    temperature: float = Field(1.0, gt=0)
    kl_weight: float = Field(
        0.02, ge=0, description="beta; half of it acts on the policy, with and without a cost"
    )
    clip: float = Field(
        0.2, gt=0, description="how far the ratio of new to old probability may pay off"
    )
    value_clip: float = Field(
        5.0, gt=0, description="how far a critic may move from its old value in one step"
    )
    score_clip: float = Field(50.0, gt=0, description="scores beyond this are cut")
    gae_gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)

    @field_validator("lora", mode="before")
    @classmethod
    def _without_dropout(cls, value: Any) -> Any:
        return {"dropout": 0.0, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _nothing_ignored_by_ppo(self) -> Self:
        if self.batch_size % (self.minibatches * self.micro_batch):
            raise ValueError(
                f"minibatches={self.minibatches} of micro_batch={self.micro_batch} do not divide "
                f"batch_size={self.batch_size}: change one"
            )
        if self.instructions is None and {"ptx_weight", "ptx_batch"} & self.model_fields_set:
            given = min({"ptx_weight", "ptx_batch"} & self.model_fields_set)
            if getattr(self, given) != RlhfRecipe.model_fields[given].default:
                raise ValueError(
                    f"{given} has no effect without instructions: give an Alpaca file, or remove it"
                )
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                "lora.dropout has no effect here, where the policy must learn as it samples: "
                "set it to 0, or remove it"
            )
        if self.activation_checkpointing and self.tuning.startswith("last-"):
            raise ValueError(
                f"activation_checkpointing has no effect with tuning={self.tuning}: remove it"
            )
        return self

    @property
    def adapters(self) -> LoraRecipe:
        """The adapters' shape, without dropout: ratios compare the policy with itself."""
        return self.lora or LoraRecipe(dropout=0.0)


class SafeRlhfRecipe(RlhfRecipe):
    """PPO-Lagrangian: reward as high as it goes while the mean cost stays below a threshold."""

    step: Literal["safe-rlhf"]
    cost_model: Path = Field(description="model/ folder of the cost step: above zero is unsafe")
    threshold: float = Field(
        0.0,
        allow_inf_nan=False,
        description="mean cost to stay below; a little below zero leaves a margin",
    )
    initial_multiplier: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="lambda at first; 0: never any cost, and no cost critic",
    )
    multiplier_learning_rate: float = Field(0.1, ge=0)
    max_multiplier: float = Field(5.0, gt=0)
    cost_window: int = Field(128, ge=1, description="episodes whose mean cost moves lambda")
    multiplier_delay: int = Field(0, ge=0, description="steps before lambda first moves")

    @model_validator(mode="after")
    def _multiplier_in_bounds(self) -> Self:
        if self.initial_multiplier > self.max_multiplier:
            raise ValueError(
                f"initial_multiplier={self.initial_multiplier} is above "
                f"max_multiplier={self.max_multiplier}: lower it"
            )
        return self


AlignmentRecipe = SftRecipe | PreferenceRecipe | DpoRecipe | RlhfRecipe | SafeRlhfRecipe
STEPS: dict[str, type[AlignmentRecipe]] = {
    step: schema
    for schema in get_args(AlignmentRecipe)
    for step in get_args(schema.model_fields["step"].annotation)
}
"""Name of a step to the schema of its recipe."""


def list_alignment_recipes() -> list[str]:
    """Return the names of the catalog's alignment recipes."""
    return files_in(RECIPES, ".yaml")


def load_alignment_recipe(name: str | Path) -> AlignmentRecipe:
    """Read an alignment recipe of the catalog, or a YAML file.

    Raises:
        FileNotFoundError: Neither a catalog name nor a file.
        ValueError: The file is not a valid recipe; the message names each key.
    """
    tree, path = read_named(name, RECIPES, "alignment recipe")
    return StepRecipe.parse(tree, source=str(path))
