"""The parts that all TRL steps share: settings, adapters, exact resume, metrics, export.

begin -> load_rows, load_base (step.py) -> a TRL trainer with `trainer_options` -> train -> export
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from mipha.alignment.figures import plot_losses
from mipha.alignment.recipe import StepRecipe
from mipha.alignment.step import Step, begin_step, training_device, write_result
from mipha.engine.precision import autocast_dtype
from mipha.engine.states import newest_state, seal_state
from mipha.errors import import_optional
from mipha.files import append_line, keep_lines
from mipha.recipe import LoraRecipe

if TYPE_CHECKING:
    from peft import LoraConfig

_NEVER = 10**9
"""More steps than any run has: transformers validates at every so many, and at the last."""

_METRICS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "accuracy": "accuracy",
    "sign_accuracy": "sign_accuracy",
    "margin": "margin",
    "mean_token_accuracy": "token_accuracy",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}
"""The trainers' names of metrics, and ours; other metrics are left out."""


def begin(recipe: StepRecipe, folder: Path) -> Step:
    """Begin a step that trains with TRL.

    Raises:
        MissingPackage: TRL is not installed.
        ValueError: As `begin_step`.
    """
    for package in ("datasets", "trl"):
        import_optional(package, "mipha align", "align")
    return begin_step(recipe, folder)


def trainer_options(step: Step, validates: bool) -> dict[str, Any]:
    """Return the settings that all of TRL's trainers get.

    Args:
        validates: Whether there are held-out rows.
    """
    recipe, device = step.recipe, training_device()
    bfloat16 = autocast_dtype(recipe.precision, device) is not None
    return {
        "output_dir": str(step.states),
        # Order and randomness. Without a seed of its own, the order would depend on earlier draws.
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        # Optimizer and schedule.
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.warmup_ratio,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        # Batches.
        "per_device_train_batch_size": recipe.micro_batch,
        "per_device_eval_batch_size": recipe.micro_batch,
        "gradient_accumulation_steps": recipe.batch_size // recipe.micro_batch,
        # Device. transformers asks to confirm bfloat16 on a CPU.
        "gradient_checkpointing": recipe.activation_checkpointing,
        "bf16": bfloat16,
        "use_cpu": bfloat16 and device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        # Metrics. A loss that is not a number must be visible; our own bar replaces tqdm's.
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        # Validation and states. The state before the newest is whole while the newest is written.
        "eval_strategy": "steps" if validates else "no",
        "eval_steps": recipe.validate_every or _NEVER,
        "save_strategy": "steps",
        "save_steps": recipe.checkpoint_every,
        "save_total_limit": 2,
    }


def lora_config(
    recipe: StepRecipe, model: PreTrainedModel, task: str, within: torch.nn.Module | None = None
) -> LoraConfig | None:
    """Return PEFT's config of an adapter on every linear layer of the decoder.

    Args:
        model: Model that gets the adapters.
        task: `CAUSAL_LM`; or `SEQ_CLS`, where the head that gives a score trains whole.
        within: Decoder, where the model has more than one part.

    Returns:
        None where the whole model trains.
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


def train(trainer: Trainer, step: Step) -> None:
    """Train to the end, from the newest whole training state where there is one.

    Raises:
        FloatingPointError: A loss or gradient is not finite; the states before it are intact.
        ValueError: A training state does not fit the model.
    """
    # Replace the trainer's output with ours.
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(QuietBar())
    trainer.add_callback(StepRecorder(step))

    # Find where to resume. transformers writes its states in place, takes the newest folder even
    # if it is torn, and silently starts its optimizer anew where that file is missing.
    state = newest_state(step.states, remove_torn=True)
    done = TrainerState()
    if state:
        _check_names(trainer, state)
        done = TrainerState.load_from_json(str(state / "trainer_state.json"))
    keep_lines(step.metrics, done.global_step)

    # Train. Resumed at the last step, transformers would train one step more.
    if state and done.global_step >= done.max_steps:
        trainer._load_from_checkpoint(str(state))
    elif state:
        with _no_code_in(state):
            trainer.train(resume_from_checkpoint=str(state))
    else:
        trainer.train()
    title = f"{step.recipe.step}: {step.recipe.name}"
    plot_losses(step.metrics, step.folder / "loss.png", title)


@contextmanager
def _no_code_in(state: Path) -> Iterator[None]:
    """Turn the refusal of a pickle into a sentence.

    transformers keeps optimizer, schedule and random state in pickles, and reads them with torch's
    `weights_only`, which runs no code that is in them.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(
            f"{state} holds a file that is no training state, and code in it is never run: "
            f"delete {state} to continue from the state before"
        ) from error


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, step: Step) -> Path:
    """Write the trained model, with an adapter merged in, as the step's result.

    Returns:
        The folder `model/`.
    """
    return write_result(step, merged_model(trainer, step), tokenizer)


def merged_model(trainer: Trainer, step: Step) -> PreTrainedModel:
    """Return the trained model; an adapter is saved as `adapter/` and merged in."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        shutil.rmtree(step.folder / "adapter", ignore_errors=True)
        model.save_pretrained(step.folder / "adapter")
        model = model.merge_and_unload(safe_merge=True)
    return model


def _check_names(trainer: Trainer, state: Path) -> None:
    """Reject a state with names that the model does not have.

    transformers loads the names that it finds and only warns of the others, so it would train on
    from other weights.
    """
    is_adapter = hasattr(trainer.model, "peft_config")
    loads_by_itself = type(trainer)._load_from_checkpoint is not Trainer._load_from_checkpoint
    weights = state / "model.safetensors"
    if is_adapter or loads_by_itself or not weights.is_file():
        return

    with safe_open(weights, framework="pt") as file:
        strange = sorted(set(file.keys()) - set(trainer.model.state_dict()))
    if strange:
        raise ValueError(
            f"{state} holds {len(strange)} weights, {strange[0]} first, that this kind of model "
            "does not have under these names, so training cannot continue from it: "
            "set tuning=lora, whose states load back"
        )


class QuietBar(ProgressCallback):
    """transformers' progress bar without a line of text at each step."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        return None


class StepRecorder(TrainerCallback):
    """Writes metrics under our names, stops at what is not finite, marks whole training states."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Rename the metrics.
        row: dict[str, Any] = {"step": state.global_step}
        for key, value in (logs or {}).items():
            name = _METRICS.get(key.removeprefix("eval_"))
            if name is not None:
                row[f"validation_{name}" if key.startswith("eval_") else name] = float(value)

        # Stop at what is not finite.
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                raise FloatingPointError(
                    f"step {state.global_step}: the {name} is {row[name]}; training stopped, and "
                    f"its states up to the step before are intact in {self.step.states}: "
                    "lower the learning_rate, or look at the data of this step"
                )
        if len(row) > 1:
            append_line(self.step.metrics, row)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        seal_state(Path(args.output_dir) / f"checkpoint-{state.global_step}")
