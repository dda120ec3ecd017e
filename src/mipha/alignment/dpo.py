"""Direct preference optimization of a language model, with TRL's DPOTrainer.

Source: Rafailov et al., arXiv:2305.18290; the loss is the trainer's default, the sigmoid one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, set_seed

from mipha.alignment.image_dpo import dpo_on_images, is_finished_model
from mipha.alignment.recipe import DpoRecipe
from mipha.alignment.step import (
    in_held_folder,
    load_base,
    load_rows,
    record_base,
    stop_at_end_of_turn,
)
from mipha.alignment.trl_trainer import begin, export, lora_config, train, trainer_options
from mipha.data.alignment import Preference, check_lengths, encode_exchange, load_preferences

if TYPE_CHECKING:
    from trl import DPOTrainer


@in_held_folder
def dpo(recipe: DpoRecipe, out: Path) -> Path:
    """Train a model to prefer the labelled responses; run again, it continues where it stopped.

    Args:
        recipe: Recipe of the step. Its `language_model` may also be the run of a finished
            multimodal model; the data are then pairs of answers about images.
        out: Folder, new or of this same recipe.

    Returns:
        The language model's folder, which a recipe's `model.language_model` takes; for a finished
        model, a standard checkpoint.

    Raises:
        ValueError, FileNotFoundError: Something that the user can fix, before the first step.
        FloatingPointError: A loss or gradient is not finite.
        MissingPackage: TRL is not installed.
    """
    step = begin(recipe, out)
    if step.is_finished:
        return step.model
    if is_finished_model(recipe.language_model):
        return dpo_on_images(step)

    from datasets import Dataset
    from trl import DPOConfig

    # Load the data and the starting model.
    rows, held_out = load_rows(step, load_preferences)
    model, tokenizer = load_base(recipe)
    record_base(step, model)
    pairs, held_out_pairs = (
        preferred_pairs(tokenizer, part, recipe.prefer, recipe.max_tokens)
        for part in (rows, held_out)
    )

    # Set up the trainer. With adapters, the reference is the model without them; else it is a copy,
    # because the trainer would load it again from the path in the config.
    options = trainer_options(step, validates=bool(held_out))
    config = DPOConfig(**options, beta=recipe.beta, max_length=None)
    set_seed(recipe.seed)
    trainer = _trainer_class()(
        model,
        None if recipe.tuning == "lora" else copy.deepcopy(model),
        config,
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(held_out_pairs) if held_out_pairs else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe, model, "CAUSAL_LM"),
    )

    # Train and export.
    train(trainer, step)
    stop_at_end_of_turn(trainer.model, tokenizer)
    return export(trainer, tokenizer, step)


def preferred_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Preference], prefer: str, max_tokens: int
) -> list[dict[str, Any]]:
    """Return the prompt and both responses of each row as ids.

    Args:
        prefer: Label that says which response is preferred, `better` or `safer`.

    Returns:
        `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Raises:
        ValueError: A row does not fit; names it.
    """
    pairs, lengths = [], []
    for row in rows:
        exchanges = [
            encode_exchange(tokenizer, row.prompt, response, row.id) for response in row.responses
        ]
        lengths += [(row.id, *exchange) for exchange in exchanges]

        chosen = row.better if prefer == "better" else row.safer
        pairs.append(
            {
                "prompt_ids": exchanges[0][0],
                "chosen_ids": exchanges[chosen][1],
                "rejected_ids": exchanges[1 - chosen][1],
            }
        )
    check_lengths(lengths, max_tokens)
    return pairs


def _trainer_class() -> type[DPOTrainer]:
    """Return TRL's trainer on ids; TRL is optional, so it is imported here."""
    from trl import DPOTrainer

    class EncodedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            """Return the dataset as it is.

            Tokenized by the trainer, a response would end in what the template writes after it.
            """
            assert {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names)
            return dataset

    return EncodedDPOTrainer
