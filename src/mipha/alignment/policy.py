"""The models of RLHF: a policy, the reference that it is held to, and the critics.

    full     the whole model trains; the reference is a whole copy
    lora     adapters train; the reference is the model with its adapters off
    last-N   the last N layers train; the reference has the old ones, above shared frozen layers
    critics  each has its own copy of the last layers, above the frozen layers of the reference

Frozen layers run once for a rollout. What they give to the layers above is kept, so policy,
reference and critics need one model in memory, plus their own layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mipha.alignment.recipe import RlhfRecipe
from mipha.alignment.rollout import Rollout
from mipha.models.adapters import (
    adapter_layers,
    adapter_parameters,
    add_adapters,
    merged_weights,
    remove_adapters,
)
from mipha.models.tuning import repeated_layers


@dataclass(frozen=True)
class Observation:
    """The results of policy and reference on a rollout, all `(samples, columns, width)`.

    Args:
        policy: Last hidden states of the policy.
        reference: Last hidden states of the reference.
        policy_inputs: Inputs of the policy's trained layers, where frozen ones lie below; else
            None.
        critic_inputs: Hidden states of the reference that the critics' layers read.
    """

    policy: Tensor
    reference: Tensor
    policy_inputs: Tensor | None
    critic_inputs: Tensor


class Policy:
    """A language model that trains, and its reference; dropout is off in both.

    Args:
        model: Causal language model, which is taken over and changed.
        recipe: Recipe that says what trains and how many layers a critic has.

    Raises:
        ValueError: The model has fewer layers than the recipe asks for, or none that adapters fit.
    """

    def __init__(self, model: PreTrainedModel, recipe: RlhfRecipe) -> None:
        self.model = model.requires_grad_(False).eval()
        self._recipe = recipe
        self._critic_layers = recipe.critic_layers
        self._num_top = 0
        if recipe.tuning.startswith("last-"):
            self._num_top = int(recipe.tuning.removeprefix("last-"))
        _check_depth(model, self._critic_layers, f"critic_layers={self._critic_layers}")
        _check_depth(model, self._num_top, f"tuning={recipe.tuning}")

        # Make the reference. With lora it is the model itself.
        self._reference: PreTrainedModel | None = None  # a whole model, or its last layers
        self._top: PreTrainedModel | None = None  # the policy's last layers
        self.start = model
        """The model whose layers the critics copy; all else of it is frozen."""
        if recipe.tuning == "full":
            self._reference = self.start = copy.deepcopy(model)
        elif self._num_top:
            self._reference = top_layers(model, self._num_top, own=True)
            self._top = top_layers(model, self._num_top, own=False)
        if recipe.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def prepare_training(self) -> dict[str, nn.Parameter]:
        """Make the trained weights require gradients, and return them by name.

        To be called once, after the critics have made their copies.
        """
        layers = repeated_layers(self.model)
        if self._recipe.tuning == "full":
            self.model.requires_grad_(True)
        elif self._recipe.tuning == "lora":
            add_adapters(self.model, {"language_model": list(layers)}, self._recipe.adapters)
            self.model.requires_grad_(False).eval()
            for layer in adapter_layers(self.model).values():
                for parameter in adapter_parameters(layer):
                    parameter.requires_grad_(True)
        else:
            layers[-self._num_top :].requires_grad_(True)

        return {
            f"policy.{name}": weight
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }

    @torch.no_grad()
    def observe(self, rollout: Rollout) -> Observation:
        """Run policy and reference over a rollout."""
        seen = _masked(rollout.attention, rollout.positions)

        # Nothing is shared (full), or everything is (lora): run each model whole.
        if self._top is None:
            policy = self.model.base_model(rollout.ids, **seen).last_hidden_state
            model = self._reference or self.model
            with self._adapters_off(), _input_of(self._critic_layer(model)) as critic_inputs:
                reference = model.base_model(rollout.ids, **seen).last_hidden_state
            return Observation(policy, reference, None, critic_inputs[0])

        # The lower layers are shared (last-N): run the policy whole, and catch what they give.
        assert self._reference is not None
        lowest_trained = repeated_layers(self.model)[-self._num_top]
        with (
            _input_of(lowest_trained) as policy_inputs,
            _input_of(self._critic_layer(self.model)) as critic_inputs,
        ):
            policy = self.model.base_model(rollout.ids, **seen).last_hidden_state

        # Run only the reference's own layers on it.
        if self._critic_layers >= self._num_top:  # the critics begin in the shared layers
            reference = self._reference(inputs_embeds=policy_inputs[0], **seen)
        else:
            with _input_of(self._critic_layer(self._reference)) as critic_inputs:
                reference = self._reference(inputs_embeds=policy_inputs[0], **seen)
        return Observation(policy, reference.last_hidden_state, policy_inputs[0], critic_inputs[0])

    def hidden(
        self, ids: Tensor, attention: Tensor, positions: Tensor, inputs: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states of the policy as it is now, with gradients.

        Args:
            ids: Token ids `(samples, columns)`.
            attention: 1 where a token is seen, `(samples, columns)`.
            positions: Place of each token in its own text, `(samples, columns)`.
            inputs: `Observation.policy_inputs` of these tokens, which saves running the frozen
                layers; None: they run.

        Returns:
            Hidden states `(samples, columns, width)`.
        """
        seen = _masked(attention, positions)
        if self._top is None:
            with self._checkpointing():
                return self.model.base_model(ids, **seen).last_hidden_state

        if inputs is None:
            lowest_trained = repeated_layers(self.model)[-self._num_top]
            with torch.no_grad(), _input_of(lowest_trained) as caught:
                self.model.base_model(ids, **seen)
            inputs = caught[0]
        return self._top(inputs_embeds=inputs, **seen).last_hidden_state

    def logits(self, hidden: Tensor, of_reference: bool = False) -> Tensor:
        """Apply the head to hidden states: `(..., width)` -> `(..., vocabulary)`."""
        whole = self._reference if of_reference and self._recipe.tuning == "full" else self.model
        assert whole is not None
        return whole.get_output_embeddings()(hidden)

    def merge_adapters(self) -> PreTrainedModel:
        """Return the policy as a standard language model; adapters are merged into its weights."""
        if adapter_layers(self.model):
            merged = merged_weights(self.model, self.model.state_dict())
            remove_adapters(self.model)
            self.model.load_state_dict(merged)
        return self.model

    def _critic_layer(self, model: PreTrainedModel) -> nn.Module:
        """Return the layer where the critics' own layers begin."""
        return repeated_layers(model)[-self._critic_layers]

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Set the layers' training flags alone for a while.

        transformers checkpoints only layers in training mode, and samples no text with them.
        """
        layers = repeated_layers(self.model) if self._recipe.activation_checkpointing else ()
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        layers = adapter_layers(self.model).values()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


class Critic(nn.Module):
    """Predicts the score of a half-written response.

    It has its own copy of the last layers of the policy's starting model, and a head with one
    number. The head starts at zero, which predicts nothing. The reference program gives each critic
    a whole model, started from the reward or cost model; a few layers above the frozen reference,
    whose states are computed anyway, need a fraction of that memory and time.

    Args:
        start: `Policy.start`.
        num_layers: Number of layers of its own.
    """

    def __init__(self, start: PreTrainedModel, num_layers: int) -> None:
        super().__init__()
        self.top = top_layers(start, num_layers, own=True).requires_grad_(False)
        self.own = repeated_layers(self.top).requires_grad_(True)
        self.head = nn.Linear(start.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(start.device)

    def forward(self, inputs: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        """Return the value after each column.

        Args:
            inputs: `Observation.critic_inputs`, `(samples, columns, width)`.
            attention: 1 where a token is seen, `(samples, columns)`.
            positions: Place of each token in its own text, `(samples, columns)`.

        Returns:
            Values `(samples, columns)` float32.
        """
        hidden = self.top(inputs_embeds=inputs, **_masked(attention, positions)).last_hidden_state
        return self.head(hidden).squeeze(-1).float()

    def trained(self, prefix: str) -> dict[str, nn.Parameter]:
        """Return the trained weights by name."""
        return {
            f"{prefix}.{name}": weight
            for part in ("own", "head")
            for name, weight in getattr(self, part).named_parameters(part)
        }


def top_layers(model: PreTrainedModel, number: int, own: bool) -> PreTrainedModel:
    """Return a decoder of the last layers and the final norm, which reads `inputs_embeds`.

    Args:
        model: Causal language model; all but its layers is shared with it.
        number: Number of layers.
        own: Whether the decoder gets copies of the layers, or shares them too.
    """
    decoder, layers = model.base_model, repeated_layers(model)

    # Copy the decoder, but share its modules: `deepcopy` takes what is in its memo as copied.
    copied = {
        id(decoder),
        id(layers),
        *(id(module) for layer in layers[-number:] for module in layer.modules() if own),
    }
    shared: dict[int, Any] = {
        id(module): module for module in decoder.modules() if id(module) not in copied
    }
    top = copy.deepcopy(decoder, shared)

    # Keep only the last layers, in the config too.
    for name, module in top.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(layers):
            top.set_submodule(name, module[-number:])
            break
    top.config = copy.deepcopy(decoder.config)
    top.config.num_hidden_layers = number
    if getattr(top.config, "layer_types", None):
        top.config.layer_types = top.config.layer_types[-number:]
    return top


def _check_depth(model: PreTrainedModel, number: int, setting: str) -> None:
    depth = model.config.num_hidden_layers
    if number > depth:
        raise ValueError(
            f"{setting} asks for more than the {depth} layers of the language model: lower it"
        )


def _masked(attention: Tensor, positions: Tensor) -> dict[str, Any]:
    """Return the arguments that every forward pass gets besides its tokens."""
    return {"attention_mask": attention, "position_ids": positions, "use_cache": False}


@contextmanager
def _input_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Catch the input of a layer while the model runs; the list holds it afterwards."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])

    hook = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield caught
    finally:
        hook.remove()
