"""One process or many, from the launch environment: `torchrun` is the only way to have many."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mipha.processes import end_with


@dataclass(frozen=True)
class World:
    """Where this process stands among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value


def processes_of_machine(world: World) -> int:
    """Return how many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def join_world(patience: timedelta = timedelta(minutes=30)) -> World:
    """Join the processes that the launcher started; a process that was started alone stays alone.

    The group is joined once and kept until the process ends: a process that leaves it and joins
    again can meet the store of the first time, and then waits for ever.

    Args:
        patience: Time that a process waits for the others before it takes them for lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))

    # Take the GPU of this process, where there are GPUs.
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)

    if size > 1 and not dist.is_initialized():
        # Processes that torchrun starts again find the addresses of those before in its store, so
        # each attempt has keys of its own.
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=patience))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"attempt-{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=patience,
        )
        atexit.register(dist.destroy_process_group)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun, the parent of its processes
            end_with(os.getppid())
    return World(rank, size, device)
