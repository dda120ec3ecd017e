"""One process or many, from the launch environment: `torchrun` is the only way to have many."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from mipha.models.modeling import LlavaForConditionalGeneration


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
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value


def join_world() -> World:
    """Join the processes that the launcher started; alone, when it started none.

    The group is joined once and kept until the process ends: one that leaves and joins again can meet the store of the time before,
    and wait for ever.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return World(rank, size, device)


def place(model: LlavaForConditionalGeneration, world: World) -> nn.Module:
    """Move the model to its device; with several processes, shard it layer by layer (FSDP2)."""
    model.to(world.device)
    if world.size > 1:
        for layer in layers_of(model):
            fully_shard(layer)
        fully_shard(model)
    return model


def layers_of(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """The repeated layers of tower and language model: the units of sharding and of activation checkpointing."""
    found = []
    for part in (model.model.vision_tower, model.model.language_model):
        depth = part.config.num_hidden_layers
        stacks = [module for module in part.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
        assert len(stacks) == 1, f"expected one stack of {depth} layers in {type(part).__name__}, found {len(stacks)}"
        found += list(stacks[0])
    return found
