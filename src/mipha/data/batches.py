"""Step number -> this process's micro-batches.

It is a pure function: resuming at a step reads nothing that came before it.

    step  --order(seed, epoch)-->  samples  --encode, make_rows-->  rows  --deal-->  rows by process
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from mipha.data.collate import Batch, Substituted, collate, padded_length
from mipha.data.encode import Encoded, blank, encode_for
from mipha.data.images import grey_image
from mipha.data.mixture import Mixture
from mipha.data.order import count_steps
from mipha.data.packing import Row, make_rows
from mipha.recipe import StageRecipe


@dataclass(frozen=True)
class Step:
    """What one process computes in one optimizer step; the counts are of all processes together.

    Args:
        micro_batches: What `to_device` makes the arguments of one forward pass of; the same number
            on every process.
        ids: Samples of the step.
        sources: How many of them are of which data set.
        num_tokens: Real tokens, no padding; a shared image counts once.
        num_pairs: (query, key) pairs of them that attend.
        num_supervised: Tokens that are trained on.
        num_images: Images encoded, each tile of an image as one.
        num_padded: Positions computed, padding included.
        num_truncated: Samples whose end was cut off.
        substituted: Images of this process that could not be read; grey stands in for them.
    """

    micro_batches: tuple[Batch, ...]
    ids: tuple[str, ...]
    sources: dict[str, int]
    num_tokens: int
    num_pairs: int
    num_supervised: int
    num_images: int
    num_padded: int
    num_truncated: int
    substituted: tuple[Substituted, ...] = ()

    def pin_memory(self) -> Step:
        """Return the step in memory that a GPU reads by itself; the DataLoader calls this."""
        pinned = tuple(
            {
                key: value.pin_memory() if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            for batch in self.micro_batches
        )
        return replace(self, micro_batches=pinned)


class StepDataset(Dataset[Step]):
    """The steps of a stage as a map-style data set, so that a DataLoader can read them ahead."""

    def __init__(
        self,
        mixture: Mixture,
        processor: LlavaProcessor,
        stage: StageRecipe,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        lengths: Sequence[int] = (),
        work: Callable[[Row], float] = len,
    ) -> None:
        """Set up the steps of a stage.

        Args:
            lengths: Lengths that rows are padded to, for a compiled kernel; none: the longest row.
            work: What a row costs to compute, by which rows are dealt to several processes.
        """
        self.mixture, self.processor, self.stage, self.seed = mixture, processor, stage, seed
        self.rank, self.world_size, self.lengths = rank, world_size, lengths
        self.work = work
        self._blank = make_rows([blank(processor, grey_image())], stage.row_tokens, "padded")[0]
        by_modality = stage.batch_size if stage.group_by_modality_length else None
        self._order = lru_cache(maxsize=2)(
            lambda epoch: mixture.epoch_order(seed, epoch, stage.bundle, by_modality)
        )
        if stage.batching == "shared-image":
            mixture.image_keys  # noqa: B018 - here, and not in every worker
        self._num_steps, self._num_samples = count_steps(stage, mixture.num_per_epoch)

    def __len__(self) -> int:
        """Return the optimizer steps of the stage."""
        return self._num_steps

    def indices(self, step: int) -> list[int]:
        """Return the samples of the mixture that a step reads; the last step may read fewer."""
        size = self.mixture.num_per_epoch
        end = min((step + 1) * self.stage.batch_size, self._num_samples)
        positions = range(step * self.stage.batch_size, end)
        return [int(self._order(position // size)[position % size]) for position in positions]

    def samples(self, step: int) -> list[Encoded]:
        """Return the samples of a step, encoded."""
        stage, indices = self.stage, self.indices(step)
        samples = [encode_for(self.mixture[index], self.processor, stage) for index in indices]
        if stage.batching != "shared-image":
            return samples
        keys = self.mixture.image_keys[indices].tolist()
        return [replace(one, image_key=key) for one, key in zip(samples, keys, strict=True)]

    def __getitem__(self, step: int) -> Step:
        if not 0 <= step < len(self):
            raise IndexError(step)
        stage, world_size = self.stage, self.world_size

        # Lay the samples into rows, and deal the rows out to the processes.
        samples = self.samples(step)
        rows = make_rows(samples, stage.row_tokens, stage.batching, world_size)
        dealt = deal(rows, world_size, self.work)

        # Cut every process's rows into the same number of micro-batches, with blanks where needed.
        chunks = [self._chunks(own) for own in dealt]
        most = max(len(own) for own in chunks)
        if world_size > 1:
            blank_at = range(most)
        else:
            blank_at = range(0 if any(sample.images for sample in samples) else 1)
        full = [
            [self._with_image(own[i] if i < len(own) else [], i in blank_at) for i in range(most)]
            for own in chunks
        ]

        # Read the images of this process alone; count for all of them.
        substituted: list[Substituted] = []
        replaced = substituted if stage.unreadable_images == "substitute" else None
        return Step(
            micro_batches=tuple(
                collate(
                    chunk,
                    self.processor,
                    replaced,
                    self.lengths,
                    eos_holes="eos_holes" in stage.upstream,
                    as_bytes=True,
                )
                for chunk in full[self.rank]
            ),
            ids=tuple(sample.id for sample in samples),
            sources=self.mixture.count_sources(self.indices(step)),
            num_tokens=sum(len(row) for row in rows),
            num_pairs=sum(row.num_pairs for row in rows),
            num_supervised=sum(row.num_supervised for row in rows),
            num_images=sum(row.num_tiles for row in rows),
            num_padded=sum(
                len(chunk) * padded_length(chunk, self.lengths) for own in full for chunk in own
            ),
            num_truncated=sum(sample.truncated > 0 for sample in samples),
            substituted=tuple(substituted),
        )

    def _chunks(self, rows: Sequence[Row]) -> list[list[Row]]:
        size = self.stage.micro_batch_rows
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _with_image(self, chunk: list[Row], wanted: bool) -> list[Row]:
        """Add a blank image where one is wanted and there is none.

        Several processes need one in every micro-batch, because sharded layers wait for one
        another. One process needs one in a step without images: the optimizer skips a tensor
        without a gradient, and with several processes it would not.
        """
        return [*chunk, self._blank] if wanted and not any(row.images for row in chunk) else chunk


def deal(
    rows: Sequence[Row], world_size: int, work: Callable[[Row], float] = len
) -> list[list[Row]]:
    """Deal rows to processes in rounds of one row each, from the rows of most work to the least.

    In a round, the row of most work goes to the process with the least work so far. So processes
    have like work and like numbers of rows, and rows of one round, which are computed at the same
    time, are alike: processes that share weights wait for one another at every layer.

    Args:
        rows: Longest first.
        work: What a row costs to compute.

    Returns:
        The rows of each process, the same answer on every process; one process keeps the order.
    """
    if world_size == 1:
        return [list(rows)]

    dealt: list[list[Row]] = [[] for _ in range(world_size)]
    done = np.zeros(world_size)
    ordered = sorted(rows, key=work, reverse=True)
    for start in range(0, len(ordered), world_size):
        receivers = done.argsort(kind="stable")
        for row, receiver in zip(ordered[start : start + world_size], receivers, strict=False):
            dealt[receiver].append(row)
            done[receiver] += work(row)
    return dealt


def keep_step(step: Any) -> Any:
    """Return the step: the DataLoader's collate function has nothing to do."""
    return step
