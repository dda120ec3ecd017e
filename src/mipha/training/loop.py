"""One training stage: steps -> loss_sum / num_tokens -> gradients -> optimizer; resumable at every step."""

from __future__ import annotations

import ctypes
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader

from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.recipe import StageRecipe
from mipha.run import append_line, read_lines, write_whole
from mipha.training.batches import Step, StepDataset, keep_step
from mipha.training.checkpoint import load_state, save_state
from mipha.training.metrics import Meter
from mipha.training.optim import make_optimizer, schedule, set_learning_rates
from mipha.training.shard import layers_of, place
from mipha.world import World


def train_stage(
    model: LlavaForConditionalGeneration,
    steps: StepDataset,
    stage: StageRecipe,
    folder: Path,
    world: World,
    *,
    title: str,
    autocast: torch.dtype | None,
    seed: int,
    validate: Callable[[nn.Module, int], dict[str, float]] | None = None,
) -> nn.Module:
    """Train until the last step, from the newest state in `folder` where there is one.

    Args:
        model: With its tuning applied.
        folder: Of this stage: `states/`, `metrics.jsonl`.
        title: What the progress bar calls this stage.
        autocast: Type that matrix products run in; null for that of the weights.
        seed: Of dropout.
        validate: Called with the model and the number of steps done, every `validate_every` steps and at the end; what it gives goes
            into the metrics.

    Returns:
        The model as placed (sharded, with several processes).

    Raises:
        ValueError: A weight that is to train gets no gradient.
        FloatingPointError: The loss or the gradient is not finite; `nonfinite.json` names the samples, the last good state stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the current step was finished and saved.
    """
    if stage.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    placed = place(model, world)
    _train_mode(model)
    if stage.activation_checkpointing:
        for layer in layers_of(model):
            layer.training = True  # this flag alone: the host checkpoints no layer in eval mode, and a frozen part is in it
    optimizer = make_optimizer(model, stage)
    position = load_state(folder / "states", placed, optimizer, world) or {"step": 0}
    start = int(position["step"])
    if world.is_first:
        for name in ("metrics.jsonl", "answers.jsonl"):
            _forget_after(folder / name, start)
        (folder / "nonfinite.json").unlink(missing_ok=True)
    loader = DataLoader(
        steps, batch_size=None, sampler=range(start, len(steps)), collate_fn=keep_step, num_workers=4 if world.device.type == "cuda" else 0
    )
    meter = Meter()
    with _progress(title, start, len(steps), world.is_first) as show, _stop_gently() as stopped:
        for number, step in enumerate(loader, start=start + 1):
            torch.manual_seed(seed * 1_000_003 + number)  # dropout after a resume is what it would have been
            set_learning_rates(optimizer, schedule(number - 1, len(steps), stage.warmup_ratio))
            loss, grad_norm = _optimize(placed, optimizer, step, stage.max_grad_norm, autocast, world, first=number == start + 1)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                _report_nonfinite(folder, number, step, loss, grad_norm, world)
            metrics = meter.measure(number, step, loss, grad_norm, {group["part"]: group["lr"] for group in optimizer.param_groups})
            if validate and (number == len(steps) or number % (stage.validate_every or len(steps)) == 0):
                metrics |= validate(placed, number)
                meter.restart()
            if world.is_first:
                append_line(folder / "metrics.jsonl", metrics)
            show(metrics)
            if world.device.type == "cpu":
                _return_freed_memory()
            stop = _anyone(stopped(), world)
            if number % stage.checkpoint_every == 0 or number == len(steps) or stop:
                save_state(folder / "states", number, placed, optimizer, {"seed": seed}, world)
            if stop:
                raise KeyboardInterrupt
    return placed


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
        batch = {key: value.to(world.device, non_blocking=True) for key, value in batch.items()}
        with torch.autocast(world.device.type, dtype=autocast, enabled=autocast is not None):
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
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    if without:
        raise ValueError(
            f"{len(without)} of {len(trained)} tensors that are to train get no gradient, {without[0]} for one: look for code on their way "
            "to the loss that cuts it (no_grad, detach), or freeze that part in `tuning`"
        )


def _return_freed_memory() -> None:
    """Give the system back what a step freed: rows of ever new lengths leave holes that glibc keeps, gigabytes over an hour."""
    with suppress(OSError, AttributeError):  # another C library: nothing to trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _train_mode(model: LlavaForConditionalGeneration) -> None:
    """Dropout and the like only in parts, and in layers of them, that train: what is frozen is used as it will be when it answers."""
    model.eval()
    for module in (model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model, *layers_of(model)):
        module.train(any(parameter.requires_grad for parameter in module.parameters()))


def _report_nonfinite(folder: Path, number: int, step: Step, loss: float, grad_norm: float, world: World) -> None:
    path = folder / "nonfinite.json"
    if world.is_first:
        write_whole(path, json.dumps({"step": number, "loss": str(loss), "grad_norm": str(grad_norm), "samples": step.ids}, indent=1))
    raise FloatingPointError(
        f"step {number}: loss {loss}, gradient norm {grad_norm}; its {len(step.ids)} samples are in {path}. The last saved state is "
        "intact: mend those samples and run the same command again, or train into another folder with a lower learning rate or "
        "precision=float32"
    )


def _forget_after(path: Path, step: int) -> None:
    """Drop metrics of steps that will be made again."""
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


def _anyone(flag: bool, world: World) -> bool:
    return bool(world.total(torch.tensor(int(flag), device=world.device))) if world.size > 1 else flag


@contextmanager
def _stop_gently() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait for the end of the step; a second Ctrl-C does not."""
    signals: list[int] = []

    def handle(number: int, frame: object) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(title: str, start: int, total: int, visible: bool) -> Iterator[Callable[[dict], None]]:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[samples]:.1f} samples/s  {task.fields[tokens]:,.0f} tokens/s"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, disable=not visible, speed_estimate_period=600) as progress:
        task = progress.add_task(title, total=total, completed=start, loss=math.nan, samples=0.0, tokens=0.0)

        def show(metrics: dict) -> None:
            progress.update(
                task,
                completed=metrics["step"],
                loss=metrics["loss"],
                samples=metrics["samples_per_second"],
                tokens=metrics["tokens_per_second"],
            )

        yield show
