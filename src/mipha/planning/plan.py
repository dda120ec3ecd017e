"""What a recipe will take, before it takes it: parameters, memory by component, time, tokens, money.

recipe --skeleton on the meta device--> parameters --layers run on tensors without numbers--> bytes kept for the backward pass
data   --first steps of the stage, or what is known of a published set--> tokens, images, FLOPs of a step --device--> seconds

Memory is counted (`memory.py`), not fitted: what that leaves out (the allocator's holes, a library's buffers) is the reserve. Time is FLOPs
by a share of the peak that is an assumption until a run has been measured: `compare` says how far off both were.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil

import torch

from mipha.catalog.devices import DEVICES
from mipha.catalog.published_data import PUBLISHED_DATA, PublishedData
from mipha.data.batches import StepDataset
from mipha.data.mixture import Mixture
from mipha.data.order import count_steps, samples_shown
from mipha.files import read_lines
from mipha.lookup import did_you_mean
from mipha.models.build import load_parts_processor, skeleton
from mipha.models.flops import StepFlops, Work
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import TunedPart, apply_tuning
from mipha.planning.memory import MicroBatch, kept_bytes, memory_of
from mipha.recipe import Recipe, StageRecipe
from mipha.run import Run

EFFICIENCY = {"gpu": 0.4, "cpu": 0.5}
"""Share of the peak that a step reaches, where no run says better: 0.4 is common for models of this size on an H100; 0.5 of its own
matrix products is what the quickstart reached on two cores (LOG.md)."""

_STEPS_LOOKED_AT = 3
_RESERVE = 0.9
"""Share of a device's memory that a plan may use."""


@dataclass(frozen=True)
class Device:
    """What a plan is made for.

    Args:
        name: As asked.
        kind: gpu or cpu.
        flops: Peak of one device in the type that the recipe computes in, FLOP/s; null where that is not known.
        memory: Bytes of one device.
        autocast: Whether matrix products run in bfloat16.
    """

    name: str
    kind: str
    flops: float | None
    memory: float
    autocast: bool


@dataclass(frozen=True)
class StepWork:
    """A mean step of a stage.

    Args:
        work: Of all devices.
        padding: Share of the positions computed that is padding.
        micro_batches: A device computes one after the other.
        widest: The widest micro-batch.
        source: Where these come from.
    """

    work: Work
    padding: float
    micro_batches: float
    widest: MicroBatch
    source: str


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Args:
        parts: What trains.
        memory: Component to bytes a device, at the largest micro-batch.
        flops: Of a step, all devices.
        seconds: Of a step; null where the device's peak is not known.
        largest_rows: The most micro_batch_rows that fit; 0: none.
        mends: What would make it fit, best first; empty where it does.
    """

    name: str
    stage: StageRecipe
    parts: tuple[TunedPart, ...]
    samples: int
    steps: int
    step: StepWork
    memory: dict[str, float]
    flops: float
    seconds: float | None
    largest_rows: int
    mends: tuple[str, ...]

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def hours(self) -> float | None:
        return None if self.seconds is None else self.steps * self.seconds / 3600


@dataclass(frozen=True)
class Compared:
    """A finished stage beside its plan: seconds a step, and bytes of one device."""

    seconds: tuple[float | None, float]
    memory: tuple[float, float]
    efficiency: float | None


def device_named(name: str, precision: str = "auto") -> Device:
    """A device of the catalog, or this machine's CPU (`cpu`), whose matrix products are measured.

    Raises:
        ValueError: No such device, or it has no units for the precision.
    """
    if name == "cpu":
        native = torch.cpu._is_avx512_bf16_supported()
        autocast = precision == "bfloat16" or (precision == "auto" and native)
        return Device(
            name,
            "cpu",
            _measured_flops(torch.bfloat16 if autocast else torch.float32),
            _host_memory(),
            autocast,
        )
    if name not in DEVICES:
        raise ValueError(
            f"no device {name!r}: {did_you_mean(name, ['cpu', *DEVICES])}; known are cpu, {', '.join(DEVICES)}"
        )
    entry = DEVICES[name]
    autocast = precision == "bfloat16" or (
        precision == "auto" and entry.bfloat16_tflops is not None
    )
    tflops = entry.tflops("bfloat16" if autocast else "float32")
    if tflops is None:
        raise ValueError(f"{name} does not compute in bfloat16: set precision=float32")
    return Device(name, "gpu", tflops * 1e12, entry.memory_gb * 1e9, autocast)


def plan(
    recipe: Recipe, device: Device, num_devices: int = 1, efficiency: float | None = None
) -> list[StagePlan]:
    """What each stage takes.

    Args:
        num_devices: The weights that train, their gradients and moments are spread over these (FSDP) unless the recipe says `ddp`.
        efficiency: Share of the peak that a step reaches; null: an assumption.

    Raises:
        FileNotFoundError: A part, or a data set that is not a published one, is not there.
        ValueError: The parts do not go together.
    """
    return [
        _plan_stage(recipe, name, device, num_devices, efficiency or EFFICIENCY[device.kind])
        for name in recipe.stages
    ]


def compare(stage: StagePlan, run: Run, device: Device, num_devices: int) -> Compared:
    """A stage's plan beside the metrics of a run of the same recipe.

    Raises:
        FileNotFoundError: The run has no steps of this stage.
    """
    rows = list(read_lines(run.metrics(stage.name)))[1:]  # the first step warms up
    if not rows:
        raise FileNotFoundError(
            f"{run.folder} has no metrics of {stage.name}: give a run that trained it"
        )
    seconds = statistics.median(row["seconds"] for row in rows)
    peak = device.flops and device.flops * num_devices
    reached = stage.flops / seconds / peak if peak else None
    return Compared(
        (stage.seconds, seconds),
        (stage.total_memory, max(row["peak_memory_gib"] for row in rows) * 2**30),
        reached,
    )


def _plan_stage(
    recipe: Recipe, name: str, device: Device, num_devices: int, efficiency: float
) -> StagePlan:
    stage: StageRecipe = recipe.stages[name]
    model = skeleton(recipe.model)
    parts = tuple(
        apply_tuning(model, stage.tuning, "meta", torch.bfloat16 if device.autocast else None)
    )
    samples, steps, step = _steps_of(recipe, stage, model, num_devices)
    flops = StepFlops(model)
    total = float(flops.total(step.work))
    memory = memory_of(
        model, stage, step.widest, device.kind, device.autocast, _shards(recipe, num_devices)
    )
    rows = _largest_rows(stage, model, step, device, memory)
    seconds = None
    if device.flops:
        again = sum(
            flops.by_part(step.work)[part].forward for part in stage.checkpointed
        )  # computed twice, worth nothing
        seconds = (total + again) / (1 - step.padding) / (device.flops * num_devices * efficiency)
    fits = sum(memory.values()) <= _RESERVE * device.memory
    mends = () if fits else _mends(recipe, name, device, num_devices, step)
    return StagePlan(name, stage, parts, samples, steps, step, memory, total, seconds, rows, mends)


def _shards(recipe: Recipe, num_devices: int) -> int:
    """Devices that weights are spread over."""
    return 1 if recipe.sharding == "ddp" else num_devices


def _largest_rows(
    stage: StageRecipe,
    model: LlavaForConditionalGeneration,
    step: StepWork,
    device: Device,
    memory: dict[str, float],
) -> int:
    """The most rows of a micro-batch that fit: what is kept grows evenly with them."""
    batch = step.widest
    one, two = (
        memory["activations"],
        kept_bytes(
            model,
            stage,
            MicroBatch(2 * batch.rows, batch.tokens, 2 * batch.images),
            device.autocast,
        ),
    )
    fixed = sum(memory.values()) - one
    room = _RESERVE * device.memory - fixed - (2 * one - two)
    return max(0, int(room / (two - one) * batch.rows)) if two > one else 0


def _mends(
    recipe: Recipe, name: str, device: Device, num_devices: int, step: StepWork
) -> tuple[str, ...]:
    """Changes of the recipe, each on top of those before it, until the stage fits."""
    levers = (
        "activation_checkpointing=true",
        "micro_batch_rows=1",
        "tuning.language_model=lora",
        "tuning.language_model=qlora",
    )
    chosen: list[str] = []
    for lever in levers:
        if lever.endswith("lora") and recipe.stages[name].tuning.language_model != "full":
            continue
        if lever.endswith("qlora") and (num_devices > 1 or find_spec("bitsandbytes") is None):
            continue  # one device only; and its layers are what is counted
        chosen = [*(kept for kept in chosen if kept.split("=")[0] != lever.split("=")[0]), lever]
        changed = recipe.override(*(f"stages.{name}.{one}" for one in chosen))
        stage = changed.stages[name]
        model = skeleton(changed.model)
        apply_tuning(model, stage.tuning, "meta", torch.bfloat16 if device.autocast else None)
        widest = step.widest
        rows = min(widest.rows, stage.micro_batch_rows)
        batch = MicroBatch(rows, widest.tokens, ceil(widest.images * rows / widest.rows))
        total = sum(
            memory_of(
                model, stage, batch, device.kind, device.autocast, _shards(recipe, num_devices)
            ).values()
        )
        if total <= _RESERVE * device.memory:
            return tuple(f"stages.{name}.{one}" for one in chosen)
    return (f"more than {num_devices} devices, or devices with more memory",)


def _steps_of(
    recipe: Recipe, stage: StageRecipe, model: LlavaForConditionalGeneration, num_devices: int
) -> tuple[int, int, StepWork]:
    """Samples of the stage, its steps, and a mean one: the first few as they will be, or from what is known of published data."""
    known = [PUBLISHED_DATA.get(data.dataset) for data in stage.data]
    missing = [data for data in stage.data if data.root is not None and not data.root.exists()]
    if missing and all(known):
        return _published_steps(stage, [fact for fact in known if fact], model, num_devices)
    steps = StepDataset(
        Mixture(stage.data, stage.held_out),
        load_parts_processor(recipe.model),
        stage,
        recipe.seed,
        0,
        num_devices,
    )
    looked_at = [steps[number] for number in range(min(_STEPS_LOOKED_AT, len(steps)))]
    widest = max(
        (batch for step in looked_at for batch in step.micro_batches),
        key=lambda batch: batch["input_ids"].numel(),
    )
    images = max(
        len(batch["pixel_values"]) if "pixel_values" in batch else 0
        for step in looked_at
        for batch in step.micro_batches
    )
    counts = [
        Work(step.num_images, step.num_tokens, step.num_pairs, step.num_supervised)
        for step in looked_at
    ]
    work = Work(
        *(
            round(statistics.mean(getattr(count, key) for count in counts))
            for key in ("images", "tokens", "pairs", "supervised")
        )
    )
    padding = 1 - sum(step.num_tokens for step in looked_at) / sum(
        step.num_padded for step in looked_at
    )
    micro_batches = statistics.mean(len(step.micro_batches) for step in looked_at)
    shape = widest["input_ids"].shape
    source = f"the first {len(looked_at)} steps"
    return (
        len(steps.mixture),
        len(steps),
        StepWork(work, padding, micro_batches, MicroBatch(shape[0], shape[1], images), source),
    )


def _published_steps(
    stage: StageRecipe,
    known: Sequence[PublishedData],
    model: LlavaForConditionalGeneration,
    num_devices: int,
) -> tuple[int, int, StepWork]:
    """From the facts of published sets that are not on this machine; how their lengths spread is not known, so rows are full or mean."""
    sizes = [
        min(fact.samples, data.limit or fact.samples)
        for fact, data in zip(known, stage.data, strict=True)
    ]
    samples = sum(sizes)
    steps, _ = count_steps(
        stage,
        sum(
            samples_shown(size, data.weight, data.cap)
            for size, data in zip(sizes, stage.data, strict=True)
        ),
    )
    image_tokens, size = model.config.image_seq_length, stage.batch_size

    def mean(key: str) -> float:
        return sum(getattr(fact, key) * fact.samples for fact in known) / sum(
            fact.samples for fact in known
        )

    length = mean("images") * image_tokens + mean("text_tokens")
    longest = (
        min(stage.row_tokens, image_tokens + 2 * mean("text_tokens"))
        if stage.batching == "padded"
        else stage.row_tokens
    )
    padding = 0.05 if stage.batching != "padded" else 1 - length / longest
    pairs = length * (length + 1) / 2
    work = Work(
        *(round(size * each) for each in (mean("images"), length, pairs, mean("supervised_tokens")))
    )
    rows = size if stage.batching == "padded" else ceil(size * length / longest)
    own = max(1, ceil(rows / num_devices))
    widest = min(stage.micro_batch_rows, own)
    images = ceil(widest * (1 if stage.batching == "padded" else longest / length))
    step = StepWork(
        work,
        padding,
        ceil(own / widest),
        MicroBatch(widest, round(longest), images),
        "; ".join(fact.source for fact in known),
    )
    return samples, steps, step


def _measured_flops(dtype: torch.dtype) -> float:
    """What this machine's processor reaches in matrix products of this type, FLOP/s, on the threads that torch uses."""
    left, right = torch.ones(1024, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return 2 * 1024 * 2048 * 2048 / statistics.median(times[1:])


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
