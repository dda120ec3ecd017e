"""The steps of a stage: loss -> gradients -> optimizer; resumable at every step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from mipha.data.batches import Step, StepDataset, keep_step
from mipha.data.collate import to_device
from mipha.engine.machine import return_freed_memory
from mipha.engine.optimizer import Group, make_adamw, set_learning_rates, warmup_cosine
from mipha.engine.precision import autocast
from mipha.engine.profile import trace_steps
from mipha.engine.signals import stop_gently
from mipha.engine.states import StateWriter, load_state
from mipha.files import write_whole
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import part_parameters
from mipha.recipe import PARTS, StageRecipe
from mipha.training.metrics import Recorder
from mipha.training.stage import Stage

Validate = Callable[[nn.Module, int], dict[str, float]]
"""Function from the model and the number of steps done to values for the metrics of that step."""


def run_steps(
    stage: Stage,
    model: LlavaForConditionalGeneration,
    steps: StepDataset,
    validate: Validate | None = None,
) -> None:
    """Train until the last step, from the newest training state where there is one.

    Args:
        model: Model with its tuning applied, placed.
        steps: Steps of the stage.
        validate: Called every `validate_every` steps and at the end.

    Raises:
        ValueError: A weight that is to train gets no gradient, or an image cannot be read.
        FloatingPointError: The loss or the gradient is not finite; `nonfinite.json` names the
            samples, and the last good state stays.
        OSError: A state could not be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the current step was finished and saved.
    """
    world, seed, settings = stage.world, stage.recipe.seed, stage.settings
    num_steps, states = len(steps), stage.run.states(stage.name)

    # Resume from the newest state.
    optimizer = make_optimizer(model, settings)
    position = load_state(states, model, optimizer, world) or {"step": 0}
    start = int(position["step"])
    if start > num_steps:
        raise ValueError(
            f"the training state in {states} is of step {start}, and this stage has {num_steps}: "
            "delete that folder to start the stage anew"
        )
    recorder = Recorder(stage, model, num_steps, start)
    writer = StateWriter(states, world, stage.recipe.keep_states, stage.recipe.async_checkpoints)

    # A step is a pure function of its number, so the loader begins in the middle and reads nothing
    # of the steps before.
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, num_steps),
        collate_fn=keep_step,
        num_workers=4 if world.device.type == "cuda" else 0,
        pin_memory=world.device.type == "cuda",
    )

    traced = stage.profile if world.is_first else 0
    with (
        recorder,
        stop_gently(world) as is_stopped,
        trace_steps(stage.folder, traced) as end_of_step,
    ):
        read = iter(loader)
        for number in range(start + 1, num_steps + 1):
            # Measure how long the step waits for its batch.
            waited = time.monotonic()
            step = next(read)
            waited = time.monotonic() - waited

            # The seed makes dropout after a resume the same as without one.
            torch.manual_seed(seed * 1_000_003 + number)
            set_learning_rates(
                optimizer, warmup_cosine(number - 1, num_steps, settings.warmup_ratio)
            )
            substituted = recorder.count_unreadable(number, step)

            loss, grad_norm = _optimize(stage, model, optimizer, step, is_first=number == start + 1)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                writer.finish()  # all processes are here
                _refuse_nonfinite(stage, number, step, loss, grad_norm)

            # Measure and validate.
            rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
            metrics = recorder.meter.measure(number, step, loss, grad_norm, rates, waited)
            metrics |= substituted
            is_last = number == num_steps
            if validate and (is_last or number % (settings.validate_every or num_steps) == 0):
                metrics |= validate(model, number)
                recorder.meter.restart()
            recorder.write(metrics)
            end_of_step()
            if world.device.type == "cpu":
                return_freed_memory()

            # Save, at the latest before the process ends.
            stop = is_stopped()
            writer.poll()
            if number % settings.checkpoint_every == 0 or is_last or stop:
                writer.save(number, model, optimizer, {"seed": seed})
            if stop:
                writer.finish()
                raise KeyboardInterrupt
    writer.finish()


def make_optimizer(model: LlavaForConditionalGeneration, stage: StageRecipe) -> torch.optim.AdamW:
    """Return AdamW with a group for each trained part, at the learning rate of that part."""
    groups = []
    for part in PARTS:
        parameters = part_parameters(model, part).values()
        if trained := [parameter for parameter in parameters if parameter.requires_grad]:
            groups.append(Group(part, trained, stage.peak_learning_rate(part)))
    return make_adamw(groups, stage.adam_betas, stage.adam_eps, stage.weight_decay, fused=True)


def _optimize(
    stage: Stage, model: nn.Module, optimizer: torch.optim.Optimizer, step: Step, is_first: bool
) -> tuple[float, float]:
    """Take one optimizer step over all micro-batches of all processes.

    Args:
        is_first: Whether this is the first step of this process.

    Returns:
        The mean loss per supervised token, or upstream's mean of means, and the norm of the
        gradient.
    """
    world = stage.world
    total = torch.zeros((), device=world.device)

    # Each token weighs the same, in whichever micro-batch or process it is; in upstream's mean of
    # means each micro-batch does. FSDP averages gradients over processes, hence the factor.
    of_means = "mean_of_means" in stage.settings.upstream
    num_micro_batches = len(step.micro_batches)
    count = num_micro_batches * world.size if of_means else step.num_supervised
    with _rounded_once(stage, num_micro_batches):
        for number, batch in enumerate(step.micro_batches, 1):
            batch = to_device(batch, world.device)
            # Copies of the model sum their gradients behind the last micro-batch alone.
            if isinstance(model, FSDPModule):
                model.set_requires_all_reduce(number == num_micro_batches)
            with autocast(world.device, stage.autocast):
                output = model(**batch)
            loss_sum = output.loss if of_means else output.loss_sum
            if loss_sum.requires_grad:  # not where only the projector trains and there is no image
                with autocast(world.device, None):
                    (loss_sum * world.size / count).backward()
            total += loss_sum.detach()

    # A step without images has a blank one, which reaches every part: a gradient is there from the
    # first step on, if only of zeros.
    if is_first:
        _require_gradients(model)

    # Clip, and move the weights unless that would break them.
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, stage.settings.max_grad_norm or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    loss = float(world.total(total) / count)
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, float(norm)


def _rounded_once(stage: Stage, num_micro_batches: int) -> AbstractContextManager[object]:
    """Return a region in which autocast rounds each trained weight once.

    Autocast keeps its copies until the outermost region ends, so this one spans the micro-batches
    of a step. Where there is one, they would only live longer; where several processes share the
    model, they would be all of it.
    """
    if num_micro_batches == 1 or stage.world.size > 1:
        return nullcontext()
    return autocast(stage.world.device, stage.autocast)


def _require_gradients(model: nn.Module) -> None:
    """Refuse a tensor that is to train and gets no gradient: the optimizer would skip it."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    without = [name for name, weight in trained.items() if weight.grad is None]
    if without:
        raise ValueError(
            f"{len(without)} of {len(trained)} tensors that are to train get no gradient, "
            f"{without[0]} for one: look for code on their way to the loss that cuts it "
            "(no_grad, detach), or freeze that part in `tuning`"
        )


def _refuse_nonfinite(stage: Stage, number: int, step: Step, loss: float, grad_norm: float) -> None:
    """Write down the samples of a step whose loss or gradient is not finite, and end the run."""
    path = stage.folder / "nonfinite.json"
    if stage.world.is_first:
        found = {"step": number, "loss": str(loss), "grad_norm": str(grad_norm)}
        write_whole(path, json.dumps(found | {"samples": step.ids}, indent=1))
    raise FloatingPointError(
        f"step {number}: loss {loss}, gradient norm {grad_norm}; its {len(step.ids)} samples are "
        f"in {path}. The last saved state is intact: fix those samples and run the same command "
        "again, or train into another folder with a lower learning rate or precision=float32"
    )
