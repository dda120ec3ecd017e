"""Weights of 4 bits (QLoRA) through bitsandbytes, an optional package that needs a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from mipha.errors import MissingPackage
from mipha.recipe import TuningRecipe


def check_quantization(tuning: TuningRecipe, device: torch.device, num_processes: int) -> None:
    """Refuse weights of 4 bits where they cannot run, before a model is built.

    Args:
        tuning: Tuning of a stage.
        device: Device that trains.
        num_processes: Processes that train together.

    Raises:
        ValueError: There is no GPU, or there are several processes.
        MissingPackage: bitsandbytes is not installed.
    """
    wanted = [part for part in tuning.adapted if tuning.of(part) == "qlora"]
    if not wanted:
        return

    fix = f"set tuning.{wanted[0]} to lora"
    if device.type != "cuda":
        raise ValueError(
            f"{wanted[0]}=qlora computes with weights of 4 bits, which needs a GPU: "
            f"{fix}, or train on a GPU"
        )
    if num_processes > 1:
        raise ValueError(
            f"{wanted[0]}=qlora is for one GPU, but {num_processes} processes were started: "
            f"{fix}, or start one process"
        )
    if find_spec("bitsandbytes") is None:
        raise MissingPackage("bitsandbytes", f"{wanted[0]}=qlora", "qlora")


def quantize(layers: list[nn.Module], device: torch.device, compute: torch.dtype) -> None:
    """Keep the weights of every linear layer in 4 bits, rounded once.

    Args:
        layers: Layers whose linear layers are replaced.
        device: Device that the weights are put on.
        compute: Type that they are multiplied in.

    Source: QLoRA (Dettmers et al. 2023), section 3: NormalFloat4 in blocks of 64, the blocks'
        scales quantized too.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in layers:
        for name, module in list(layer.named_modules()):
            if not isinstance(module, nn.Linear):
                continue

            small = Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=compute,
                quant_type="nf4",
            )
            small.weight = Params4bit(
                module.weight.data,
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=True,
            )
            small.bias = module.bias
            layer.set_submodule(name, small.to(device))


def num_weights(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter stands for; in 4 bits two share a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def weight_type(parameter: nn.Parameter) -> str:
    """Return the name of the type that a parameter is kept in."""
    state = getattr(parameter, "quant_state", None)
    return state.quant_type if state is not None else str(parameter.dtype).removeprefix("torch.")


def is_quantized(module: nn.Module) -> bool:
    """Return whether the module's weight is kept in 4 bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None
