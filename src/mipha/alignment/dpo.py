"""Direct preference optimisation of a language model, through TRL's DPOTrainer on ids that our chat template made.

Source: Rafailov et al., arXiv:2305.18290; the loss is the trainer's default, the sigmoid one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, set_seed

from mipha.alignment.datasets import Preference, load_preferences
from mipha.alignment.encoding import check_lengths, encode_exchange
from mipha.alignment.host import (
    arguments,
    begin,
    export,
    load_part,
    load_rows,
    lora_config,
    record_base,
    train,
)
from mipha.alignment.image_dpo import dpo_on_images, is_finished_model
from mipha.alignment.recipe import DpoRecipe
from mipha.alignment.sft import end_turns

if TYPE_CHECKING:
    from trl import DPOTrainer


def dpo(recipe: DpoRecipe, out: Path) -> Path:
    """Train a language model to prefer the labelled responses, near the model that it starts from; run again, it goes on.

    Args:
        recipe: Its `language_model` may also be the run of a finished model: then the data are pairs of answers about pictures.
        out: New, or the folder of this same recipe.

    Returns:
        The language model's folder, which a recipe's `model.language_model` takes; of a finished model, a standard checkpoint.

    Raises:
        ValueError, FileNotFoundError: Something the user can mend, said before the first step.
        FloatingPointError: A loss or gradient is not finite.
        ModuleNotFoundError: TRL is not installed.
    """
    if begin(recipe, out):
        return out / "model"
    if is_finished_model(recipe.language_model):
        return dpo_on_images(recipe, out)
    from datasets import Dataset
    from trl import DPOConfig

    rows, held_out = load_rows(recipe, out, load_preferences)
    model, tokenizer = load_part(recipe)
    record_base(recipe, out, model)
    train_pairs, held_out_pairs = (
        preferred_pairs(tokenizer, part, recipe.prefer, recipe.max_tokens)
        for part in (rows, held_out)
    )
    config = DPOConfig(
        **arguments(recipe, out, validates=bool(held_out)), beta=recipe.beta, max_length=None
    )
    set_seed(recipe.seed)  # the adapters' start
    trainer = _trainer_class()(
        model,
        # The trainer would read its reference again from where the config says that the model is from. Behind an adapter it is there.
        None if recipe.tuning == "lora" else copy.deepcopy(model),
        config,
        train_dataset=Dataset.from_list(train_pairs),
        eval_dataset=Dataset.from_list(held_out_pairs) if held_out_pairs else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe, model, "CAUSAL_LM"),
    )
    train(trainer, recipe, out)
    end_turns(trainer.model, tokenizer)
    return export(trainer, tokenizer, out)


def preferred_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Preference], prefer: str, max_tokens: int
) -> list[dict[str, Any]]:
    """Prompt and both responses of each row as ids.

    Args:
        prefer: `better` or `safer`: which label says what is preferred.

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
        ids = {
            "prompt_ids": exchanges[0][0],
            "chosen_ids": exchanges[chosen][1],
            "rejected_ids": exchanges[1 - chosen][1],
        }
        pairs.append(ids)
    check_lengths(lengths, max_tokens)
    return pairs


def _trainer_class() -> type[DPOTrainer]:
    """TRL's trainer on ids; made when used, for TRL is an extra."""
    from trl import DPOTrainer

    class EncodedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            """They are ids already: tokenised by the trainer, a response would end in what the template writes behind its end."""
            assert {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names)
            return dataset

    return EncodedDPOTrainer
