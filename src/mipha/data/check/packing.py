"""How full rows will be, from lengths alone.

The steps of the first epoch are laid into rows by the functions that training uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mipha.data.encode import Encoded
from mipha.data.order import draw_samples, epoch_order, samples_shown
from mipha.data.packing import make_rows
from mipha.recipe import StageRecipe

BATCHINGS = ("padded", "packed", "shared-image")

_MOST_STEPS = 100
"""Steps laid out, evenly spread over the epoch: enough for a figure to a tenth of a per cent."""


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


def packings(
    lengths: Sequence[Length],
    stage: StageRecipe,
    seed: int,
    weight: float = 1.0,
    cap: int | None = None,
) -> list[Packing]:
    """Lay out the first epoch in all ways of batching, side by side, on one process.

    Args:
        lengths: Of every sample that can be trained on.
        stage: The recipe's stage.
        seed: The recipe's.
        weight: Times that an epoch shows each sample, on average.
        cap: Most samples of an epoch.
    """
    if not lengths:
        return []
    size = len(lengths)
    shown = draw_samples(size, samples_shown(size, weight, cap), seed, epoch=0, source=0)
    image_keys = np.asarray([length.image_key for length in lengths], dtype=np.uint64)

    found = []
    for batching in BATCHINGS:
        way = stage.model_copy(update={"batching": batching})
        grouped = way.group_by_modality_length and batching == "padded"
        by_modality = way.batch_size if grouped else None
        order = epoch_order(shown, seed, 0, image_keys, way.bundle, by_modality)
        found.append(_lay_out(lengths, order, way, chosen=batching == stage.batching))
    return found


def _lay_out(
    lengths: Sequence[Length], order: np.ndarray, stage: StageRecipe, chosen: bool
) -> Packing:
    """Return how full the rows of an epoch are.

    Args:
        order: `(samples of the epoch,)` indices into `lengths`.
        stage: With the way of batching to look at.
        chosen: Whether this is the recipe's own way.
    """
    starts = range(0, len(order), stage.batch_size)
    spread = np.linspace(0, len(starts) - 1, min(len(starts), _MOST_STEPS)).round().astype(int)
    looked_at = [starts[step] for step in spread]

    num_tokens = num_positions = num_rows = num_samples = 0
    for start in looked_at:
        samples = [
            _stand_in(lengths[int(index)], int(index))
            for index in order[start : start + stage.batch_size]
        ]
        rows = [len(row) for row in make_rows(samples, stage.row_tokens, stage.batching)]
        # Rows come longest first, and a micro-batch is as wide as its first row, as in training.
        size = stage.micro_batch_rows
        num_positions += sum(len(rows[i : i + size]) * rows[i] for i in range(0, len(rows), size))
        num_tokens += sum(rows)
        num_rows += len(rows)
        num_samples += len(samples)

    return Packing(
        stage.batching,
        chosen,
        positions_per_sample=num_positions / num_samples,
        padding=100 - 100 * num_tokens / num_positions,
        rows_per_step=num_rows / len(looked_at),
        fullness=100 * num_tokens / num_rows / stage.row_tokens,
    )


def _stand_in(length: Length, index: int) -> Encoded:
    """Return a sample of that length; the checksum of its prefix stands for the tokens."""
    ids = np.full(length.num_tokens, length.prefix_key)
    images = (length.image_key.to_bytes(8, "big"),) if length.image_key else ()
    return Encoded(str(index), ids, ids, images, length.prefix)
