"""A model on its device: whole in one process; over many, copied, sharded layer by layer (FSDP2), or sharded within each machine (HSDP).

All three are FSDP2 over a mesh of (copies, shards), so that training states are the same and go from any of them to any other:

ddp   (processes, 1)            fsdp   (processes,)            hsdp   (machines, processes of a machine)
"""

from __future__ import annotations

import os

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import layers_of
from mipha.world import World


def place(
    model: LlavaForConditionalGeneration,
    world: World,
    sharding: str = "auto",
    compiled: bool = False,
) -> nn.Module:
    """Move the model to its device; with several processes, spread it over them.

    Args:
        sharding: As in the recipe; one process holds all in any case.
        compiled: Compile each layer. Rows have ever new lengths, so the code is made for any length.

    Raises:
        ValueError: hsdp is asked for on one machine.
    """
    model.to(world.device)
    if compiled:
        for layer in layers_of(model):
            layer.compile(dynamic=True)
    if world.size > 1:
        mesh = mesh_of(sharding, world)
        # With one shard a layer's weights are at hand all the time: gathering them again would be work for nothing.
        options = {"mesh": mesh, "reshard_after_forward": mesh.size(-1) > 1}
        for layer in layers_of(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)
    return model


def mesh_of(sharding: str, world: World) -> DeviceMesh:
    """The processes as (copies, shards); as (shards,) where there is one copy.

    Raises:
        ValueError: hsdp is asked for on one machine, or on machines with unlike numbers of processes.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if sharding == "auto":
        sharding = "hsdp" if 1 < local < world.size else "fsdp"
    if sharding == "fsdp":
        return init_device_mesh(world.device.type, (world.size,))
    if sharding == "hsdp" and (local >= world.size or world.size % local):
        raise ValueError(
            f"sharding=hsdp needs several machines with the same number of processes, but {local} of the {world.size} processes are on "
            "this one: use fsdp"
        )
    shards = local if sharding == "hsdp" else 1
    return init_device_mesh(
        world.device.type, (world.size // shards, shards), mesh_dim_names=("copies", "shards")
    )
