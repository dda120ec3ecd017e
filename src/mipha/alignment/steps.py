"""An alignment recipe -> what trains it."""

from __future__ import annotations

from pathlib import Path

from mipha.alignment.recipe import StepRecipe


def train_step(recipe: StepRecipe, out: Path) -> Path:
    """Train the step that a recipe is for; the same recipe and folder go on where they stopped.

    Returns:
        `out/model`, a standard folder.
    """
    # Each is imported where it is asked for: the trainers of two need a library that the others do without.
    if recipe.step == "sft":
        from mipha.alignment.sft import sft as train
    elif recipe.step == "reward":
        from mipha.alignment.preference import train_reward as train
    elif recipe.step == "cost":
        from mipha.alignment.preference import train_cost as train
    elif recipe.step == "dpo":
        from mipha.alignment.dpo import dpo as train
    elif recipe.step == "rlhf":
        from mipha.alignment.rlhf import rlhf as train
    else:
        from mipha.alignment.rlhf import safe_rlhf as train
    return train(recipe, out)
