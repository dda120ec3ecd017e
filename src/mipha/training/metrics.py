"""What a step is measured by: a line of metrics.jsonl, and what the progress bar says."""

from __future__ import annotations

import resource
import sys
import time

import torch

from mipha.catalog.devices import device_reported_as
from mipha.training.batches import Step
from mipha.training.flops import StepFlops, Work
from mipha.world import World


class Meter:
    """Turns steps into metrics with the rates of the time since the step before.

    Args:
        flops: Of the model.
        peak: What all processes together could compute, FLOP/s; null where that is not known.
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
    ) -> dict[str, float | int]:
        """The metrics of a finished step.

        Args:
            number: Optimizer steps done, from 1.
            loss: Mean over the supervised tokens of all processes, nats.
            learning_rates: Of each trained part.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        flops = self._flops.total(
            Work(step.num_images, step.num_tokens, step.num_pairs, step.num_supervised)
        )
        return {
            "step": number,
            "loss": loss,
            "grad_norm": grad_norm,
            **{f"learning_rate/{part}": rate for part, rate in learning_rates.items()},
            "samples": len(step.ids),
            **(
                {f"samples/{source}": count for source, count in step.sources.items()}
                if len(step.sources) > 1
                else {}
            ),
            "images": step.num_images,
            "tokens": step.num_tokens,
            "supervised_tokens": step.num_supervised,
            "padding_percent": 100 * (1 - step.num_tokens / step.num_padded),
            "truncated_samples": step.num_truncated,
            "teraflop": flops / 1e12,
            "seconds": seconds,
            "samples_per_second": len(step.ids) / seconds,
            "images_per_second": step.num_images / seconds,
            "tokens_per_second": step.num_tokens / seconds,
            **({"mfu_percent": 100 * flops / seconds / self._peak} if self._peak else {}),
            "peak_memory_gib": peak_memory_gib(),
        }


def peak_flops(world: World, autocast: torch.dtype | None) -> float | None:
    """What all processes together could compute, FLOP/s, by their makers' sheets; null where the catalog does not know the device.

    Args:
        autocast: Type that matrix products run in; null for float32.
    """
    entry = (
        device_reported_as(torch.cuda.get_device_name(world.device))
        if world.device.type == "cuda"
        else None
    )
    tflops = (
        entry.tflops("bfloat16" if autocast is torch.bfloat16 else "float32") if entry else None
    )
    return tflops * 1e12 * world.size if tflops else None


def peak_memory_gib() -> float:
    """The most memory this process has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
