"""A model on its device or spread over many: placed for training, gathered for export.

round_frozen    frozen matrices to bfloat16    restore_frozen   their originals back
place, shard    onto device, over processes    gather_weights   whole, on the first process

Several processes always train with FSDP2 over a mesh of (copies, shards), so that the training
states are the same and go from any of these to any other:

ddp   (processes, 1)        fsdp   (processes,)        hsdp   (machines, processes of a machine)

Which of them `sharding: auto` is, the predicted memory decides: `choose_sharding`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from mipha.engine.machine import device_memory
from mipha.models.attention import use_attention
from mipha.models.build import skeleton
from mipha.models.memory import PRODUCTS, RESERVE, memory_of_copies
from mipha.models.modeling import LlavaForConditionalGeneration, parts
from mipha.models.tuning import apply_tuning, layers_of
from mipha.terminal import Console
from mipha.training.stage import Stage
from mipha.world import World, processes_of_machine

console = Console()


def round_frozen(model: LlavaForConditionalGeneration, device: torch.device) -> dict[str, Tensor]:
    """Keep frozen linear layers in bfloat16, which autocast makes of them at every use.

    So every product is bit by bit the same. Norms and embeddings stay in float32, because autocast
    leaves them in it. It halves the memory of what is frozen, and saves rounding it in every
    forward pass.

    Args:
        device: Device that the stage trains on. Numbers that bfloat16 does not hold exactly are
            kept beside it in main memory. On a CPU that saves nothing, so such a layer stays as it
            is.

    Returns:
        The originals of the rounded weights by name, for `restore_frozen`.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }

    originals = {}
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        trains = any(p.requires_grad or id(p) in embeddings for p in parameters.values())
        if type(module) is not nn.Linear or trains:
            continue

        rounded = {name: weight.detach().to(torch.bfloat16) for name, weight in parameters.items()}
        exact = all(
            torch.equal(rounded[name].to(weight.dtype), weight)
            for name, weight in parameters.items()
        )
        if not exact and device.type == "cpu":
            continue

        for name, weight in parameters.items():
            # Where bfloat16 holds the original exactly, it stands for it.
            original = rounded[name] if exact else weight.detach().to("cpu", copy=True)
            originals[f"{path}.{name}"] = original
            weight.data = rounded[name]
    return originals


def restore_frozen(weights: dict[str, Tensor], originals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return all weights in float32 again, rounded ones as they were.

    A frozen weight that training has changed is not covered up: the proof reports it.

    Args:
        weights: Weights by name, whole.
        originals: Result of `round_frozen`.
    """
    restored = {}
    for name, weight in weights.items():
        original = originals.get(name)
        if original is None:
            restored[name] = weight
        elif torch.equal(original.to(weight.dtype), weight.cpu()):
            restored[name] = original.float()
        else:
            restored[name] = weight.float()
    return restored


def place(model: LlavaForConditionalGeneration, stage: Stage) -> None:
    """Put a model on its device, ready to train; with several processes, spread it over them.

    Raises:
        ValueError: hsdp is asked for on one machine.
    """
    recipe, world, checkpointed = stage.recipe, stage.world, stage.settings.checkpointed
    options: dict[str, Any] = {"use_reentrant": False}
    if stage.settings.keeps_products:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(PRODUCTS))
    for part in checkpointed:
        (module, *_) = getattr(parts(model), part)
        module.gradient_checkpointing_enable(options)
    use_attention(model, stage.attention)
    model.to(world.device)

    # Rows have ever new lengths, so the code is compiled for any length.
    if recipe.compile:
        for layer in layers_of(model):
            layer.compile(dynamic=True)

    if world.size > 1:
        shard(model, mesh_of(choose_sharding(stage), world))

    # Dropout and the like only where something trains: frozen layers run as they will answer.
    model.eval()
    own = parts(model)
    tops = (*own.vision_tower, *own.projector, own.language_model[0])
    for module in (*tops, *layers_of(model)):
        module.train(any(parameter.requires_grad for parameter in module.parameters()))
    if "frozen_dropout" in stage.settings.upstream:
        own.language_model[0].train()

    # transformers checkpoints no layer in eval mode. This flag alone leaves its dropout off.
    for layer in layers_of(model, checkpointed):
        layer.training = True


def shard(model: LlavaForConditionalGeneration, mesh: DeviceMesh) -> None:
    """Spread a model over the processes of a mesh, each layer by itself."""
    # With one shard a layer's weights are at hand all the time, and need no gathering again.
    options = {"mesh": mesh, "reshard_after_forward": mesh.size(-1) > 1}
    for layer in layers_of(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def gather_weights(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Return all weights, whole, on the first process; every process calls it.

    Each is there once: of a tied head, sharding makes a second tensor that is the embeddings again.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole) if world.size > 1 else model.state_dict()
    every = dict(model.named_parameters(remove_duplicate=False)).keys()
    once = dict(model.named_parameters()).keys()
    return {name: weight for name, weight in weights.items() if name not in every - once}


def choose_sharding(stage: Stage) -> str:
    """Return how the processes of a stage share its model: ddp, fsdp or hsdp.

    auto is hsdp on machines of several processes each. Elsewhere the predicted memory decides: ddp
    where every device can hold the whole model, else fsdp; the first process says so.
    """
    recipe, world, settings = stage.recipe, stage.world, stage.settings
    if recipe.sharding != "auto":
        return recipe.sharding
    if 1 < processes_of_machine(world) < world.size:
        return "hsdp"

    # Predict the memory of a device, without the weights.
    model = skeleton(recipe.model)
    apply_tuning(model, settings.tuning, "meta", stage.autocast)
    kind = "gpu" if world.device.type == "cuda" else "cpu"
    in_bfloat16 = stage.autocast is torch.bfloat16
    needed = memory_of_copies(model, settings, kind, in_bfloat16, world.size)
    memory = device_memory(world)

    # The choice is one for all, so the smallest device decides.
    is_enough = torch.tensor(int(needed <= RESERVE * memory), device=world.device)
    chosen = "ddp" if int(world.total(is_enough)) == world.size else "fsdp"
    if world.is_first:
        how = "each process holds the whole model" if chosen == "ddp" else "the model is spread"
        console.print(
            f"sharding: {chosen}, {how} ({needed / 1e9:.1f} GB predicted for a whole one, "
            f"{memory / 1e9:.1f} GB on this device)",
            markup=False,
        )
    return chosen


def mesh_of(sharding: str, world: World) -> DeviceMesh:
    """Return the processes as (copies, shards); as (shards,) where there is one copy.

    Args:
        sharding: ddp, fsdp or hsdp.

    Raises:
        ValueError: hsdp is asked for on one machine, or on machines with unlike numbers of
            processes.
    """
    local = processes_of_machine(world)
    if sharding == "fsdp":
        return init_device_mesh(world.device.type, (world.size,))

    if sharding == "hsdp" and (local >= world.size or world.size % local):
        raise ValueError(
            "sharding=hsdp needs several machines with the same number of processes, "
            f"but {local} of the {world.size} processes are on this one: use fsdp"
        )
    shards = local if sharding == "hsdp" else 1
    return init_device_mesh(
        world.device.type, (world.size // shards, shards), mesh_dim_names=("copies", "shards")
    )
