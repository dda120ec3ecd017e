"""What a step is measured by: a line of metrics.jsonl, and what the progress bar says."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from mipha.data.batches import Step
from mipha.engine.machine import peak_memory_gib
from mipha.engine.progress import Shown
from mipha.models.flops import StepFlops, Work


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
    return Shown(f"loss {last['loss']:.3f}", "  ".join(rates), warning)
