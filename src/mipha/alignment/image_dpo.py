"""Direct preference optimisation of a finished model, pictures and all: `mipha align dpo` where `language_model` is a run.

pairs of answers about a picture -> ids as in training, the answer marked -> TRL's DPOTrainer -> model/, a standard checkpoint

The language model and the projector are trained (full), or adapters of the language model (lora); the vision tower never.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor
from transformers import LlavaProcessor, PretrainedConfig, set_seed

from mipha.alignment.datasets import ImagePreference, load_image_preferences
from mipha.alignment.encoding import check_lengths
from mipha.alignment.host import arguments, load_rows, lora_config, merged, record_base, train
from mipha.alignment.recipe import DpoRecipe
from mipha.data.encode import IGNORE, encode
from mipha.data.images import open_image
from mipha.data.sample import IMAGE, Message, Sample
from mipha.models.build import save_checkpoint
from mipha.models.modeling import load_model
from mipha.models.processing import load_processor
from mipha.run import model_folder

if TYPE_CHECKING:
    from trl import DPOTrainer

_ANY_LENGTH = 2**31  # nothing is cut: what is too long is refused, all at once


def is_finished_model(name: str) -> bool:
    """Whether this names a run of `mipha train`, or the checkpoint of one, and no language model."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return PretrainedConfig.get_config_dict(folder)[0].get("model_type") == "llava"
    recipe = folder / "recipe.yaml"
    return recipe.is_file() and "stages" in yaml.safe_load(recipe.read_text(encoding="utf-8"))


def dpo_on_images(recipe: DpoRecipe, out: Path) -> Path:
    """The step, in a folder that is open; as `dpo`.

    Returns:
        A standard checkpoint, as `mipha train` exports.

    Raises:
        ValueError, FileNotFoundError: The run is not finished, or a row or a setting does not fit.
    """
    from datasets import Dataset
    from trl import DPOConfig

    if recipe.prefer != "better":
        raise ValueError(
            f"prefer={recipe.prefer} has no effect on pairs of answers about pictures, which say what is chosen: remove it"
        )
    if recipe.chat_template is not None:
        raise ValueError(
            "chat_template has no effect on a finished model, which has its own: remove it"
        )
    folder = model_folder(recipe.language_model)
    rows, held_out = load_rows(recipe, out, load_image_preferences)
    model, processor = load_model(str(folder)), load_processor(folder)
    record_base(recipe, out, model)
    model.model.vision_tower.requires_grad_(False)
    train_pairs, held_out_pairs = (
        answered_pairs(processor, part, recipe.max_tokens) for part in (rows, held_out)
    )
    # The collator finds the rest by number: a picture is read when it is shown.
    every = train_pairs + held_out_pairs
    numbers = [{"pair": number} for number in range(len(every))]
    options = arguments(recipe, out, validates=bool(held_out))
    config = DPOConfig(**options, beta=recipe.beta, max_length=None, remove_unused_columns=False)
    set_seed(recipe.seed)  # the adapters' start
    trainer = _trainer_class()(
        model,
        None if recipe.tuning == "lora" else copy.deepcopy(model),
        config,
        data_collator=lambda batch: collate_answers(
            [every[row["pair"]] for row in batch], processor
        ),
        train_dataset=Dataset.from_list(numbers[: len(train_pairs)]),
        eval_dataset=Dataset.from_list(numbers[len(train_pairs) :]) if held_out_pairs else None,
        processing_class=processor,
        peft_config=lora_config(recipe, model, "CAUSAL_LM", within=model.model.language_model),
    )
    train(trainer, recipe, out)
    save_checkpoint(merged(trainer, out), processor, out / "model")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return out / "model"


def answered_pairs(
    processor: LlavaProcessor, rows: Sequence[ImagePreference], max_tokens: int
) -> list[dict[str, Any]]:
    """Both answers of each row as the ids that training would have, image tokens included, and where the answer stands.

    Raises:
        ValueError: A row does not fit; names it.
    """
    pairs, lengths = [], []
    for row in rows:
        asked = Message("user", f"{IMAGE}\n{row.prompt}")
        encoded = [
            encode(
                Sample(row.id, (asked, Message("assistant", answer)), (row.image,)),
                processor,
                _ANY_LENGTH,
            )
            for answer in (row.chosen, row.rejected)
        ]
        lengths += [(row.id, side.input_ids, []) for side in encoded]
        pairs.append({"image": row.image, "sides": encoded})
    check_lengths(lengths, max_tokens)
    return pairs


def collate_answers(
    pairs: Sequence[dict[str, Any]], processor: LlavaProcessor
) -> dict[str, Tensor]:
    """Pairs as one batch: first all chosen answers, then all rejected ones, each with its picture.

    Returns:
        input_ids, attention_mask and completion_mask `(2 * pairs, tokens)`, padded on the right; pixel_values
        `(2 * pairs, 3, height, width)`.
    """
    sides = [pair["sides"][side] for side in (0, 1) for pair in pairs]
    longest = max(map(len, sides))
    ids = torch.full((len(sides), longest), processor.tokenizer.pad_token_id)
    attended, spoken = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, side in enumerate(sides):
        # A chat template may write something behind the end of the turn; it is not trained on, and nothing sees it.
        ids[number, : len(side)] = torch.from_numpy(side.input_ids)
        attended[number, : len(side)] = 1
        spoken[number, : len(side)] = torch.from_numpy(side.labels != IGNORE)
    images = [open_image(pair["image"]) for pair in pairs]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "completion_mask": spoken,
        "pixel_values": torch.cat([pixels, pixels]),
    }


def _trainer_class() -> type[DPOTrainer]:
    """TRL's trainer on encoded pairs, which loads its own training states back; made when used, for TRL is an extra."""
    from trl import DPOTrainer

    class ImageDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            """The host would look for the names of the file in the model, find none of them, and train on from other weights."""
            if (Path(resume_from_checkpoint) / "adapter_config.json").is_file():
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                (model or self.model).load_state_dict(
                    load_model(resume_from_checkpoint).state_dict(), strict=True
                )

    return ImageDPOTrainer
