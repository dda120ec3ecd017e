"""Frozen matrices in bfloat16 while a stage trains in it, and as they were when it is exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.quantization import weight_type
from mipha.models.tuning import TunedPart, part_parameters
from mipha.recipe import PARTS


def keep_frozen_in_bfloat16(
    model: LlavaForConditionalGeneration, device: torch.device
) -> dict[str, Tensor]:
    """Keep frozen linear layers in bfloat16, which is what autocast makes of them each time that they are used.

    So every product is bit by bit what it was: norms and embeddings, which autocast leaves in float32, stay in it. It halves the
    memory of what is frozen, and saves the rounding of it in every forward pass.

    Args:
        device: Where the stage trains. Numbers that bfloat16 does not hold exactly are kept beside it in the host's memory; on a CPU,
            where that saves nothing, such a layer stays as it is.

    Returns:
        By name, the originals of what was rounded: for `with_originals`.
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
        if type(module) is not nn.Linear or any(
            p.requires_grad or id(p) in embeddings for p in parameters.values()
        ):
            continue
        rounded = {
            name: parameter.detach().to(torch.bfloat16) for name, parameter in parameters.items()
        }
        exact = all(
            torch.equal(rounded[name].to(parameter.dtype), parameter)
            for name, parameter in parameters.items()
        )
        if not exact and device.type == "cpu":
            continue
        for name, parameter in parameters.items():
            # What bfloat16 holds exactly stands for its original.
            originals[f"{path}.{name}"] = (
                rounded[name] if exact else parameter.detach().to("cpu", copy=True)
            )
            parameter.data = rounded[name]
    return originals


def kept_in(model: LlavaForConditionalGeneration, tuned: Sequence[TunedPart]) -> list[TunedPart]:
    """What trains, with the types that weights are kept in now."""
    types = {
        part: {weight_type(parameter) for parameter in part_parameters(model, part).values()}
        for part in PARTS
    }
    return [replace(wish, dtypes=tuple(sorted(types[wish.part]))) for wish in tuned]


def with_originals(weights: dict[str, Tensor], originals: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights in float32 again: what was rounded is the original, unless training has changed it, which is for the proof to say.

    Args:
        weights: By name, whole.
        originals: Of `keep_frozen_in_bfloat16`.
    """
    restored = {}
    for name, weight in weights.items():
        original = originals.get(name)
        same = original is not None and torch.equal(original.to(weight.dtype), weight.cpu())
        restored[name] = (
            original.float() if same else weight.float() if original is not None else weight
        )
    return restored
