"""Recipe -> trained model, stage by stage; skips what is done and resumes what is not.

Each stage: build, tune, place, steps, prove, export. Its checkpoint is a standard model folder, and
appears when the stage is finished; the next stage starts from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaProcessor

from mipha.comparison.figures import plot_metrics
from mipha.data.batches import StepDataset
from mipha.data.encode import encode_for
from mipha.data.images import ImageSource, is_readable, open_image
from mipha.data.mixture import Mixture
from mipha.data.packing import Row
from mipha.data.pixels import read_pixels
from mipha.engine.machine import check_free_space
from mipha.engine.trackers import check_trackers
from mipha.files import (
    changed_files,
    describe_file,
    read_json_object,
    read_lines,
    whole_folder,
    write_whole,
)
from mipha.geometry import geometry_of
from mipha.models.adapters import merged_weights, remove_adapters, save_adapter
from mipha.models.attention import SEGMENTS, choose_attention
from mipha.models.attention_kernels import row_lengths
from mipha.models.build import build, checkpoint_folder, load_start_processor, save_checkpoint
from mipha.models.fingerprint import checkpoint_digest
from mipha.models.flops import StepFlops, Work
from mipha.models.modeling import (
    LlavaForConditionalGeneration,
    attention_window,
    is_recurrent,
    load_model,
)
from mipha.models.processing import load_processor, set_padding
from mipha.models.projector import calibrate_projector
from mipha.models.quantization import check_quantization
from mipha.models.tuning import (
    TunedPart,
    apply_tuning,
    check_tuning,
    describe_tuning,
    tuned_modules,
)
from mipha.preflight import check_writable
from mipha.recipe import PARTS, CheckpointRecipe, DataRecipe, ModelRecipe, Recipe
from mipha.run import Run, check_run, create_run, hold_run
from mipha.terminal import Console
from mipha.training.loop import run_steps
from mipha.training.placement import gather_weights, place, restore_frozen, round_frozen
from mipha.training.proof import (
    change_table,
    contradictions,
    measure_change,
    record_start,
    refuse_contradictions,
    tuning_table,
    write_report,
)
from mipha.training.stage import Stage
from mipha.training.validation import Validation
from mipha.world import World, join_world

console = Console()

TrainDpo = Callable[[Recipe, str, Path, Path], Path]
"""Trains a dpo stage of a recipe from a checkpoint in a folder; returns the model's folder."""

CALIBRATION_IMAGES = 64
"""Enough for the mean and deviation of each channel: hundreds of patches each."""


def train(
    recipe: Recipe,
    folder: str | Path,
    track: Sequence[str] = (),
    profile: int = 0,
    train_dpo: TrainDpo | None = None,
) -> Run:
    """Train the stages of a recipe in a run folder; run again, it goes on where it stopped.

    Args:
        recipe: Recipe of the run.
        folder: New folder, or the run folder of this same recipe.
        track: Trackers that follow the metrics: wandb, trackio. TensorBoard always does, where it
            is installed.
        profile: Steps of each stage to trace, after five: see `engine/profile.py`.
        train_dpo: Trainer of dpo stages; None where there are none.

    Returns:
        The run, with a standard checkpoint for each stage.

    Raises:
        ValueError, FileNotFoundError: Something that the user can fix, before the first step where
            it can be known; also data that changed since the run began.
        OSError: The disk cannot hold the run, or the folder cannot be written to.
    """
    check_trackers(track)
    world, folder = join_world(), Path(folder)
    if world.is_first and not folder.is_file():
        check_writable(folder)

    # One process at a time trains in a folder, with those that it trains together with.
    with hold_run(folder) if world.is_first else nullcontext():
        return _train(recipe, folder, track, profile, train_dpo, world)


def _train(
    recipe: Recipe,
    folder: Path,
    track: Sequence[str],
    profile: int,
    train_dpo: TrainDpo | None,
    world: World,
) -> Run:
    """Train the stages of a recipe in a folder that is held."""
    # Find the stages that are not finished in the folder.
    check_run(folder, recipe)
    run = Run(folder)
    unfinished = [name for name in recipe.stages if not run.is_finished(name)]
    stages = [Stage(run, recipe, name, world, track, profile) for name in unfinished]

    # Read the data of all stages before the first trains: a broken record ends the run now, and
    # leaves no run folder.
    data = {stage.name: _read_data(stage) for stage in stages if not stage.is_dpo}

    # So do tokens or a chat template of the checkpoint that cannot be trained on.
    if isinstance(recipe.model, CheckpointRecipe) and stages and stages[0].before is None:
        load_start_processor(recipe.model)

    # Begin: the run folder, with the recipe and a record of the data.
    world.barrier()
    if world.is_first:
        create_run(folder, recipe)
        for name, (mixture, _, sha256) in data.items():
            facts = {"samples": len(mixture), "sha256": sha256}
            run.record_data(
                name, facts | ({"commits": found} if (found := mixture.commits) else {})
            )
    world.barrier()

    # A process that was killed between its last two lines left states of a finished stage.
    if world.is_first:
        for name in recipe.stages.keys() - unfinished:
            _drop_states(run, name)

    for stage in stages:
        if stage.is_dpo:
            assert train_dpo is not None, "the caller gives the trainer of dpo stages"
            made = train_dpo(recipe, stage.name, _find_start(stage), stage.folder / "dpo")
            _adopt_checkpoint(stage, made)
        else:
            mixture, held_out, _ = data[stage.name]
            train_stage(stage, mixture, held_out)
    return run


def train_stage(stage: Stage, mixture: Mixture, held_out: Mixture | None) -> None:
    """Train one stage and export its checkpoint.

    Args:
        mixture: Samples to train on.
        held_out: Samples to validate on, if any.
    """
    run, world, seed, settings = stage.run, stage.world, stage.recipe.seed, stage.settings

    # Build: the model that the stage starts from.
    torch.manual_seed(seed)  # for the first weights of the projector
    model, processor = _load_start(stage, mixture)
    _check_build(stage, model, processor, mixture)

    # Tune: choose what trains, keep a record of the start, and round what is frozen.
    torch.manual_seed(seed)  # for the first weights of adapters
    apply_tuning(model, settings.tuning, world.device, stage.autocast)
    if world.is_first:
        _record_start(stage, model)
    in_bfloat16 = stage.autocast is torch.bfloat16
    originals = round_frozen(model, world.device) if in_bfloat16 else {}
    tuned = describe_tuning(model, settings.tuning)

    # The steps: their samples, dealt to the processes by the work that they are.
    lengths = () if stage.attention == SEGMENTS else row_lengths(settings.row_tokens)
    work = _work_of_rows(StepFlops(model))
    steps = StepDataset(mixture, processor, settings, seed, world.rank, world.size, lengths, work)
    if world.is_first:
        _announce(stage, mixture, steps, tuned)
    world.barrier()

    # Place the model on its device, or spread it over many.
    place(model, stage)

    # Steps: to the last one, from the newest training state.
    validation = Validation(stage, held_out, processor) if held_out is not None else None
    run_steps(stage, model, steps, validation.measure if validation else None)

    # Prove that exactly the tuned weights moved.
    weights = restore_frozen(gather_weights(model, world), originals)
    if world.is_first:
        plot_metrics(run.metrics(stage.name), stage.folder / "loss.png")
        _prove(stage, model, weights, tuned)

    # Export the checkpoint, which finishes the stage; its training states go.
    if world.is_first:
        _export(stage, model, processor, weights)
        _drop_states(run, stage.name)
    world.barrier()


def _work_of_rows(flops: StepFlops) -> Callable[[Row], int]:
    """Return the function from a row to its FLOPs."""
    return lambda row: flops.total(Work(row.num_tiles, len(row), row.num_pairs, row.num_supervised))


def _read_data(stage: Stage) -> tuple[Mixture, Mixture | None, str]:
    """Read and check the samples of a stage.

    Returns:
        Those to train on, those held out, and the hash of the first.
    """
    settings = stage.settings
    check_quantization(settings.tuning, stage.world.device, stage.world.size)
    choose_attention(stage.recipe.attention, stage.world.device, stage.autocast)
    commits = stage.run.commits(stage.name)
    mixture = Mixture([pin(data, commits) for data in settings.data], settings.held_out)
    held_out = mixture.on_side("validation") if settings.held_out else None

    return mixture, held_out, mixture.check()


def pin(data: DataRecipe, commits: Mapping[str, str]) -> DataRecipe:
    """Return a data set at the commit that its branch was resolved to when the run began."""
    commit = commits.get(str(data.root))
    return data if commit is None else data.model_copy(update={"revision": commit})


def _load_start(
    stage: Stage, mixture: Mixture
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return the model that a stage starts from: that of the stage before, or of the recipe."""
    if stage.before:
        checkpoint = stage.run.checkpoint(stage.before)
        _check_checkpoint(stage, checkpoint)
        processor = load_processor(checkpoint)
        set_padding(processor, stage.recipe.model, stage.settings)
        return load_model(str(checkpoint)), processor

    # A checkpoint may be another one when the run goes on.
    start = stage.recipe.model
    if isinstance(start, CheckpointRecipe) and stage.world.is_first:
        digest = checkpoint_digest(checkpoint_folder(start))
        stage.run.record_start(stage.name, {"checkpoint": start.checkpoint, "sha256": digest})

    model, processor = build(start)
    set_padding(processor, start, stage.settings)
    if isinstance(start, ModelRecipe) and start.calibrate_projector:
        only_readable = stage.settings.unreadable_images == "substitute"
        calibrate_projector(model, _first_images(mixture, processor, only_readable))
    return model, processor


def _check_checkpoint(stage: Stage, checkpoint: Path) -> None:
    """Refuse a checkpoint of the stage before that is not what that stage exported."""
    assert stage.before is not None
    world, record = stage.world, stage.run.checkpoint_record(stage.before)
    if not record.is_file():
        if world.is_first:
            note = f"{checkpoint} has no checksums: an older version exported it"
            console.print(note, style="yellow", markup=False)
        return

    # Hash: every process its part of the files.
    files = sorted(read_json_object(record, fix="delete it, and nothing is checked").items())
    changed = changed_files(checkpoint, dict(files[world.rank :: world.size]))
    if world.total(torch.tensor(len(changed), device=world.device)):
        named = f": {', '.join(changed)}" if changed else ""
        raise ValueError(
            f"{checkpoint} is not what {stage.before} exported (another checksum{named}): "
            f"put those files back, or delete {checkpoint.parent} to train that stage again"
        )


def _first_images(
    mixture: Mixture, processor: LlavaProcessor, only_readable: bool
) -> dict[str, Tensor]:
    """Return the images that set the projector's start, as the tower reads them."""
    sources: dict[ImageSource, None] = {}
    for sample in mixture:
        sources |= dict.fromkeys(sample.images)
        if len(sources) >= CALIBRATION_IMAGES:
            break
    images = [open_image(source) for source in sources if not only_readable or is_readable(source)]
    if not images:
        raise ValueError(
            "calibrate_projector needs images, but the data of the first stage have none: "
            "set model.calibrate_projector=false"
        )
    return read_pixels(images, processor)


def _check_build(
    stage: Stage, model: LlavaForConditionalGeneration, processor: LlavaProcessor, mixture: Mixture
) -> None:
    """Refuse what would fail later, and save the base that adapters need."""
    settings = stage.settings
    window = attention_window(model.config)
    if window and settings.batching != "padded" and settings.row_tokens > window:
        raise ValueError(
            f"stages.{stage.name}.row_tokens={settings.row_tokens} is more than the {window} "
            "tokens that this language model's sliding layers see, and packed rows know no window: "
            f"set stages.{stage.name}.batching=padded, or row_tokens={window}"
        )
    kind = model.config.text_config.model_type
    if settings.batching != "padded" and is_recurrent(model.config):
        raise ValueError(
            f"row packing would let samples read one another through the {kind} language model's "
            f"convolutions or recurrent layers: set stages.{stage.name}.batching=padded"
        )
    geometry = geometry_of(processor)
    if geometry.depends_on_size and geometry.longest >= settings.row_tokens:
        raise ValueError(
            f"one image may take {geometry.longest} tokens of "
            f"stages.{stage.name}.row_tokens={settings.row_tokens}: raise row_tokens"
            + (
                ", or lower model.max_tiles or model.max_image_tokens"
                if isinstance(stage.recipe.model, ModelRecipe)
                else ""
            )
        )
    encode_for(mixture[0], processor, settings)
    check_tuning(model, settings.tuning)

    # An adapter needs its base, and the base of the first stage is on no disk yet.
    if stage.world.is_first and settings.tuning.adapted and not stage.base.is_dir():
        stage.folder.mkdir(parents=True, exist_ok=True)
        check_free_space(stage.folder, _num_bytes(model))
        save_checkpoint(model, processor, stage.base)


def _record_start(stage: Stage, model: LlavaForConditionalGeneration) -> None:
    """Check that the disk holds the stage, and keep the weights that the proof compares with."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    # Each state has the weights that train and two moments of each; one more is being written.
    # The start, the adapter and the checkpoint come on top.
    states = 3 * (stage.recipe.keep_states + 1)
    trained = _num_bytes(model, only_trained=True)
    check_free_space(stage.folder, (states + 2) * trained + _num_bytes(model))
    refuse_contradictions(stage.report)
    record_start(model, stage.start)


def _num_bytes(model: LlavaForConditionalGeneration, only_trained: bool = False) -> int:
    weights = (w for w in model.parameters() if w.requires_grad or not only_trained)
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _announce(
    stage: Stage, mixture: Mixture, steps: StepDataset, tuned: Sequence[TunedPart]
) -> None:
    """Show and write down what will train."""
    settings = stage.settings
    size = f"{len(mixture):,} samples, {len(steps):,} steps of {settings.batch_size} samples"
    console.print(tuning_table(f"{stage.name}: {size}", tuned, settings))
    for note in mixture.notes:
        console.print(note, style="yellow", markup=False)
    write_report(stage.report, tuned, settings)


def _prove(
    stage: Stage,
    model: LlavaForConditionalGeneration,
    weights: dict[str, Tensor],
    tuned: Sequence[TunedPart],
) -> None:
    """Compare the weights with the start; refuse a stage that did not train what it should."""
    num_images = sum(row["images"] for row in read_lines(stage.run.metrics(stage.name)))
    changes = measure_change(model, weights, stage.start)
    found = contradictions(changes, tuned, num_images)
    write_report(stage.report, tuned, stage.settings, changes, found)
    console.print(change_table(f"{stage.name}: what moved", changes))
    refuse_contradictions(stage.report)


def _export(
    stage: Stage,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    weights: dict[str, Tensor],
) -> None:
    """Write the checkpoint; adapters are saved by themselves, and merged into it."""
    tuning = stage.settings.tuning
    if tuning.adapted:
        whole = [module for part in PARTS for module in tuned_modules(model, part, tuning.of(part))]
        folder, template = stage.folder / "adapter", processor.chat_template
        save_adapter(model, weights, whole, stage.base, folder, template)
        weights = merged_weights(model, weights)
        remove_adapters(model)

    # The checksums are there before the checkpoint is.
    with whole_folder(stage.run.checkpoint(stage.name)) as partial:
        save_checkpoint(model, processor, partial, weights)
        files = {path.name: describe_file(path) for path in sorted(partial.iterdir())}
        record = stage.run.checkpoint_record(stage.name)
        write_whole(record, json.dumps(files, indent=1) + "\n")


def _find_start(stage: Stage) -> Path:
    """Return the checkpoint that a stage starts from."""
    if stage.before:
        checkpoint = stage.run.checkpoint(stage.before)
        _check_checkpoint(stage, checkpoint)
        return checkpoint
    assert isinstance(stage.recipe.model, CheckpointRecipe)
    return checkpoint_folder(stage.recipe.model)


def _adopt_checkpoint(stage: Stage, made: Path) -> None:
    """Move a model folder that another trainer made to the place of a stage's checkpoint."""
    files = {path.name: describe_file(path) for path in sorted(made.iterdir())}
    record = stage.run.checkpoint_record(stage.name)
    write_whole(record, json.dumps(files, indent=1) + "\n")
    made.rename(stage.run.checkpoint(stage.name))


def _drop_states(run: Run, name: str) -> None:
    """Delete the training states of a finished stage; its checkpoint remains."""
    shutil.rmtree(run.states(name), ignore_errors=True)
