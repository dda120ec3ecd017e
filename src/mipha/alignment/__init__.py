"""Alignment of a language model before it meets images: SFT, reward and cost models, RLHF, DPO.

`train_step` trains the step of a recipe. Read step.py first (what every step shares), then one of

    sft.py  preference.py  dpo.py  image_dpo.py     steps that train with TRL, see trl_trainer.py
    rlhf.py -> rollout.py, policy.py, learning.py   RLHF and Safe RLHF; the formulas are in ppo.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mipha.alignment.recipe import StepRecipe


def train_step(recipe: StepRecipe, out: Path) -> Path:
    """Train the step of a recipe; the same recipe and folder continue where they stopped.

    Args:
        recipe: Recipe of the step.
        out: Folder, new or of this same recipe.

    Returns:
        `out/model`, a standard folder.
    """
    # Import only what the step needs: TRL is optional, and RLHF does without it.
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
