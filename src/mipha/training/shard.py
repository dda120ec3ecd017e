"""A model on its device: whole in one process, sharded layer by layer (FSDP2) over many."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import fully_shard

from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import part_layers
from mipha.world import World


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
    return part_layers(model, "vision_tower") + part_layers(model, "language_model")
