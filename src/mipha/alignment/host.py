"""What every step shares around TRL's trainers: parts read as recipes name them, exact resume, metrics, the exported result."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from mipha.alignment.bookkeeping import Bar, Bookkeeping
from mipha.alignment.datasets import Row, check_leak, split_by_prompt
from mipha.alignment.figure import plot_alignment
from mipha.alignment.folder import forget_after, is_finished, newest_checkpoint, open_folder, record
from mipha.alignment.recipe import StepRecipe
from mipha.models.fingerprint import joint_digest, tensor_digest
from mipha.models.language_model import load_language_model
from mipha.recipe import LoraRecipe, ModelRecipe

if TYPE_CHECKING:
    from peft import LoraConfig

_AT_THE_END = 10**9
"""More steps than there will be: the host validates at every so many, and at the last."""


def begin(recipe: StepRecipe, folder: Path) -> bool:
    """Open the folder of a step, with TRL at hand.

    Returns:
        Whether the step is finished already.

    Raises:
        ModuleNotFoundError: TRL is not installed.
        ValueError: The folder is another step's, or several processes were started.
    """
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ModuleNotFoundError as error:
        message = f"align trains with TRL, and {error.name} is not installed: pip install 'mipha-vlm[align]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "align runs in one process, but WORLD_SIZE says there are several: start it without torchrun"
        )
    open_folder(folder, recipe)
    if is_finished(folder):
        shutil.rmtree(
            folder / "checkpoints", ignore_errors=True
        )  # of a process that was killed between its last two lines
    return is_finished(folder)


def load_rows(
    recipe: StepRecipe, folder: Path, load: Callable[[Path, list[str] | None], list[Row]]
) -> tuple[Sequence[Row], Sequence[Row]]:
    """Rows to train on and held-out rows, with what they are in provenance.json.

    Args:
        load: Reads a file; its second argument takes the faults of rows that are left out.

    Raises:
        FileNotFoundError, ValueError: The data are not there or not in order, or changed since the step began.
    """
    skipped: list[str] | None = [] if recipe.skip_empty else None
    rows = load(recipe.data, skipped)
    if recipe.held_out_data is not None:
        train, test = rows, load(recipe.held_out_data, skipped)
    else:
        train, test = split_by_prompt(rows, recipe.held_out, recipe.seed)
    check_leak(train, test)
    content = hashlib.sha256("".join(f"{row}\n" for row in [*train, *test]).encode()).hexdigest()
    record(
        folder,
        "data",
        {
            "rows": len(train),
            "held_out": len(test),
            "skipped": len(skipped or ()),
            "sha256": content,
        },
    )
    return train, test


def load_part(recipe: StepRecipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model that a step starts from, in float32, and its tokenizer with the chat template set.

    Raises:
        FileNotFoundError, ValueError: It is not there, or cannot be used; as for a recipe's `model.language_model`.
    """
    wanted = ModelRecipe(
        vision_tower="none",
        language_model=recipe.language_model,
        chat_template=recipe.chat_template,
    )
    model, tokenizer, template = load_language_model(wanted, torch.float32)
    tokenizer.chat_template = template
    return model, tokenizer


def record_base(recipe: StepRecipe, folder: Path, model: PreTrainedModel) -> None:
    """Write down which weights the step starts from.

    Raises:
        ValueError: The step began from others, which its training states, or its adapter, are for.
    """
    digest = joint_digest(
        {name: tensor_digest(parameter) for name, parameter in model.named_parameters()}
    )
    record(folder, "base model", {"language_model": recipe.language_model, "sha256": digest})


def arguments(recipe: StepRecipe, folder: Path, validates: bool) -> dict[str, Any]:
    """What TRL's trainers are told alike.

    Args:
        validates: Whether there are held-out rows.
    """
    bfloat16 = computes_in_bfloat16(recipe.precision)
    return {
        "output_dir": str(folder / "checkpoints"),
        "seed": recipe.seed,
        "data_seed": recipe.seed,  # else the order would follow from whatever was drawn in this process before
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.warmup_ratio,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "per_device_train_batch_size": recipe.micro_batch,
        "per_device_eval_batch_size": recipe.micro_batch,
        "gradient_accumulation_steps": recipe.batch_size // recipe.micro_batch,
        "gradient_checkpointing": recipe.activation_checkpointing,
        "bf16": bfloat16,
        "use_cpu": bfloat16
        and not torch.cuda.is_available(),  # the host wants to hear that this is meant
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is no number must be seen
        "eval_strategy": "steps" if validates else "no",
        "eval_steps": recipe.validate_every or _AT_THE_END,
        "save_strategy": "steps",
        "save_steps": recipe.checkpoint_every,
        "save_total_limit": 2,  # the one before is whole while one is written
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,  # the bar below, without a line of text each step
    }


def lora_config(
    recipe: StepRecipe, model: PreTrainedModel, task: str, within: torch.nn.Module | None = None
) -> LoraConfig | None:
    """Adapters of every linear layer of the decoder; null where everything trains.

    Args:
        task: `CAUSAL_LM`, or `SEQ_CLS`: the head that gives a score then trains whole.
        within: The decoder, where the model has more than one part.
    """
    from peft import LoraConfig

    if recipe.tuning != "lora":
        return None
    shape = recipe.lora or LoraRecipe()
    names = {id(module): name for name, module in model.named_modules()}
    targets = [
        names[id(module)]
        for module in (within or model.base_model).modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=targets,
        task_type=task,
    )


def train(trainer: Trainer, recipe: StepRecipe, folder: Path) -> None:
    """Train to the end, from the newest whole training state where there is one.

    Raises:
        FloatingPointError: A loss or gradient is not finite; the states before it are intact.
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Bar())
    trainer.add_callback(Bookkeeping(folder))
    state = newest_checkpoint(folder / "checkpoints")
    if state:
        _check_names(trainer, state)
    done = (
        TrainerState.load_from_json(str(state / "trainer_state.json")) if state else TrainerState()
    )
    forget_after(folder / "metrics.jsonl", done.global_step)
    if state and done.global_step >= done.max_steps:
        trainer._load_from_checkpoint(str(state))  # the host would train a step more
    else:
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    plot_alignment(folder / "metrics.jsonl", folder / "loss.png", f"{recipe.step}: {recipe.name}")


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write the result as a standard folder, whole or not at all, with an adapter merged in; the training states go.

    Returns:
        The folder `model/`.
    """
    model = merged(trainer, folder)
    model.config._name_or_path = (
        ""  # else the folder on this machine that it was read from goes into a public file
    )
    model.config.use_cache = True
    beside = folder / "model.partial"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(folder / "model")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder / "model"


def merged(trainer: Trainer, folder: Path) -> PreTrainedModel:
    """The trained model; an adapter is saved as `adapter/` in PEFT's format, and merged in."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        model.save_pretrained(folder / "adapter")
        model = model.merge_and_unload(safe_merge=True)
    return model


def computes_in_bfloat16(precision: str) -> bool:
    if precision != "auto":
        return precision == "bfloat16"
    return (
        torch.cuda.is_bf16_supported()
        if torch.cuda.is_available()
        else torch.cpu._is_avx512_bf16_supported()
    )


def _check_names(trainer: Trainer, state: Path) -> None:
    """The host loads what it finds names for and only warns of the rest: it would train on from other weights."""
    if (
        hasattr(trainer.model, "peft_config")
        or type(trainer)._load_from_checkpoint is not Trainer._load_from_checkpoint
    ):
        return
    if (state / "model.safetensors").is_file():
        with safe_open(state / "model.safetensors", framework="pt") as file:
            strange = sorted(set(file.keys()) - set(trainer.model.state_dict()))
        if strange:
            raise ValueError(
                f"{state} holds {len(strange)} weights, {strange[0]} first, under names that this kind of model has not, so training "
                "cannot go on from it: set tuning=lora, whose states load back"
            )
