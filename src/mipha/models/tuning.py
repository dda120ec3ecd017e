"""Which parameters train: the recipe's wish applied to a model, counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mipha.models.modeling import LlavaForConditionalGeneration, parts
from mipha.recipe import PARTS, Part, TuningRecipe


@dataclass(frozen=True)
class TunedPart:
    """What trains of one part.

    Args:
        part: Its name.
        parameters: All of its parameters, in numbers.
        trained: Those that get a gradient.
    """

    part: Part
    parameters: int
    trained: int


def apply_tuning(model: LlavaForConditionalGeneration, tuning: TuningRecipe) -> list[TunedPart]:
    """Set what trains, and count it.

    Tensors of the tower that its features never pass (the norm behind the layer that is read, a mask token) stay frozen even
    in a tuned tower: they get no gradient, and sharded training and optimizer state want one for every trained tensor.
    """
    report = []
    unread = unread_parameters(model) if tuning.vision_tower != "frozen" else set()
    for part in PARTS:
        wanted = getattr(tuning, part) != "frozen"
        tensors = part_parameters(model, part)
        for name, parameter in tensors.items():
            parameter.requires_grad_(wanted and name not in unread)
        report.append(
            TunedPart(part, sum(p.numel() for p in tensors.values()), sum(p.numel() for p in tensors.values() if p.requires_grad))
        )
    return report


def part_parameters(model: LlavaForConditionalGeneration, part: Part) -> dict[str, nn.Parameter]:
    """The parameters of a part by their name in the model; a tied head counts once."""
    modules = getattr(parts(model), part)
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside}


def unread_parameters(model: LlavaForConditionalGeneration) -> set[str]:
    """Names of the tower's parameters that its features do not depend on: measured with one small backward pass."""
    tensors = part_parameters(model, "vision_tower")
    before = {name: parameter.requires_grad for name, parameter in tensors.items()}
    for parameter in tensors.values():
        parameter.requires_grad_(True)
    size = model.config.vision_config.image_size
    first = next(iter(tensors.values()))
    with torch.enable_grad():
        pixels = torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device)
        features = torch.cat(model.get_image_features(pixels, return_dict=True).pooler_output).sum()
        gradients = torch.autograd.grad(features, list(tensors.values()), allow_unused=True)
    for name, parameter in tensors.items():
        parameter.requires_grad_(before[name])
    return {name for name, gradient in zip(tensors, gradients, strict=True) if gradient is None}
