"""One training stage: steps -> loss_sum / num_tokens -> gradients -> optimizer; resumable at every step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from mipha.data.batches import Step, StepDataset, keep_step
from mipha.data.collate import to_device
from mipha.engine.machine import peak_flops, return_freed_memory
from mipha.engine.optimizer import Group, make_adamw, set_learning_rates, warmup_cosine
from mipha.engine.precision import autocast as autocast_to
from mipha.engine.progress import show_progress
from mipha.engine.signals import stop_gently
from mipha.engine.states import StateWriter, load_state
from mipha.engine.trackers import Trackers, last_tracked
from mipha.files import append_line, keep_lines, write_whole
from mipha.models.attention import use_segments
from mipha.models.flops import StepFlops
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import layers_of, part_parameters
from mipha.recipe import PARTS, Recipe, StageRecipe
from mipha.training.metrics import Meter, describe_steps
from mipha.training.shard import place
from mipha.training.unreadable import Unreadable
from mipha.world import World


def train_stage(
    model: LlavaForConditionalGeneration,
    steps: StepDataset,
    recipe: Recipe,
    name: str,
    folder: Path,
    world: World,
    *,
    autocast: torch.dtype | None,
    validate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    track: Sequence[str] = (),
) -> nn.Module:
    """Train until the last step, from the newest state in `folder` where there is one.

    Args:
        model: With its tuning applied.
        name: Of the stage.
        folder: Of this stage: `states/`, `metrics.jsonl`, what trackers write.
        autocast: Type that matrix products run in; null for that of the weights.
        validate: Called with the model and the number of steps done, every `validate_every` steps and at the end; what it gives goes
            into the metrics.
        track: Trackers that follow the metrics, beside TensorBoard.

    Returns:
        The model as placed (sharded, with several processes).

    Raises:
        ValueError: A weight that is to train gets no gradient, or an image cannot be read.
        FloatingPointError: The loss or the gradient is not finite; `nonfinite.json` names the samples, the last good state stays.
        OSError: A state could not be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the current step was finished and saved.
    """
    stage: StageRecipe = recipe.stages[name]
    meter = Meter(StepFlops(model), peak_flops(world, autocast))
    for part in stage.checkpointed:
        getattr(model.model, part).gradient_checkpointing_enable({"use_reentrant": False})
    use_segments(model)
    placed = place(model, world, recipe.sharding, recipe.compile)
    _train_mode(model)
    for layer in layers_of(model, stage.checkpointed):
        layer.training = True  # this flag alone: the host checkpoints no layer in eval mode, and a frozen part is in it
    optimizer = make_optimizer(model, stage)
    position = load_state(folder / "states", placed, optimizer, world) or {"step": 0}
    start = int(position["step"])
    tracked = 0
    if world.is_first:
        tracked = last_tracked(folder / "metrics.jsonl", folder / "states" / "tracked.json")
    if world.is_first:
        for file in ("metrics.jsonl", "answers.jsonl", "unreadable.jsonl"):
            keep_lines(folder / file, start)
        (folder / "nonfinite.json").unlink(missing_ok=True)
    world.barrier()
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, len(steps)),
        collate_fn=keep_step,
        num_workers=4 if world.device.type == "cuda" else 0,
    )
    writer = StateWriter(folder / "states", world, recipe.keep_states, recipe.async_checkpoints)
    unreadable = (
        Unreadable(folder / "unreadable.jsonl", world)
        if stage.unreadable_images == "substitute"
        else None
    )
    trackers = Trackers(
        track if world.is_first else None,
        folder,
        f"{folder.parent.name}-{folder.name}-{recipe.digest()}",
        recipe.model_dump(mode="json"),
        tracked,
    )
    meter.restart()
    with (
        show_progress(name, len(steps), describe_steps, world.is_first) as show,
        stop_gently(world) as is_stopped,
        trackers,
    ):
        for number, step in enumerate(loader, start=start + 1):
            torch.manual_seed(
                recipe.seed * 1_000_003 + number
            )  # dropout after a resume is what it would have been
            set_learning_rates(optimizer, warmup_cosine(number - 1, len(steps), stage.warmup_ratio))
            substituted = (
                {"substituted_images": unreadable.record(number, step)} if unreadable else {}
            )
            loss, grad_norm = _optimize(
                placed,
                optimizer,
                step,
                stage.max_grad_norm,
                autocast,
                world,
                first=number == start + 1,
            )
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                writer.finish()  # all processes are here
                _report_nonfinite(folder, number, step, loss, grad_norm, world)
            metrics = meter.measure(
                number,
                step,
                loss,
                grad_norm,
                {group["part"]: group["lr"] for group in optimizer.param_groups},
            )
            metrics |= substituted
            if validate and (
                number == len(steps) or number % (stage.validate_every or len(steps)) == 0
            ):
                metrics |= validate(placed, number)
                meter.restart()
            if world.is_first:
                append_line(folder / "metrics.jsonl", metrics)
                trackers.log(metrics)
            show(metrics)
            if world.device.type == "cpu":
                return_freed_memory()
            stop = is_stopped()
            writer.poll()
            if number % stage.checkpoint_every == 0 or number == len(steps) or stop:
                writer.save(number, placed, optimizer, {"seed": recipe.seed})
            if stop:
                writer.finish()
                raise KeyboardInterrupt
    writer.finish()
    return placed


def make_optimizer(model: LlavaForConditionalGeneration, stage: StageRecipe) -> torch.optim.AdamW:
    """Return AdamW with a group for each trained part, at the learning rate of that part."""
    groups = []
    for part in PARTS:
        parameters = part_parameters(model, part).values()
        if trained := [parameter for parameter in parameters if parameter.requires_grad]:
            groups.append(Group(part, trained, stage.peak_learning_rate(part)))
    return make_adamw(groups, stage.adam_betas, stage.adam_eps, stage.weight_decay, fused=True)


def _optimize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    max_grad_norm: float,
    autocast: torch.dtype | None,
    world: World,
    first: bool,
) -> tuple[float, float]:
    """One optimizer step over all micro-batches of all processes; returns the mean loss per token and the gradient's norm."""
    total = torch.zeros((), device=world.device)
    for batch in step.micro_batches:
        batch = to_device(batch, world.device)
        with autocast_to(world.device, autocast):
            loss_sum = model(**batch).loss_sum
        # Each token weighs the same, in whichever micro-batch or process it is; sharding averages over processes.
        if loss_sum.requires_grad:  # not where only the projector trains and the rows have no image
            (loss_sum * world.size / step.num_supervised).backward()
        total += loss_sum.detach()
    if first:  # of this process: the blank image of a step without images reaches every part, so a gradient is there, if only of zeros
        _require_gradients(model)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, max_grad_norm or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    loss = float(world.total(total) / step.num_supervised)
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, float(norm)


def _require_gradients(model: nn.Module) -> None:
    """The optimizer passes over a tensor without a gradient, so a part that is cut off would stay as it is, unsaid, for hours."""
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    if without:
        raise ValueError(
            f"{len(without)} of {len(trained)} tensors that are to train get no gradient, {without[0]} for one: look for code on their way "
            "to the loss that cuts it (no_grad, detach), or freeze that part in `tuning`"
        )


def _train_mode(model: LlavaForConditionalGeneration) -> None:
    """Dropout and the like only in parts, and in layers of them, that train: what is frozen is used as it will be when it answers."""
    model.eval()
    for module in (
        model.model.vision_tower,
        model.model.multi_modal_projector,
        model.model.language_model,
        *layers_of(model),
    ):
        module.train(any(parameter.requires_grad for parameter in module.parameters()))


def _report_nonfinite(
    folder: Path, number: int, step: Step, loss: float, grad_norm: float, world: World
) -> None:
    path = folder / "nonfinite.json"
    if world.is_first:
        write_whole(
            path,
            json.dumps(
                {
                    "step": number,
                    "loss": str(loss),
                    "grad_norm": str(grad_norm),
                    "samples": step.ids,
                },
                indent=1,
            ),
        )
    raise FloatingPointError(
        f"step {number}: loss {loss}, gradient norm {grad_norm}; its {len(step.ids)} samples are in {path}. The last saved state is "
        "intact: mend those samples and run the same command again, or train into another folder with a lower learning rate or "
        "precision=float32"
    )
