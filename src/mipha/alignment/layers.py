"""The upper layers of a language model as a stack of its own, fed with what the layers below say.

What is frozen below is computed once, for the policy, its reference and the critics.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of repeated layers, first to last."""
    depth = model.config.num_hidden_layers
    stacks = [
        module
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    assert len(stacks) == 1, (
        f"expected one stack of {depth} layers in {type(model).__name__}, found {len(stacks)}"
    )
    return stacks[0]


def check_depth(model: PreTrainedModel, number: int, setting: str) -> None:
    """Refuse more layers than there are.

    Args:
        setting: Key and value of the recipe, for the message.
    """
    depth = model.config.num_hidden_layers
    if number > depth:
        raise ValueError(
            f"{setting} asks for more than the {depth} layers of the language model: lower it"
        )


def top_layers(model: PreTrainedModel, number: int, own: bool) -> PreTrainedModel:
    """The last layers and the norm behind them, to be given the hidden states below as `inputs_embeds`.

    Args:
        model: A causal language model; all but its layers is shared with it.
        number: Layers.
        own: Whether the stack has copies of the layers, or the model's own ones.
    """
    stack, layers = model.base_model, decoder_layers(model)
    copied = {
        id(stack),
        id(layers),
        *(id(module) for layer in layers[-number:] for module in layer.modules() if own),
    }
    shared: dict[int, Any] = {
        id(module): module for module in stack.modules() if id(module) not in copied
    }
    top = copy.deepcopy(stack, shared)
    for name, module in top.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(layers):
            top.set_submodule(name, module[-number:])
            break
    top.config = copy.deepcopy(stack.config)
    top.config.num_hidden_layers = number
    if getattr(top.config, "layer_types", None):
        top.config.layer_types = top.config.layer_types[-number:]
    return top


@contextmanager
def input_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Catch what a layer is given while the model runs; the list has it afterwards."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])

    hook = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield caught
    finally:
        hook.remove()
