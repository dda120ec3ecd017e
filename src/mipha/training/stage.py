"""One stage of a run: its recipe, its folder and the process that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mipha.engine.precision import autocast_dtype
from mipha.models.attention import choose_attention
from mipha.models.build import checkpoint_folder
from mipha.recipe import CheckpointRecipe, Recipe, StageRecipe
from mipha.run import Run
from mipha.world import World


@dataclass(frozen=True)
class Stage:
    """One stage of a run, in this process.

    Args:
        run: Run folder.
        recipe: Recipe of the whole run.
        name: Name of the stage.
        world: This process among those that train together.
        track: Trackers that follow the metrics, beside TensorBoard.
        profile: Steps to trace.
    """

    run: Run
    recipe: Recipe
    name: str
    world: World
    track: Sequence[str] = ()
    profile: int = 0

    @property
    def settings(self) -> StageRecipe:
        """The settings of this stage in the recipe."""
        return self.recipe.stage(self.name)

    @property
    def is_dpo(self) -> bool:
        """Whether the stage learns from preferences, which another trainer does."""
        return self.name not in self.recipe.supervised_stages

    @property
    def before(self) -> str | None:
        """The stage whose model this one starts from; None for the first."""
        return self.recipe.stage_before(self.name)

    @property
    def folder(self) -> Path:
        """Folder of the stage: states, metrics, checkpoint."""
        return self.run.stage(self.name)

    @property
    def base(self) -> Path:
        """The model that the stage starts from, where adapters need it beside them on disk."""
        if self.before:
            return self.run.checkpoint(self.before)
        if isinstance(self.recipe.model, CheckpointRecipe):
            return checkpoint_folder(self.recipe.model)
        return self.folder / "base"

    @property
    def start(self) -> Path:
        """The weights that the stage starts from, for the proof at its end."""
        return self.run.states(self.name) / "start.safetensors"

    @property
    def report(self) -> Path:
        """The file that reports what trains, and how far it moved."""
        return self.folder / "tuning.json"

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that matrix products run in; None for the type of the weights."""
        return autocast_dtype(self.recipe.precision, self.world.device)

    @property
    def attention(self) -> str:
        """The attention that the language model trains with."""
        return choose_attention(self.recipe.attention, self.world.device, self.autocast)
