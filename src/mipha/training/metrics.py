"""The record of a stage's steps: metrics.jsonl, unreadable.jsonl, trackers and the progress."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from mipha.data.batches import Step
from mipha.data.collate import Substituted
from mipha.engine.machine import peak_flops, peak_memory_gib
from mipha.engine.progress import Shown, show_progress
from mipha.engine.trackers import Trackers, last_tracked
from mipha.files import append_line, keep_lines, read_lines
from mipha.models.flops import StepFlops, Work
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.training.stage import Stage

ALL_GONE = 8
"""Number of images of a step; as many unreadable ones mean more than a few damaged files."""

MUCH_WAITING = 0.1
"""Share of a step's time that the progress line mentions if it goes by waiting for a batch."""

Metrics = dict[str, float | int]


class Recorder:
    """Measures the steps of a stage and writes them down; a context, one in every process.

    Lines of steps that will be made again are dropped at the start.

    Args:
        model: Model with its tuning applied.
        num_steps: Steps of the stage.
        done: Steps that are done already.
    """

    def __init__(
        self, stage: Stage, model: LlavaForConditionalGeneration, num_steps: int, done: int
    ) -> None:
        self.stage, self.num_steps = stage, num_steps
        self.meter = Meter(StepFlops(model), peak_flops(stage.world, stage.autocast))
        self._metrics = stage.run.metrics(stage.name)
        self._unreadable = stage.folder / "unreadable.jsonl"

        # A tracker cannot forget the steps that the files forget here.
        self._tracked = 0
        if stage.world.is_first:
            record = stage.run.states(stage.name) / "tracked.json"
            self._tracked = last_tracked(self._metrics, record)
            for file in (self._metrics, stage.folder / "answers.jsonl", self._unreadable):
                keep_lines(file, done)
            (stage.folder / "nonfinite.json").unlink(missing_ok=True)
        stage.world.barrier()
        self._listed = {(row["sample"], row["image"]) for row in read_lines(self._unreadable)}

    def __enter__(self) -> Recorder:
        stage, is_first = self.stage, self.stage.world.is_first
        progress = show_progress(stage.name, self.num_steps, describe_steps, is_first)

        # A resumed run goes on in the trackers' run of the same name.
        trackers = Trackers(
            stage.track if is_first else None,
            stage.folder,
            f"{stage.run.folder.name}-{stage.name}-{stage.recipe.digest()}",
            stage.recipe.model_dump(mode="json"),
            self._tracked,
        )

        with ExitStack() as context:
            self._show = context.enter_context(progress)
            self._trackers = context.enter_context(trackers)
            self._context = context.pop_all()
        self.meter.restart()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of a finished step everywhere that follows them."""
        if self.stage.world.is_first:
            append_line(self._metrics, dict(metrics))
            self._trackers.log(metrics)
        self._show(metrics)

    def count_unreadable(self, number: int, step: Step) -> Metrics:
        """Count the images of a step that grey stands in for, on all processes; list each once.

        Returns:
            `substituted_images` for the metrics; nothing where unreadable images are errors.

        Raises:
            FileNotFoundError: No image of the step could be read.
        """
        world = self.stage.world
        if self.stage.settings.unreadable_images != "substitute":
            return {}
        count = int(world.total(torch.tensor(len(step.substituted), device=world.device)))
        if not count:
            return {"substituted_images": 0}

        shares = [step.substituted] * world.size
        if world.size > 1:
            dist.all_gather_object(shares, step.substituted)
        cases = [Substituted(*case) for share in shares for case in share]
        if count == step.num_images >= ALL_GONE:
            raise FileNotFoundError(
                f"step {number}: none of its {count} images can be read, for example "
                f"{cases[0].image} of sample {cases[0].sample} ({cases[0].reason}): see whether "
                "the disk that holds them is there, and run the same command again"
            )

        for case in cases:
            if (case.sample, case.image) not in self._listed and world.is_first:
                append_line(self._unreadable, {"step": number, **case._asdict()})
            self._listed.add((case.sample, case.image))
        return {"substituted_images": count}


class Meter:
    """Turns steps into metrics, with rates over the time since the step before.

    Args:
        flops: FLOPs of the model.
        peak: FLOP/s that all processes together could compute; None where that is not known.
    """

    def __init__(self, flops: StepFlops, peak: float | None) -> None:
        self._flops, self._peak = flops, peak
        self._last = time.monotonic()

    def restart(self) -> None:
        """Leave the time since the last step out of the next one's."""
        self._last = time.monotonic()

    def measure(
        self,
        number: int,
        step: Step,
        loss: float,
        grad_norm: float,
        learning_rates: dict[str, float],
        waited: float = 0.0,
    ) -> Metrics:
        """Return the metrics of a finished step.

        Args:
            number: Optimizer steps done, from 1.
            loss: Mean over the supervised tokens of all processes, nats.
            learning_rates: Learning rate of each trained part.
            waited: Seconds that the step waited for its batch.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        work = Work(step.num_images, step.num_tokens, step.num_pairs, step.num_supervised)
        flops = self._flops.total(work)

        rates = {f"learning_rate/{part}": rate for part, rate in learning_rates.items()}
        sources = {f"samples/{source}": count for source, count in step.sources.items()}
        return {
            "step": number,
            "loss": loss,
            "grad_norm": grad_norm,
            **rates,
            "samples": len(step.ids),
            **(sources if len(sources) > 1 else {}),
            "images": step.num_images,
            "tokens": step.num_tokens,
            "supervised_tokens": step.num_supervised,
            "padding_percent": 100 * (1 - step.num_tokens / step.num_padded),
            "truncated_samples": step.num_truncated,
            "teraflop": flops / 1e12,
            "seconds": seconds,
            "data_wait_seconds": waited,
            "samples_per_second": len(step.ids) / seconds,
            "images_per_second": step.num_images / seconds,
            "tokens_per_second": step.num_tokens / seconds,
            **({"mfu_percent": 100 * flops / seconds / self._peak} if self._peak else {}),
            "peak_memory_gib": peak_memory_gib(),
        }


def describe_steps(steps: Sequence[Mapping[str, Any]]) -> Shown:
    """Return what the progress shows of the last steps; 80 columns hold it."""
    last, seconds = steps[-1], sum(step["seconds"] for step in steps)
    padding = sum(step["padding_percent"] for step in steps) / len(steps)
    rates = [
        f"{sum(step['tokens'] for step in steps) / seconds:,.0f} tokens/s",
        f"{sum(step['images'] for step in steps) / seconds:,.1f} images/s",
        f"padding {padding:.1f} %",
        f"{last['peak_memory_gib']:.1f} GiB",
    ]
    if "mfu_percent" in last:
        mfu = sum(step["mfu_percent"] * step["seconds"] for step in steps) / seconds
        rates.insert(3, f"MFU {mfu:.1f} %")

    unread = sum(step.get("substituted_images", 0) for step in steps)
    warning = f"{unread} unreadable images in the last {len(steps)} steps" if unread else ""
    waited = sum(step.get("data_wait_seconds", 0.0) for step in steps) / seconds
    if not warning and waited > MUCH_WAITING:
        warning = f"{100 * waited:.0f} % of the time waits for data"
    return Shown(f"loss {last['loss']:.3f}", "  ".join(rates), warning)
