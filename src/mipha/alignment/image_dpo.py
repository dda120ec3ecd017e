"""Direct preference optimization of a finished multimodal model, on pairs of answers about images.

    mipha align dpo, where `language_model` is a run of `mipha train`
    pairs -> ids as in training, the answer marked -> TRL's DPOTrainer -> model/, a checkpoint

The language model and the projector train (full), or adapters of the language model (lora); the
vision tower never trains.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor
from transformers import LlavaProcessor, PretrainedConfig, set_seed

from mipha.alignment.step import Step, load_rows, record_base
from mipha.alignment.trl_trainer import lora_config, merged_model, train, trainer_options
from mipha.data.alignment import ImagePreference, check_lengths, load_image_preferences
from mipha.data.encode import encode
from mipha.data.images import open_image
from mipha.data.pixels import read_pixels
from mipha.labels import IGNORE
from mipha.models.build import build, save_checkpoint
from mipha.models.modeling import load_saved_model
from mipha.preflight import check_prefers
from mipha.recipe import CheckpointRecipe
from mipha.run import model_folder

if TYPE_CHECKING:
    from trl import DPOTrainer

_ANY_LENGTH = 2**31  # nothing is cut: `check_lengths` rejects all rows that are too long at once


def is_finished_model(name: str) -> bool:
    """Return whether a name is a run of `mipha train`, or its checkpoint, not a language model."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return "vision_config" in PretrainedConfig.get_config_dict(folder)[0]
    recipe = folder / "recipe.yaml"
    return recipe.is_file() and "stages" in yaml.safe_load(recipe.read_text(encoding="utf-8"))


def dpo_on_images(step: Step) -> Path:
    """Train a finished model to prefer the chosen answers; else as `dpo`.

    Args:
        step: Step that has begun.

    Returns:
        A standard checkpoint, as `mipha train` exports.

    Raises:
        ValueError, FileNotFoundError: The run is not finished, or a row or a setting does not fit.
    """
    from datasets import Dataset
    from trl import DPOConfig

    # Reject settings without effect.
    recipe = step.recipe
    if recipe.prefer != "better":
        raise ValueError(
            f"prefer={recipe.prefer} has no effect on pairs of answers about images, "
            "which say what is chosen: remove it"
        )

    # Load the data and the finished model, anybody's: what it answers is found as in training.
    folder = model_folder(recipe.language_model)
    check_prefers(folder)
    rows, held_out = load_rows(step, load_image_preferences)
    start = CheckpointRecipe(checkpoint=str(folder), chat_template=recipe.chat_template)
    model, processor = build(start)
    record_base(step, model)
    model.model.vision_tower.requires_grad_(False)
    pairs, held_out_pairs = (
        answered_pairs(processor, part, recipe.max_tokens) for part in (rows, held_out)
    )

    # The trainer's datasets hold only numbers; the collator opens an image when it is needed.
    every = pairs + held_out_pairs
    numbers = [{"pair": number} for number in range(len(every))]

    # Set up the trainer. With adapters, the reference is the model without them.
    options = trainer_options(step, validates=bool(held_out))
    config = DPOConfig(**options, beta=recipe.beta, max_length=None, remove_unused_columns=False)
    set_seed(recipe.seed)
    trainer = _trainer_class()(
        model,
        None if recipe.tuning == "lora" else copy.deepcopy(model),
        config,
        data_collator=lambda batch: collate_answers(
            [every[row["pair"]] for row in batch], processor
        ),
        train_dataset=Dataset.from_list(numbers[: len(pairs)]),
        eval_dataset=Dataset.from_list(numbers[len(pairs) :]) if held_out_pairs else None,
        processing_class=processor,
        peft_config=lora_config(recipe, model, "CAUSAL_LM", within=model.model.language_model),
    )

    # Train and export.
    train(trainer, step)
    save_checkpoint(merged_model(trainer, step), processor, step.model)
    step.drop_states()
    return step.model


def answered_pairs(
    processor: LlavaProcessor, rows: Sequence[ImagePreference], max_tokens: int
) -> list[dict[str, Any]]:
    """Return both answers of each row as training would encode them.

    Returns:
        `image`: path of the image. `sides`: the encoded chosen and rejected conversation, image
        tokens included, with the answer marked by labels.

    Raises:
        ValueError: A row does not fit; names it.
    """
    pairs, lengths = [], []
    for row in rows:
        sides = [encode(sample, processor, _ANY_LENGTH) for sample in row.samples]
        lengths += [(row.id, side.input_ids, []) for side in sides]
        pairs.append({"image": row.image, "sides": sides})
    check_lengths(lengths, max_tokens)
    return pairs


def collate_answers(
    pairs: Sequence[dict[str, Any]], processor: LlavaProcessor
) -> dict[str, Tensor]:
    """Return pairs as one batch: first all chosen answers, then all rejected ones.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask` `(2 * pairs, tokens)`, padded on the
        right; `pixel_values` `(2 * pairs, 3, height, width)`.
    """
    sides = [pair["sides"][side] for side in (0, 1) for pair in pairs]
    longest = max(map(len, sides))

    # Pad the conversations. What a chat template writes after the end of the turn is not trained
    # on, and nothing attends to it.
    ids = torch.full((len(sides), longest), processor.tokenizer.pad_token_id)
    attended, spoken = torch.zeros_like(ids), torch.zeros_like(ids)  # (2 * pairs, tokens)
    for number, side in enumerate(sides):
        ids[number, : len(side)] = torch.from_numpy(side.input_ids)
        attended[number, : len(side)] = 1
        spoken[number, : len(side)] = torch.from_numpy(side.labels != IGNORE)

    # Both answers of a pair see the same image.
    images = [open_image(pair["image"]) for pair in pairs]
    pixels = read_pixels(images, processor)["pixel_values"]
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "completion_mask": spoken,
        "pixel_values": torch.cat([pixels, pixels]),  # (2 * pairs, 3, height, width)
    }


def _trainer_class() -> type[DPOTrainer]:
    """Return TRL's trainer on encoded pairs; TRL is optional, so it is imported here."""
    from trl import DPOTrainer

    class ImageDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            """Load a training state by our own names.

            transformers would not find the file's names in the model, and train on from other
            weights.
            """
            if (Path(resume_from_checkpoint) / "adapter_config.json").is_file():
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                weights = load_saved_model(resume_from_checkpoint).state_dict()
                (model or self.model).load_state_dict(weights, strict=True)

    return ImageDPOTrainer
