"""Prediction of what a recipe takes: parameters, memory, time.

recipe --skeleton on the meta device--> parameters --layers run on fake tensors--> memory
data   --first steps of the stage, or facts of a published set--> FLOPs of a step --device--> time

Memory is counted (`memory.py`), not fitted; what the count leaves out (holes of the allocator,
buffers of libraries) is the reserve. Time is FLOPs by a share of the peak, which is an assumption
until a run has been measured: `compare_with_run` says how far off both were.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import torch

from mipha.catalog.devices import device_entry
from mipha.catalog.published_data import PUBLISHED_DATA, PublishedData
from mipha.data.alignment import load_image_preferences, split_by_prompt
from mipha.data.batches import StepDataset
from mipha.data.encode import encode
from mipha.data.mixture import Mixture
from mipha.data.order import count_steps, samples_shown
from mipha.engine.machine import main_memory, measure_flops
from mipha.files import read_lines
from mipha.models.build import load_start_processor, skeleton
from mipha.models.flops import StepFlops, Work
from mipha.models.memory import (
    RESERVE,
    MicroBatch,
    kept_bytes,
    memory_of,
    memory_of_copies,
    memory_of_pairs,
)
from mipha.models.modeling import LlavaForConditionalGeneration, tile_tokens
from mipha.models.tuning import TunedPart, apply_tuning
from mipha.recipe import DpoStageRecipe, ModelRecipe, Recipe, StageRecipe
from mipha.run import Run

EFFICIENCY = {"gpu": 0.4, "cpu": 0.5}
"""Share of the peak that a step is assumed to reach, where no run was measured.

Nothing stands behind these numbers but experience, so every plan made with them says "assumed".
"""

_STEPS_READ = 3
_LEVERS = (
    "activation_checkpointing=selective",
    "activation_checkpointing=true",
    "micro_batch_rows=1",
    "tuning.language_model=lora",
    "tuning.language_model=qlora",
)
"""Changes of a stage that save memory, those first that change least what is trained."""

_DPO_LEVERS = ("activation_checkpointing=true", "micro_batch=1", "tuning=lora")
_PAIRS_READ = 512


@dataclass(frozen=True)
class Device:
    """The device that a plan is made for.

    Args:
        name: Name that was asked for.
        kind: gpu or cpu.
        flops: Peak of one device in the type that the recipe computes in, FLOP/s; None where it is
            not known.
        memory: Memory of one device, bytes.
        autocast: Whether matrix products run in bfloat16.
    """

    name: str
    kind: str
    flops: float | None
    memory: float
    autocast: bool

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that matrix products run in; None for the type of the weights."""
        return torch.bfloat16 if self.autocast else None


@dataclass(frozen=True)
class StepWork:
    """A mean step of a stage.

    Args:
        work: Work of all devices.
        padding: Share of the computed positions that is padding.
        micro_batches: Micro-batches that a device computes one after the other.
        widest: The widest micro-batch.
        source: Origin of these numbers.
    """

    work: Work
    padding: float
    micro_batches: float
    widest: MicroBatch
    source: str


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Args:
        stage: Settings of the stage; of a dpo stage, its `as_answers`.
        parts: The trained share of each part.
        samples: Samples of the stage.
        steps: Optimizer steps of the stage.
        step: A mean step.
        sharding: How several devices share the model: ddp, fsdp or hsdp.
        memory: Bytes of a device by component, at the widest micro-batch.
        flops: FLOPs of a step on all devices.
        seconds: Seconds of a step; None where the peak of the device is not known.
        efficiency: Share of the peak that these seconds rest on.
        is_assumed: Whether that share is an assumption, and not one that the user gave.
        largest_rows: The largest micro_batch_rows that fits; 0 where none does. A pair of a dpo
            stage is two rows.
        fixes: Changes that would make it fit; empty where it does.
    """

    name: str
    stage: StageRecipe
    parts: tuple[TunedPart, ...]
    samples: int
    steps: int
    step: StepWork
    sharding: str
    memory: dict[str, float]
    flops: float
    seconds: float | None
    efficiency: float
    is_assumed: bool
    largest_rows: int
    fixes: tuple[str, ...]

    @property
    def total_memory(self) -> float:
        """Bytes of a device, all components."""
        return sum(self.memory.values())

    @property
    def hours(self) -> float | None:
        """Hours of the whole stage."""
        return None if self.seconds is None else self.steps * self.seconds / 3600


@dataclass(frozen=True)
class Compared:
    """A finished stage beside its plan, each as (planned, measured).

    Args:
        seconds: Seconds of a step.
        memory: Bytes of a device.
        efficiency: Share of the peak that the run reached.
    """

    seconds: tuple[float | None, float]
    memory: tuple[float, float]
    efficiency: float | None


def device_named(name: str, precision: str = "auto") -> Device:
    """Return a device of the catalog, or this machine's CPU (`cpu`), which is measured.

    Raises:
        ValueError: There is no such device, or it has no units for the precision.
    """
    entry = device_entry(name)
    if entry is None:
        native = torch.cpu._is_avx512_bf16_supported()
        autocast = precision == "bfloat16" or (precision == "auto" and native)
        flops = measure_flops(torch.bfloat16 if autocast else torch.float32)
        return Device(name, "cpu", flops, main_memory(), autocast)

    native = entry.bfloat16_tflops is not None
    autocast = precision == "bfloat16" or (precision == "auto" and native)
    tflops = entry.tflops("bfloat16" if autocast else "float32")
    if tflops is None:
        raise ValueError(f"{name} does not compute in bfloat16: set precision=float32")
    return Device(name, "gpu", tflops * 1e12, entry.memory_gb * 1e9, autocast)


def plan_training(
    recipe: Recipe, device: Device, num_devices: int = 1, efficiency: float | None = None
) -> list[StagePlan]:
    """Plan each stage of a recipe.

    Args:
        num_devices: Devices that train together, on one machine where the recipe does not say how
            they share the model: each holds it whole where it fits, else it is spread over them.
        efficiency: Share of the peak that a step reaches; None for an assumption.

    Raises:
        FileNotFoundError: A part, or a data set that is not a published one, is not there.
        ValueError: The parts do not go together, a pair is at fault, or several devices are asked
            for a dpo stage.
    """
    cases = [_Case(recipe, name, device, num_devices) for name in recipe.stages]
    if num_devices > 1 and (alone := [case.name for case in cases if case.dpo]):
        raise ValueError(
            f"stages.{alone[0]} is a dpo stage, which trains in one process: plan with one device"
        )
    return [_plan_stage(case, efficiency) for case in cases]


def compare_with_run(stage: StagePlan, run: Run, device: Device, num_devices: int) -> Compared:
    """Compare the plan of a stage with the metrics of a run of the same recipe.

    Raises:
        FileNotFoundError: The run has no steps of this stage.
        ValueError: The run has a single step of it.
    """
    rows = list(read_lines(run.metrics(stage.name)))
    if not rows:
        raise FileNotFoundError(
            f"{run.folder} has no metrics of {stage.name}: give a run that trained it"
        )
    rows = rows[1:]  # the first step warms up
    if not rows:
        raise ValueError(
            f"{run.folder} trained one step of {stage.name}, and the first only warms up: "
            "give a run of two steps or more"
        )

    seconds = statistics.median(row["seconds"] for row in rows)
    memory = max(row["peak_memory_gib"] for row in rows) * 2**30
    peak = device.flops and device.flops * num_devices
    reached = stage.flops / seconds / peak if peak else None
    return Compared((stage.seconds, seconds), (stage.total_memory, memory), reached)


@dataclass(frozen=True)
class _Case:
    """A stage of a recipe on some devices."""

    recipe: Recipe
    name: str
    device: Device
    num_devices: int

    @property
    def dpo(self) -> DpoStageRecipe | None:
        """The settings of a dpo stage; None for a stage that learns from answers."""
        found = self.recipe.stages[self.name]
        return found if isinstance(found, DpoStageRecipe) else None

    @property
    def stage(self) -> StageRecipe:
        return self.dpo.as_answers if self.dpo else self.recipe.stage(self.name)

    def build_model(self) -> LlavaForConditionalGeneration:
        """Return the model on the meta device, with its tuning applied."""
        model = skeleton(self.recipe.model)
        apply_tuning(model, self.stage.tuning, "meta", self.device.dtype)
        return model

    def count_memory(
        self, model: LlavaForConditionalGeneration, batch: MicroBatch, sharding: str
    ) -> dict[str, float]:
        """Return bytes of a device by component."""
        number, device = self.num_devices, self.device
        if self.dpo:
            return memory_of_pairs(model, self.stage, batch, device.kind, device.autocast)
        shards = 1 if sharding == "ddp" else number
        return memory_of(model, self.stage, batch, device.kind, device.autocast, shards, number)

    def choose_sharding(self, model: LlavaForConditionalGeneration) -> str:
        """Return how the devices share the model, as training chooses it."""
        number, device, sharding = self.num_devices, self.device, self.recipe.sharding
        if number == 1 or sharding != "auto":
            return sharding
        whole = memory_of_copies(model, self.stage, device.kind, device.autocast, number)
        return "ddp" if whole <= RESERVE * device.memory else "fsdp"

    def fits(self, memory: dict[str, float]) -> bool:
        return sum(memory.values()) <= RESERVE * self.device.memory


def _plan_stage(case: _Case, efficiency: float | None) -> StagePlan:
    stage, device = case.stage, case.device
    share = efficiency or EFFICIENCY[device.kind]
    model = skeleton(case.recipe.model)
    parts = tuple(apply_tuning(model, stage.tuning, "meta", device.dtype))
    samples, steps, step = _read_pairs(case, case.dpo) if case.dpo else _read_steps(case, model)
    sharding = case.choose_sharding(model)
    memory = case.count_memory(model, step.widest, sharding)

    # Activation checkpointing computes a part's forward pass twice, which is worth nothing; where
    # products are kept, what is computed again is no product.
    flops = StepFlops(model)
    total = float(flops.total(step.work))
    by_part = flops.by_part(step.work)
    again = () if stage.keeps_products else stage.checkpointed
    if case.dpo:  # the model that the stage starts from answers too, forward alone
        total += float(sum(part.forward for part in by_part.values()))
    computed = total + sum(by_part[part].forward for part in again)
    seconds = None
    if device.flops:
        speed = device.flops * case.num_devices * share
        seconds = computed / (1 - step.padding) / speed

    return StagePlan(
        name=case.name,
        stage=stage,
        parts=parts,
        samples=samples,
        steps=steps,
        step=step,
        sharding=sharding,
        memory=memory,
        flops=total,
        seconds=seconds,
        efficiency=share,
        is_assumed=efficiency is None,
        largest_rows=_largest_rows(case, model, step, memory),
        fixes=() if case.fits(memory) else _find_fixes(case, step),
    )


def _largest_rows(
    case: _Case, model: LlavaForConditionalGeneration, step: StepWork, memory: dict[str, float]
) -> int:
    """Return the most rows of a micro-batch that fit; what is kept grows evenly with them."""
    batch = step.widest
    twice = MicroBatch(2 * batch.rows, batch.tokens, 2 * batch.images)
    one = memory["activations"]
    two = kept_bytes(model, case.stage, twice, case.device.autocast)
    if two <= one:
        return 0
    fixed = sum(memory.values()) - one
    room = RESERVE * case.device.memory - fixed - (2 * one - two)
    return max(0, int(room / (two - one) * batch.rows))


def _find_fixes(case: _Case, step: StepWork) -> tuple[str, ...]:
    """Return changes of the recipe, each on top of those before it, until the stage fits."""
    chosen: list[str] = []
    for lever in _DPO_LEVERS if case.dpo else _LEVERS:
        if lever.endswith("selective") and case.recipe.compile:
            continue
        if lever.endswith("lora") and case.stage.tuning.language_model != "full":
            continue
        # 4 bits are for one device, and their layers are what is counted.
        has_package = find_spec("bitsandbytes") is not None
        if lever.endswith("qlora") and (case.num_devices > 1 or not has_package):
            continue

        # A later value of a key replaces the earlier one.
        key = lever.split("=")[0]
        chosen = [*(kept for kept in chosen if kept.split("=")[0] != key), lever]
        fixes = tuple(f"stages.{case.name}.{change}" for change in chosen)
        changed = replace(case, recipe=case.recipe.override(*fixes))

        widest = step.widest
        rows = min(widest.rows, changed.stage.micro_batch_rows)
        batch = MicroBatch(rows, widest.tokens, ceil(widest.images * rows / widest.rows))
        model = changed.build_model()
        sharding = changed.choose_sharding(model)
        if case.fits(changed.count_memory(model, batch, sharding)):
            return fixes
    return (f"more than {case.num_devices} devices, or devices with more memory",)


def _read_steps(case: _Case, model: LlavaForConditionalGeneration) -> tuple[int, int, StepWork]:
    """Return the samples of a stage, its steps, and a mean step.

    The first steps are made as training makes them; for published data that are not on this
    machine, a step follows from what is known of them.
    """
    recipe, stage = case.recipe, case.stage
    known = [PUBLISHED_DATA.get(data.dataset) for data in stage.data]
    missing = [
        data for data in stage.data if isinstance(data.root, Path) and not data.root.exists()
    ]
    if missing and all(known):
        return _published_steps(case, [fact for fact in known if fact], model)

    mixture = Mixture(stage.data, stage.held_out)
    processor = load_start_processor(recipe.model)
    steps = StepDataset(mixture, processor, stage, recipe.seed, 0, case.num_devices)
    first = [steps[number] for number in range(min(_STEPS_READ, len(steps)))]

    # The mean of their work.
    work = Work(
        images=round(statistics.mean(step.num_images for step in first)),
        tokens=round(statistics.mean(step.num_tokens for step in first)),
        pairs=round(statistics.mean(step.num_pairs for step in first)),
        supervised=round(statistics.mean(step.num_supervised for step in first)),
    )
    padding = 1 - sum(step.num_tokens for step in first) / sum(step.num_padded for step in first)
    micro_batches = statistics.mean(len(step.micro_batches) for step in first)

    # The widest micro-batch: the most tokens, and the most images.
    batches = [batch for step in first for batch in step.micro_batches]
    rows, tokens = max((batch["input_ids"].shape for batch in batches), key=lambda s: s.numel())
    images = max(len(batch.get("pixel_values", ())) for batch in batches)
    widest = MicroBatch(rows, tokens, images)

    source = f"the first {len(first)} steps"
    return len(mixture), len(steps), StepWork(work, padding, micro_batches, widest, source)


def _read_pairs(case: _Case, stage: DpoStageRecipe) -> tuple[int, int, StepWork]:
    """Return the training pairs of a dpo stage, its steps, and a mean step.

    The lengths are those of pairs spread over the file.
    """
    rows = load_image_preferences(stage.data, [] if stage.skip_empty else None)
    rows, _ = split_by_prompt(rows, stage.held_out, case.recipe.seed)
    processor = load_start_processor(case.recipe.model)
    read = rows[:: ceil(len(rows) / _PAIRS_READ)]
    sides = [[len(encode(s, processor, stage.max_tokens)) for s in row.samples] for row in read]

    # Both answers show the image, and logits are made of all their tokens.
    lengths, size = [length for pair in sides for length in pair], stage.batch_size
    tokens = round(size * sum(lengths) / len(sides))
    pairs = round(size * sum(length * (length + 1) / 2 for length in lengths) / len(sides))
    work = Work(2 * size, tokens, pairs, tokens)

    # A micro-batch is as long as its longest answer.
    groups = [
        sides[start : start + stage.micro_batch]
        for start in range(0, len(sides), stage.micro_batch)
    ]
    padded = sum(2 * len(group) * max(map(max, group)) for group in groups)
    padding = 1 - sum(lengths) / padded
    widest = MicroBatch(2 * stage.micro_batch, max(lengths), 2 * stage.micro_batch)

    source = f"{len(read):,} pairs of answers"
    step = StepWork(work, padding, size / stage.micro_batch, widest, source)
    return len(rows), stage.num_steps(len(rows)), step


def _published_steps(
    case: _Case, known: Sequence[PublishedData], model: LlavaForConditionalGeneration
) -> tuple[int, int, StepWork]:
    """Return the same from the facts of published data.

    How their lengths spread is not known, so packed rows are full and padded rows have twice the
    mean text.
    """
    stage, size = case.stage, case.stage.batch_size
    # Images that are cut count as the most tiles.
    cut = isinstance(case.recipe.model, ModelRecipe) and case.recipe.model.tiles > 1
    tiles = case.recipe.model.tiles + 1 if cut else 1
    image_tokens = tiles * tile_tokens(model.config)[1]
    sizes = [
        min(fact.samples, data.limit or fact.samples)
        for fact, data in zip(known, stage.data, strict=True)
    ]
    shown = sum(
        samples_shown(count, data.weight, data.cap)
        for count, data in zip(sizes, stage.data, strict=True)
    )
    steps, _ = count_steps(stage, shown)

    def mean(key: str) -> float:
        total = sum(fact.samples for fact in known)
        return sum(getattr(fact, key) * fact.samples for fact in known) / total

    # Tokens of a mean sample, and of the longest row.
    length = mean("images") * image_tokens + mean("text_tokens")
    is_padded = stage.batching == "padded"
    longest = stage.row_tokens
    if is_padded:
        longest = min(longest, image_tokens + 2 * mean("text_tokens"))
    padding = 1 - length / longest if is_padded else 0.05

    pairs = length * (length + 1) / 2
    each = (tiles * mean("images"), length, pairs, mean("supervised_tokens"))
    work = Work(*(round(size * number) for number in each))

    # Rows of a step, of a device, and of its widest micro-batch.
    rows = size if is_padded else ceil(size * length / longest)
    own = max(1, ceil(rows / case.num_devices))
    widest = min(stage.micro_batch_rows, own)
    images = tiles * ceil(widest * (1 if is_padded else longest / length))
    batch = MicroBatch(widest, round(longest), images)

    source = "; ".join(fact.source for fact in known)
    return sum(sizes), steps, StepWork(work, padding, ceil(own / widest), batch, source)
