"""One alignment step on disk: its folder, its data, the model that it starts from and its result.

runs/sft/recipe.yaml      the recipe with every default written out; marks the folder
         provenance.json  versions, and hashes of the starting model and of the data
         metrics.jsonl    one line per optimizer step, one per validation
         loss.png         the metrics as a figure; curves.png for RLHF
         checkpoints/     training states to resume from (engine/states.py); removed at the end
         adapter/         with LoRA, the adapter in PEFT's format (not for RLHF)
         model/           the result; exists, whole, when the step is finished
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from mipha.alignment.recipe import StepRecipe, load_alignment_recipe
from mipha.data.alignment import AnyRow, check_leak, split_by_prompt
from mipha.files import read_json_object, whole_folder, write_whole
from mipha.models.fingerprint import joint_digest, tensor_digest
from mipha.models.language_model import end_tokens, load_language_model
from mipha.recipe import ModelRecipe
from mipha.run import claim_folder, hold_run
from mipha.terminal import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


P = ParamSpec("P")
Recipe = TypeVar("Recipe", bound=StepRecipe)

_MOST_REMARKS = 10

console = Console()


@dataclass(frozen=True)
class Step:
    """One alignment step; get one from `begin_step`.

    Args:
        recipe: Recipe of the step.
        folder: Folder of the step.
    """

    recipe: StepRecipe
    folder: Path

    @property
    def model(self) -> Path:
        """The result, a standard folder."""
        return self.folder / "model"

    @property
    def metrics(self) -> Path:
        """The metrics, JSON lines."""
        return self.folder / "metrics.jsonl"

    @property
    def states(self) -> Path:
        """The folder of the training states."""
        return self.folder / "checkpoints"

    @property
    def is_finished(self) -> bool:
        """Whether the result exists; it appears when everything is in it."""
        return (self.model / "config.json").is_file()

    def drop_states(self) -> None:
        """Remove the training states: of a finished step the result remains."""
        shutil.rmtree(self.states, ignore_errors=True)


def begin_step(recipe: StepRecipe, folder: Path) -> Step:
    """Create the folder of a step, or open the existing one of the same recipe.

    Raises:
        ValueError: The folder holds another recipe's step or other files, which stay untouched; or
            several processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "align runs in one process, but WORLD_SIZE says there are several: "
            "start it without torchrun"
        )

    known = folder / "recipe.yaml"
    before = load_alignment_recipe(known) if known.is_file() else None
    claim_folder(folder, recipe, before, "an alignment step")

    # A process that was killed after the result was written leaves its states behind.
    step = Step(recipe, folder)
    if step.is_finished:
        step.drop_states()
    return step


def in_held_folder(train: Callable[Concatenate[Recipe, Path, P], Path]) -> Callable[..., Path]:
    """Keep the folder of a step to this process while a function trains it.

    The function then raises a ValueError where another process trains in the folder.

    Args:
        train: Function of a recipe, a folder and more, that begins the step.
    """

    @wraps(train)
    def trained(recipe: Recipe, out: Path, *args: P.args, **kwargs: P.kwargs) -> Path:
        with hold_run(out):
            return train(recipe, out, *args, **kwargs)

    return trained


def training_device() -> torch.device:
    """Return the device that a step trains on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# The start of a step -----------------------------------------------------------------------------


def load_rows(
    step: Step, load: Callable[[Path, list[str] | None], list[AnyRow]]
) -> tuple[Sequence[AnyRow], Sequence[AnyRow]]:
    """Read the rows to train on and the held-out rows, and record their hash.

    Args:
        load: Reader of a file; its second argument receives why rows were left out.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A row is wrong, or the data changed since the step began.
    """
    recipe = step.recipe
    skipped: list[str] | None = [] if recipe.skip_empty else None

    # Read both sides.
    rows = load(recipe.data, skipped)
    if recipe.held_out_data is not None:
        train, test = rows, load(recipe.held_out_data, skipped)
    else:
        train, test = split_by_prompt(rows, recipe.held_out, recipe.seed)
    check_leak(train, test)

    # Say what nothing reads of them.
    remarks = Counter(one.about for row in rows for one in getattr(row, "remarks", ()))
    for about, count in remarks.most_common(_MOST_REMARKS):
        console.print(f"{recipe.data}: {about} ({count} of {len(rows)} rows)", markup=False)

    # Record what they are.
    text = "".join(f"{row}\n" for row in [*train, *test])
    facts = {
        "rows": len(train),
        "held_out": len(test),
        "skipped": len(skipped or ()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    _record(step, "data", facts)
    return train, test


def load_base(recipe: StepRecipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the language model that a step starts from.

    Returns:
        The model in float32, and its tokenizer with the chat template set.

    Raises:
        FileNotFoundError, ValueError: The model does not exist, or cannot be used; as for a
            recipe's `model.language_model`.
    """
    wanted = ModelRecipe(
        vision_tower="none",
        language_model=recipe.language_model,
        chat_template=recipe.chat_template,
    )
    model, tokenizer, template = load_language_model(wanted, torch.float32)
    tokenizer.chat_template = template
    return model, tokenizer


def record_base(step: Step, model: PreTrainedModel) -> None:
    """Record the weights that a step starts from.

    Raises:
        ValueError: The step began from others, which its training states are for.
    """
    digest = joint_digest(
        {name: tensor_digest(parameter) for name, parameter in model.named_parameters()}
    )
    facts = {"language_model": step.recipe.language_model, "sha256": digest}
    _record(step, "base model", facts)


def _record(step: Step, key: str, facts: dict[str, Any]) -> None:
    """Write facts into provenance.json; raises a ValueError where states are for other facts."""
    path = step.folder / "provenance.json"
    content = read_json_object(path)
    before = content.get(key)
    if before not in (None, facts) and step.states.is_dir():
        raise ValueError(
            f"the {key} changed since {step.folder} began (then {before}, now {facts}), "
            "and its training states do not fit another: "
            "put the old one back, or choose another -o"
        )
    content[key] = facts
    write_whole(path, json.dumps(content, indent=2) + "\n")


# The result of a step -----------------------------------------------------------------------


def stop_at_end_of_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `generate` stop where the assistant's turn ends, which published configs do not know."""
    model.generation_config.eos_token_id = end_tokens(
        tokenizer, tokenizer.chat_template, model.generation_config.eos_token_id
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def write_result(step: Step, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the result as a standard folder, whole or not at all, and drop the training states.

    Returns:
        The folder `model/`.
    """
    model.config._name_or_path = ""  # a path on this machine has no place in a public file
    model.config.use_cache = True
    with whole_folder(step.model) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    step.drop_states()
    return step.model
