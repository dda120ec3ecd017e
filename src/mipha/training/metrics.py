"""What a step is measured by: a line of metrics.jsonl, and what the progress bar says."""

from __future__ import annotations

import resource
import sys
import time

import torch

from mipha.training.batches import Step


class Meter:
    """Turns steps into metrics with the rates of the time since the step before."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def restart(self) -> None:
        """Leave the time since the last step out of the next one's."""
        self._last = time.monotonic()

    def measure(self, number: int, step: Step, loss: float, grad_norm: float, learning_rates: dict[str, float]) -> dict[str, float | int]:
        """The metrics of a finished step.

        Args:
            number: Optimizer steps done, from 1.
            loss: Mean over the supervised tokens of all processes, nats.
            learning_rates: Of each trained part.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return {
            "step": number,
            "loss": loss,
            "grad_norm": grad_norm,
            **{f"learning_rate/{part}": rate for part, rate in learning_rates.items()},
            "samples": len(step.ids),
            **({f"samples/{source}": count for source, count in step.sources.items()} if len(step.sources) > 1 else {}),
            "images": step.num_images,
            "tokens": step.num_tokens,
            "supervised_tokens": step.num_supervised,
            "padding_percent": 100 * (1 - step.num_tokens / step.num_padded),
            "truncated_samples": step.num_truncated,
            "seconds": seconds,
            "samples_per_second": len(step.ids) / seconds,
            "tokens_per_second": step.num_tokens / seconds,
            "peak_memory_gib": peak_memory_gib(),
        }


def peak_memory_gib() -> float:
    """The most memory this process has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
