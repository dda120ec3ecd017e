"""Alignment of a language model before it meets images: SFT, reward and cost models, RLHF, DPO.

`train_step` trains the step of a recipe. Read step.py first (what every step shares), then one of

    sft.py  preference.py  dpo.py  image_dpo.py     steps that train with TRL, see trl_trainer.py
    rlhf.py -> rollout.py, policy.py, learning.py   RLHF and Safe RLHF; the formulas are in ppo.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.preflight import check_part, check_writable, template_file
from mipha.run import check_claim, model_folder

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
    check_step(recipe, out)

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


def check_step(recipe: StepRecipe, out: Path) -> None:
    """Check everything about a step that is known without torch; nothing is created.

    Raises:
        ValueError: The folder holds another recipe's step or other files.
        FileNotFoundError: A file or a model is not there.
        OSError: The folder cannot be written to.
    """
    from mipha.alignment.recipe import load_alignment_recipe

    # The folder.
    known = out / "recipe.yaml"
    before = load_alignment_recipe(known) if known.is_file() else None
    check_claim(out, recipe, before, "an alignment step")
    if (out / "model" / "config.json").is_file():
        return
    check_writable(out)

    # The files, and the models of earlier steps.
    for key in ("data", "held_out_data", "instructions", "reward_model", "cost_model"):
        path = getattr(recipe, key, None)
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{key} {path} is not there: check the path")

    # The model that the step starts from; DPO may start from a run.
    name = recipe.language_model
    path = LANGUAGE_MODELS[name].path if name in LANGUAGE_MODELS else name
    if (Path(path) / "recipe.yaml").is_file():
        model_folder(path)
    elif not path.startswith("packaged:"):
        check_part(name, path, "language model", LANGUAGE_MODELS)
    if recipe.chat_template is not None:
        template_file(recipe.chat_template)
