"""The recipes of RLHF and Safe RLHF: one strict YAML file, as for the other alignment steps.

The settings of the reference program are the defaults, from memory of https://github.com/PKU-Alignment/safe-rlhf and arXiv:2310.12773.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mipha.alignment.recipe import StepRecipe
from mipha.recipe import LoraRecipe


def _known_tuning(value: Any) -> Any:
    if not re.fullmatch("full|lora|last-[1-9][0-9]*", str(value)):
        raise ValueError(
            "the policy is tuned full, lora or last-N (its last N layers), for example last-4"
        )
    return value


class RlhfRecipe(StepRecipe):
    """PPO on a reward model. `data` gives prompts: a preference file, of which only the training side's prompts are used."""

    step: Literal["rlhf"]
    reward_model: Path = Field(description="model/ folder of the reward step")
    cost_model: Path | None = Field(
        None, description="model/ folder of the cost step; rlhf only reports what it says"
    )
    instructions: Path | None = Field(
        None, description="Alpaca file whose language-model loss is added (PTX); null: none"
    )
    ptx_weight: float = Field(
        16.0, ge=0, description="of the loss on the instructions, a mean over tokens"
    )
    ptx_batch: int | None = Field(
        None, ge=1, description="instructions per optimizer step; null: as many as responses"
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
                f"minibatches={self.minibatches} of micro_batch={self.micro_batch} do not divide batch_size={self.batch_size}: change one"
            )
        if self.instructions is None and {"ptx_weight", "ptx_batch"} & self.model_fields_set:
            given = min({"ptx_weight", "ptx_batch"} & self.model_fields_set)
            if getattr(self, given) != RlhfRecipe.model_fields[given].default:
                raise ValueError(
                    f"{given} has no effect without instructions: give an Alpaca file, or remove it"
                )
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                "lora.dropout has no effect here, where the policy must learn as it samples: set it to 0, or remove it"
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
                f"initial_multiplier={self.initial_multiplier} is above max_multiplier={self.max_multiplier}: lower it"
            )
        return self
