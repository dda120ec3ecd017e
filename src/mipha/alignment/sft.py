"""Supervised fine-tuning of a language model on instructions, with TRL's SFTTrainer.

instructions -> ids, labels on the assistant's words alone -> packed rows -> model/
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase, set_seed

from mipha.alignment.recipe import SftRecipe
from mipha.alignment.step import (
    in_held_folder,
    load_base,
    load_rows,
    record_base,
    stop_at_end_of_turn,
)
from mipha.alignment.trl_trainer import begin, export, lora_config, train, trainer_options
from mipha.data.alignment import Instruction, check_lengths, encode_exchange, load_instructions
from mipha.labels import IGNORE


@in_held_folder
def sft(recipe: SftRecipe, out: Path) -> Path:
    """Fine-tune a language model on instructions; run again, it continues where it stopped.

    Args:
        recipe: Recipe of the step.
        out: Folder, new or of this same recipe.

    Returns:
        The language model's folder, which a recipe's `model.language_model` takes.

    Raises:
        ValueError, FileNotFoundError: Something that the user can fix, before the first step.
        FloatingPointError: A loss or gradient is not finite.
        MissingPackage: TRL is not installed.
    """
    step = begin(recipe, out)
    if step.is_finished:
        return step.model

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # Load the data and the starting model.
    rows, held_out = load_rows(step, load_instructions)
    model, tokenizer = load_base(recipe)
    record_base(step, model)
    examples, held_out_examples = (
        supervised(tokenizer, part, recipe.max_tokens) for part in (rows, held_out)
    )

    # Set up the trainer; the adapters start from random numbers.
    config = SFTConfig(
        **trainer_options(step, validates=bool(held_out)),
        max_length=recipe.max_tokens,
        packing=recipe.packing,
        packing_strategy="bfd",
        eval_packing=False,
    )
    set_seed(recipe.seed)
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(examples),
        eval_dataset=Dataset.from_list(held_out_examples) if held_out_examples else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe, model, "CAUSAL_LM"),
    )

    # Train and export.
    train(trainer, step)
    stop_at_end_of_turn(trainer.model, tokenizer)
    return export(trainer, tokenizer, step)


def supervised(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Instruction], max_tokens: int
) -> list[dict[str, list[int]]]:
    """Return the ids and labels of each conversation.

    Returns:
        `input_ids`, and `labels`, not shifted: the response's ids, and -100 for the prompt.

    Raises:
        ValueError: A row does not fit; names it.
    """
    encoded = [
        (row.id, *encode_exchange(tokenizer, row.prompt, row.response, row.id)) for row in rows
    ]
    check_lengths(encoded, max_tokens)
    return [
        {"input_ids": prompt + response, "labels": [IGNORE] * len(prompt) + response}
        for _, prompt, response in encoded
    ]
