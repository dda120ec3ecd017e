"""Supervised fine-tuning of a language model on instructions: TRL's SFTTrainer on ids that our chat template made.

instructions -> ids, labels on the assistant's words alone -> packed rows -> model/
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mipha.alignment.datasets import Instruction, load_instructions
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
from mipha.alignment.recipe import SftRecipe
from mipha.labels import IGNORE
from mipha.models.language_model import end_of_turn


def sft(recipe: SftRecipe, out: Path) -> Path:
    """Fine-tune a language model on instructions; run again, it goes on where it stopped.

    Args:
        out: New, or the folder of this same recipe.

    Returns:
        The language model's folder, which a recipe's `model.language_model` takes.

    Raises:
        ValueError, FileNotFoundError: Something the user can mend, said before the first step.
        FloatingPointError: A loss or gradient is not finite.
        ModuleNotFoundError: TRL is not installed.
    """
    if begin(recipe, out):
        return out / "model"
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows, held_out = load_rows(recipe, out, load_instructions)
    model, tokenizer = load_part(recipe)
    record_base(recipe, out, model)
    options = arguments(recipe, out, validates=bool(held_out))
    config = SFTConfig(
        **options,
        max_length=recipe.max_tokens,
        packing=recipe.packing,
        packing_strategy="bfd",
        eval_packing=False,
    )
    set_seed(recipe.seed)  # the adapters' start
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(supervised(tokenizer, rows, recipe.max_tokens)),
        eval_dataset=Dataset.from_list(supervised(tokenizer, held_out, recipe.max_tokens))
        if held_out
        else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe, model, "CAUSAL_LM"),
    )
    train(trainer, recipe, out)
    end_turns(trainer.model, tokenizer)
    return export(trainer, tokenizer, out)


def supervised(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Instruction], max_tokens: int
) -> list[dict[str, list[int]]]:
    """Ids of each conversation, and labels: the response's ids where the assistant speaks, -100 elsewhere; not shifted.

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


def end_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `generate` stop where the assistant's turn ends, which configs in the wild do not know."""
    known = model.generation_config.eos_token_id
    ends = {
        tokenizer.eos_token_id,
        end_of_turn(tokenizer, tokenizer.chat_template),
        *(known if isinstance(known, list) else [known]),
    }
    model.generation_config.eos_token_id = sorted(ends - {None})
    model.generation_config.pad_token_id = tokenizer.pad_token_id
