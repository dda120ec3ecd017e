"""Apply the tuning of a recipe to a model: which parameters train, and how many.

frozen  full  last-N  head   requires_grad of the model's own parameters
lora  qlora                  adapters beside every linear layer of the stack: models/adapters.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mipha.models.adapters import adapter_layers, adapter_parameters, add_adapters, linear_layers
from mipha.models.modeling import LlavaForConditionalGeneration, parts
from mipha.models.quantization import num_weights, quantize, weight_type
from mipha.recipe import PARTS, Layered, Part, TuningRecipe


@dataclass(frozen=True)
class TunedPart:
    """The trained share of one part.

    Args:
        part: Name of the part.
        tuning: Tuning in the recipe: frozen, full, lora, qlora, last-N or head.
        parameters: Number of all its parameters, adapters included.
        trained: Number of those that get a gradient.
        adapters: Number of linear layers with an adapter.
        dtypes: Types that its weights are kept in.
    """

    part: Part
    tuning: str
    parameters: int
    trained: int
    adapters: int
    dtypes: tuple[str, ...]


def apply_tuning(
    model: LlavaForConditionalGeneration,
    tuning: TuningRecipe,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> list[TunedPart]:
    """Set which parameters train, and count them. A model can get adapters only once.

    Tensors of the tower that its features never pass (the norm behind the layer that is read, a
    mask token) stay frozen even in a tuned tower: they get no gradient, and sharded training and
    the optimizer's state need one for every trained tensor.

    Args:
        model: Model to tune.
        tuning: Tuning of each part.
        device: Device that weights of 4 bits are put on.
        autocast: Type that matrix products run in; None for the type of the weights.

    Raises:
        ValueError: A part has fewer layers than are to be trained, or no layers that adapters fit.
    """
    # Find the model's own parameters that train.
    trained = {
        id(parameter)
        for part in PARTS
        for parameter in _trained_parameters(model, part, tuning.of(part))
    }

    # Add adapters.
    if tuning.adapted:
        assert tuning.lora is not None
        for part in tuning.adapted:
            if tuning.of(part) == "qlora":
                quantize(part_layers(model, part), torch.device(device), autocast or torch.float32)
        add_adapters(
            model, {part: part_layers(model, part) for part in tuning.adapted}, tuning.lora
        )
    trained |= {
        id(parameter)
        for layer in adapter_layers(model).values()
        for parameter in adapter_parameters(layer)
    }

    for parameter in model.parameters():
        if parameter.is_floating_point():  # weights of 4 bits have no gradient to switch
            parameter.requires_grad_(id(parameter) in trained)
    return describe_tuning(model, tuning)


def describe_tuning(model: LlavaForConditionalGeneration, tuning: TuningRecipe) -> list[TunedPart]:
    """Count the trained parameters of each part in a model with its tuning applied."""
    return [_count(model, part, tuning.of(part)) for part in PARTS]


def check_tuning(model: LlavaForConditionalGeneration, tuning: TuningRecipe) -> None:
    """Refuse a tuning that the parts cannot have, and change nothing.

    Raises:
        ValueError: A part has fewer layers than are to be trained, or no layers that adapters fit.
    """
    for part in PARTS:
        tuned_modules(model, part, tuning.of(part))
    for part in tuning.adapted:
        linear_layers(part, part_layers(model, part))


def tuned_modules(model: LlavaForConditionalGeneration, part: Part, tuning: str) -> list[nn.Module]:
    """Return the modules of a part whose own weights train; none if it is frozen or has adapters.

    Raises:
        ValueError: The part has fewer layers than the recipe asks for, or no head of its own.
    """
    if tuning == "full":
        return list(getattr(parts(model), part))
    if tuning == "head":
        if model.lm_head.weight is model.get_input_embeddings().weight:
            raise ValueError(
                f"{part}: its head is tied to the embeddings, so it cannot train alone: "
                "set it to frozen, as upstream trains such models, or to full"
            )
        return [model.lm_head]
    if not tuning.startswith("last-"):
        return []

    layers, number = part_layers(model, part), int(tuning.removeprefix("last-"))
    if number > len(layers):
        raise ValueError(
            f"{part}: {tuning} asks for more than its {len(layers)} layers: "
            f"take last-{len(layers)} at most, or full"
        )
    return layers[-number:]


def part_layers(model: LlavaForConditionalGeneration, part: Part) -> list[nn.Module]:
    """Return the repeated layers of the tower or of the language model, first to last.

    Those of the tower end where its features are read: a checkpoint may keep layers behind.
    """
    (module, *_) = getattr(parts(model), part)
    layers = list(repeated_layers(module))
    return layers[: _num_read(model, len(layers))] if part == "vision_tower" else layers


def _num_read(model: LlavaForConditionalGeneration, depth: int) -> int:
    """Return how many layers of the tower its features pass."""
    read = getattr(model.config, "vision_feature_layer", -1)
    read = [read] if isinstance(read, int) else read
    return max(layer if layer >= 0 else depth + 1 + layer for layer in read)


def repeated_layers(model: nn.Module) -> nn.ModuleList:
    """Return the stack of repeated layers of a transformer, first to last.

    Args:
        model: Tower, decoder or causal language model, with a config.
    """
    depth = model.config.num_hidden_layers
    stacks = [
        inner
        for inner in model.modules()
        if isinstance(inner, nn.ModuleList) and len(inner) == depth
    ]
    assert len(stacks) == 1, (
        f"expected one stack of {depth} layers in {type(model).__name__}, found {len(stacks)}"
    )
    return stacks[0]


def layers_of(
    model: LlavaForConditionalGeneration,
    parts: tuple[Layered, ...] = ("vision_tower", "language_model"),
) -> list[nn.Module]:
    """Return the repeated layers of several parts.

    They are the units of sharding, of compiling and of activation checkpointing.
    """
    return [layer for part in parts for layer in part_layers(model, part)]


def part_parameters(model: LlavaForConditionalGeneration, part: Part) -> dict[str, nn.Parameter]:
    """Return the parameters of a part by their name in the model; a tied head counts once."""
    modules = getattr(parts(model), part)
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    inside |= {id(parameter) for parameter in _loose_parameters(model, part)}
    return {
        name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside
    }


def _loose_parameters(model: LlavaForConditionalGeneration, part: Part) -> list[nn.Parameter]:
    """Return parameters of a part that are in none of its modules: the end of a row of tiles."""
    found = getattr(model.model, "image_newline", None)
    return [found] if found is not None and part == "projector" else []


def unread_parameters(model: LlavaForConditionalGeneration) -> set[str]:
    """Return names of the tower's parameters that its features do not depend on.

    One small backward pass finds them.

    Raises:
        ValueError: The features depend on a parameter that no gradient reaches: tuning would not
            change it.
    """
    # Every parameter of these towers is read: they end in the norm that the projector reads.
    if model.config.model_type in ("idefics3", "lfm2_vl"):
        return set()

    # Find the parameters that a gradient reaches.
    tensors = part_parameters(model, "vision_tower")
    before = {name: parameter.requires_grad for name, parameter in tensors.items()}
    for parameter in tensors.values():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            _features(model).sum(), list(tensors.values()), allow_unused=True
        )
    for name, parameter in tensors.items():
        parameter.requires_grad_(before[name])
    unread = {name for name, gradient in zip(tensors, gradients, strict=True) if gradient is None}
    if all(tensor.is_meta for tensor in tensors.values()):
        return unread  # a model on the meta device has no features to compare

    # Change the unread ones: the features must stay the same.
    with torch.no_grad():
        features = _features(model)
        kept = {name: tensors[name].clone() for name in unread}
        for name in unread:
            tensors[name].add_(1.0)
        same = torch.equal(features, _features(model))
        for name, value in kept.items():
            tensors[name].copy_(value)
    if not same:
        raise ValueError(
            f"vision_tower: no gradient reaches {len(unread)} of its tensors, "
            "but its features depend on them: look in its code for cut gradients "
            "(no_grad, detach), or set tuning.vision_tower to frozen"
        )
    return unread


def _features(model: LlavaForConditionalGeneration) -> Tensor:
    """Compute the projected features of a colour ramp in one tile, `(1, tokens, width)`."""
    size, config, inner = model.config.vision_config.image_size, model.config, model.model
    weight = next(inner.vision_tower.parameters())
    values = torch.linspace(-1, 1, 3 * size * size, dtype=weight.dtype, device=weight.device)
    pixels = values.reshape(1, 3, size, size)
    outputs = inner.vision_tower(pixels, output_hidden_states=True)
    layers = np.atleast_1d(config.vision_feature_layer)
    hidden = torch.cat([outputs.hidden_states[layer] for layer in layers], -1)
    if config.vision_feature_select_strategy == "default":
        hidden = hidden[:, 1:]
    return inner.multi_modal_projector(hidden)


def _trained_parameters(
    model: LlavaForConditionalGeneration, part: Part, tuning: str
) -> list[nn.Parameter]:
    """Return the part's own parameters that train."""
    inside = [
        parameter
        for module in tuned_modules(model, part, tuning)
        for parameter in module.parameters()
    ]
    inside += _loose_parameters(model, part) if tuning == "full" else []
    if part != "vision_tower" or not inside:
        return inside
    unread = unread_parameters(model)
    idle = {
        id(parameter) for name, parameter in part_parameters(model, part).items() if name in unread
    }
    return [parameter for parameter in inside if id(parameter) not in idle]


def _count(model: LlavaForConditionalGeneration, part: Part, tuning: str) -> TunedPart:
    tensors = part_parameters(model, part).values()
    assert any(parameter.requires_grad for parameter in tensors) == (tuning != "frozen"), part
    inside = {id(module) for top in getattr(parts(model), part) for module in top.modules()}
    return TunedPart(
        part=part,
        tuning=tuning,
        parameters=sum(num_weights(parameter) for parameter in tensors),
        trained=sum(parameter.numel() for parameter in tensors if parameter.requires_grad),
        adapters=sum(id(layer) in inside for layer in adapter_layers(model).values()),
        dtypes=tuple(sorted({weight_type(parameter) for parameter in tensors})),
    )
