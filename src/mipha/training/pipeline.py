"""Recipe -> trained model, stage by stage: skips what is done, resumes what is not, exports."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import LlavaProcessor

from mipha.comparison.figures import plot_metrics
from mipha.data.batches import StepDataset
from mipha.data.encode import encode
from mipha.data.images import ImageSource, is_readable, open_image
from mipha.data.mixture import Mixture
from mipha.engine.machine import check_free_space, check_writable
from mipha.engine.precision import autocast_dtype
from mipha.engine.trackers import check_trackers
from mipha.files import read_lines
from mipha.models.adapters import merged_weights, remove_adapters, save_adapter
from mipha.models.build import build, save_checkpoint
from mipha.models.modeling import LlavaForConditionalGeneration, attention_window, load_model
from mipha.models.processing import load_processor
from mipha.models.projector import calibrate_projector
from mipha.models.quantization import check_quantization
from mipha.models.tuning import TunedPart, apply_tuning, check_tuning, tuned_modules
from mipha.recipe import PARTS, Recipe
from mipha.run import Run, create_run
from mipha.training.frozen import keep_frozen_in_bfloat16, kept_in, with_originals
from mipha.training.loop import train_stage
from mipha.training.proof import (
    change_table,
    contradictions,
    measure_change,
    record_start,
    refuse_contradictions,
    tuning_table,
    write_report,
)
from mipha.training.validation import Validation
from mipha.world import World, join_world

console = Console()

CALIBRATION_IMAGES = 64
"""Enough for the mean and deviation of each channel: hundreds of patches each."""


def train(recipe: Recipe, folder: str | Path, track: Sequence[str] = ()) -> Run:
    """Train the stages of a recipe in a run folder; run again, it goes on where it stopped.

    Args:
        recipe: What to train.
        folder: New, or the run folder of this same recipe.
        track: Trackers that follow the metrics: wandb, trackio. TensorBoard does wherever it is installed.

    Returns:
        The run, with a standard checkpoint for each stage.

    Raises:
        ValueError, FileNotFoundError: Something the user can mend, said before the first step where it can be known; also data that
            changed since the run began.
        OSError: The disk cannot hold the run, or the folder cannot be written to.
    """
    check_trackers(track)
    world = join_world()
    if world.is_first and not Path(folder).is_file():
        check_writable(Path(folder))
    run = create_run(Path(folder), recipe) if world.is_first else None
    world.barrier()
    run = run or create_run(Path(folder), recipe)
    stages = {name: stage for name, stage in recipe.stages.items() if not run.is_finished(name)}
    mixtures = {name: Mixture(stage.data, stage.held_out) for name, stage in stages.items()}
    held_out = {
        name: Mixture(stage.data, stage.held_out, "validation")
        for name, stage in stages.items()
        if stage.held_out
    }
    for name, mixture in mixtures.items():
        check_quantization(stages[name].tuning, world.device, world.size)
        sha256 = mixture.check()
        if world.is_first:
            run.record_data(name, {"samples": len(mixture), "sha256": sha256})
    for name in recipe.stages.keys() - mixtures.keys() if world.is_first else ():
        _drop_states(run, name)  # of a process that was killed between its last two lines
    for name, mixture in mixtures.items():
        _train_stage(run, recipe, name, mixture, held_out.get(name), world, track)
    return run


def _train_stage(
    run: Run,
    recipe: Recipe,
    name: str,
    mixture: Mixture,
    held_out: Mixture | None,
    world: World,
    track: Sequence[str],
) -> None:
    stage, folder = recipe.stages[name], run.stage(name)
    autocast = autocast_dtype(recipe.precision, world.device)
    torch.manual_seed(recipe.seed)  # the projector's start
    model, processor = _start(run, recipe, name, mixture)
    steps = StepDataset(mixture, processor, stage, recipe.seed, world.rank, world.size)
    window = attention_window(model.config)
    if window and stage.batching != "padded" and stage.row_tokens > window:
        raise ValueError(
            f"stages.{name}.row_tokens={stage.row_tokens} is more than the {window} tokens that this language model's sliding layers "
            f"see, and packed rows know no window: set stages.{name}.batching=padded, or row_tokens={window}"
        )
    encode(
        mixture[0], processor, stage.row_tokens, stage.prompt
    )  # a broken template or data set fails here, not at step 1
    check_tuning(model, stage.tuning)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    before = recipe.stage_before(name)
    base = run.checkpoint(before) if before else folder / "base"
    if world.is_first and stage.tuning.adapted and not base.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        check_free_space(folder, size)
        save_checkpoint(
            model, processor, base
        )  # adapters are of use with their base alone, and the first stage's is on no disk yet
    torch.manual_seed(recipe.seed)  # the adapters' start
    tuned = apply_tuning(model, stage.tuning, world.device, autocast)
    start = run.states(name) / "start.safetensors"
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        trained = sum(
            parameter.numel() * parameter.element_size()
            for parameter in model.parameters()
            if parameter.requires_grad
        )
        # The kept states and the one being written (weights and two moments each), the start, the adapter, and the checkpoint.
        check_free_space(folder, (3 * (recipe.keep_states + 1) + 2) * trained + size)
        refuse_contradictions(folder / "tuning.json")
        record_start(model, start)
    originals = keep_frozen_in_bfloat16(model, world.device) if autocast is torch.bfloat16 else {}
    if world.is_first:
        tuned = kept_in(model, tuned)
        _announce(name, mixture, steps, tuned)
        write_report(folder / "tuning.json", tuned, stage)
    world.barrier()
    validate = None
    if held_out is not None:
        validate = Validation(
            held_out, processor, stage, recipe.seed, world, autocast, folder / "answers.jsonl"
        ).measure
    placed = train_stage(
        model, steps, recipe, name, folder, world, autocast=autocast, validate=validate, track=track
    )
    weights = with_originals(_whole_weights(placed, world), originals)
    if world.is_first:
        plot_metrics(run.metrics(name), folder / "loss.png")
        changes = measure_change(model, weights, start)
        found = contradictions(
            changes, tuned, images=sum(row["images"] for row in read_lines(run.metrics(name)))
        )
        write_report(folder / "tuning.json", tuned, stage, changes, found)
        console.print(change_table(f"{name}: what moved", changes))
        refuse_contradictions(folder / "tuning.json")
        if stage.tuning.adapted:
            whole = [
                module
                for part in PARTS
                for module in tuned_modules(model, part, stage.tuning.of(part))
            ]
            save_adapter(model, weights, whole, base, folder / "adapter")
            weights = merged_weights(model, weights)
            remove_adapters(model)
        save_checkpoint(model, processor, run.checkpoint(name), weights)
        _drop_states(run, name)
    world.barrier()


def _whole_weights(placed: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """All weights on the first process, each once: of a tied head, sharding makes a second tensor that is the embeddings again."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(placed, options=whole) if world.size > 1 else placed.state_dict()
    every, once = (
        dict(placed.named_parameters(remove_duplicate=remove)) for remove in (False, True)
    )
    return {
        name: weight for name, weight in weights.items() if name not in every.keys() - once.keys()
    }


def _drop_states(run: Run, name: str) -> None:
    """Of a finished stage the exported checkpoint remains."""
    shutil.rmtree(run.states(name), ignore_errors=True)


def _start(
    run: Run, recipe: Recipe, name: str, mixture: Mixture
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model that a stage begins with: the parts, or what the stage before left."""
    if before := recipe.stage_before(name):
        checkpoint = run.checkpoint(before)
        return load_model(str(checkpoint)), load_processor(checkpoint)
    model, processor = build(recipe.model)
    if recipe.model.calibrate_projector:
        calibrate_projector(
            model,
            _first_images(
                mixture, processor, recipe.stages[name].unreadable_images == "substitute"
            ),
        )
    return model, processor


def _first_images(mixture: Mixture, processor: LlavaProcessor, only_readable: bool) -> torch.Tensor:
    """The images that the projector's start is measured on, `(images, 3, height, width)`."""
    sources: dict[ImageSource, None] = {}
    for sample in mixture:
        sources |= dict.fromkeys(sample.images)
        if len(sources) >= CALIBRATION_IMAGES:
            break
    images = [open_image(source) for source in sources if not only_readable or is_readable(source)]
    if not images:
        raise ValueError(
            "calibrate_projector needs images, but the first stage's data have none: set model.calibrate_projector=false"
        )
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def _announce(name: str, mixture: Mixture, steps: StepDataset, tuned: list[TunedPart]) -> None:
    title = f"{name}: {len(mixture):,} samples, {len(steps):,} steps of {steps.stage.batch_size} samples"
    console.print(tuning_table(title, tuned, steps.stage))
    for note in mixture.notes:
        console.print(f"[yellow]{note}")
