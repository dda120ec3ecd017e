"""Images that could not be read on the way: counted in every step, listed once in `unreadable.jsonl`."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from mipha.data.batches import Step
from mipha.data.collate import Substituted
from mipha.files import append_line, read_lines
from mipha.world import World

ALL_GONE = 8
"""A step with at least so many images, of which none can be read, is no matter of some damaged files."""


class Unreadable:
    """Keeps a stage's list; every process has one.

    Args:
        path: Of the list, in which nothing is of a step that will be made again.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self._listed = {(line["sample"], line["image"]) for line in read_lines(path)}

    def record(self, number: int, step: Step) -> int:
        """List what grey stood in for in this step, on all processes.

        Args:
            number: Of the step.

        Returns:
            How many images.

        Raises:
            FileNotFoundError: No image of the step could be read.
        """
        count = int(self.world.total(torch.tensor(len(step.substituted), device=self.world.device)))
        if not count:
            return 0
        cases = [Substituted(*case) for share in self._of_all(step.substituted) for case in share]
        if count == step.num_images >= ALL_GONE:
            raise FileNotFoundError(
                f"step {number}: none of its {count} images can be read, for example {cases[0].image} of sample {cases[0].sample} "
                f"({cases[0].reason}): see whether the disk that holds them is there, and run the same command again"
            )
        for case in cases:
            if (case.sample, case.image) not in self._listed and self.world.is_first:
                append_line(self.path, {"step": number, **case._asdict()})
            self._listed.add((case.sample, case.image))
        return count

    def _of_all(self, own: tuple[Substituted, ...]) -> list[tuple[Substituted, ...]]:
        shares = [own] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(shares, own)
        return shares
