"""How full rows will be: the steps of the first epoch laid into rows by training's own rules, from lengths alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple, cast

import numpy as np

from mipha.data.encode import Encoded
from mipha.data.mixture import Mixture
from mipha.data.order import epoch_order
from mipha.data.packing import make_rows
from mipha.recipe import StageRecipe

BATCHINGS = ("padded", "packed", "shared-image")

_MOST_STEPS = 100
"""Steps laid out, evenly spread over the epoch: enough for a figure to a tenth of a per cent."""

_BUNDLE = 8
"""Samples of one image kept together where the recipe does not say: its default for shared-image."""


class Length(NamedTuple):
    """A sample as packing sees it.

    Args:
        num_tokens: After image expansion and cutting.
        prefix: Leading tokens that may be shared.
        prefix_key: Tells prefixes apart.
        image_key: The same for samples that show the same images, 0 for text alone.
    """

    num_tokens: int
    prefix: int
    prefix_key: int
    image_key: int


@dataclass(frozen=True)
class _Epoch:
    """The samples as `epoch_order` wants a mixture: each once, and which of them show the same images."""

    lengths: Sequence[Length]

    @cached_property
    def image_keys(self) -> np.ndarray:
        return np.asarray([length.image_key for length in self.lengths], dtype=np.uint64)

    def epoch_samples(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(len(self.lengths))


class Packing(NamedTuple):
    """What one way of batching makes of the set, a share image counted once.

    Args:
        batching: Which way.
        chosen: The recipe's own.
        positions_per_sample: Positions computed, padding included.
        padding: Of the positions computed, in %.
        rows_per_step: Mean.
        fullness: Mean length of a row in % of row_tokens.
    """

    batching: str
    chosen: bool
    positions_per_sample: float
    padding: float
    rows_per_step: float
    fullness: float


def num_steps(stage: StageRecipe, num_samples: int) -> tuple[int, int]:
    """Optimizer steps of the stage, and samples that they read."""
    total = max(round(stage.epochs * num_samples), 1)
    steps = min(ceil(total / stage.batch_size), stage.max_steps or total)
    return steps, min(steps * stage.batch_size, total)


def packings(lengths: Sequence[Length], stage: StageRecipe, seed: int) -> list[Packing]:
    """All ways of batching side by side, on one process."""
    epoch = _Epoch(lengths)
    return [_packing(epoch, stage, seed, batching) for batching in BATCHINGS] if lengths else []


def _packing(epoch: _Epoch, stage: StageRecipe, seed: int, batching: str) -> Packing:
    bundle = (stage.samples_per_image or _BUNDLE) if batching == "shared-image" else None
    order = epoch_order(cast(Mixture, epoch), seed, 0, bundle)
    starts = range(0, len(order), stage.batch_size)
    chosen = [
        starts[i]
        for i in np.linspace(0, len(starts) - 1, min(len(starts), _MOST_STEPS)).round().astype(int)
    ]
    num_tokens = num_positions = num_rows = num_samples = 0
    for start in chosen:
        samples = [
            _stand_in(epoch.lengths[int(index)], int(index))
            for index in order[start : start + stage.batch_size]
        ]
        rows = [len(row) for row in make_rows(samples, stage.row_tokens, batching)]
        # As training does: rows come longest first, and a micro-batch is as wide as its first.
        size = stage.micro_batch_rows
        num_positions += sum(len(rows[i : i + size]) * rows[i] for i in range(0, len(rows), size))
        num_tokens += sum(rows)
        num_rows += len(rows)
        num_samples += len(samples)
    return Packing(
        batching,
        batching == stage.batching,
        positions_per_sample=num_positions / num_samples,
        padding=100 - 100 * num_tokens / num_positions,
        rows_per_step=num_rows / len(chosen),
        fullness=100 * num_tokens / num_rows / stage.row_tokens,
    )


def _stand_in(length: Length, index: int) -> Encoded:
    """A sample of that length whose prefix is told apart by its checksum alone."""
    ids = np.full(length.num_tokens, length.prefix_key)
    images = (length.image_key.to_bytes(8, "big"),) if length.image_key else ()
    return Encoded(str(index), ids, ids, images, length.prefix)
