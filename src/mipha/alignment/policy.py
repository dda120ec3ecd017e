"""A policy and the reference it is held to: one language model in memory where that is possible.

full     the whole model trains; the reference is a whole copy
lora     adapters train; the reference is the model with its adapters off
last-N   the last N layers train; the reference has the old ones, above layers that both share
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mipha.alignment.layers import check_depth, decoder_layers, input_of, top_layers
from mipha.alignment.recipe import RlhfRecipe
from mipha.alignment.rollout import Rollout
from mipha.models.adapters import (
    adapter_layers,
    adapter_parameters,
    add_adapters,
    merged_weights,
    remove_adapters,
)


@dataclass(frozen=True)
class Observation:
    """What a rollout is to policy and reference before anything is learned from it; all `(samples, columns, width)`.

    Args:
        policy: Last hidden states of the policy.
        reference: Last hidden states of the reference.
        policy_inputs: What the trained layers are given, where frozen ones lie below; else null.
        critic_inputs: What the reference's layers give to those of the critics.
    """

    policy: Tensor
    reference: Tensor
    policy_inputs: Tensor | None
    critic_inputs: Tensor


class Policy:
    """A language model that is trained and its reference; dropout is off in both.

    Args:
        model: Is taken over and changed.
        recipe: What of it trains, and what the critics are given.

    Raises:
        ValueError: The model has fewer layers than the recipe asks for, or none that adapters fit.
    """

    def __init__(self, model: PreTrainedModel, recipe: RlhfRecipe) -> None:
        self.model = model.requires_grad_(False).eval()
        self._critic_layers = recipe.critic_layers
        check_depth(model, recipe.critic_layers, f"critic_layers={recipe.critic_layers}")
        self._num_top = (
            int(recipe.tuning.removeprefix("last-")) if recipe.tuning.startswith("last-") else 0
        )
        check_depth(model, self._num_top, f"tuning={recipe.tuning}")
        self._reference: PreTrainedModel | None = None  # a whole model, or a top
        self._top: PreTrainedModel | None = None
        self.start = model
        """What the critics take their layers from, all of it frozen where it is not copied."""
        if recipe.tuning == "full":
            self._reference = self.start = copy.deepcopy(model)
        elif self._num_top:
            self._reference = top_layers(model, self._num_top, own=True)
            self._top = top_layers(model, self._num_top, own=False)
        if recipe.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._recipe = recipe

    def prepare_training(self) -> dict[str, nn.Parameter]:
        """Switch on what trains, and name it; to be called once, after the critics took their copies."""
        if self._recipe.tuning == "full":
            self.model.requires_grad_(True)
        elif self._recipe.tuning == "lora":
            add_adapters(
                self.model,
                {"language_model": list(decoder_layers(self.model))},
                self._recipe.adapters,
            )
            self.model.requires_grad_(False).eval()
            for layer in adapter_layers(self.model).values():
                for parameter in adapter_parameters(layer):
                    parameter.requires_grad_(True)
        else:
            decoder_layers(self.model)[-self._num_top :].requires_grad_(True)
        return {
            f"policy.{name}": weight
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }

    @torch.no_grad()
    def observe(self, rollout: Rollout) -> Observation:
        """Run policy and reference over a rollout."""
        layers = decoder_layers(self.model)
        seen = {
            "attention_mask": rollout.attention,
            "position_ids": rollout.positions,
            "use_cache": False,
        }
        if self._top is None:
            policy = self.model.base_model(rollout.ids, **seen).last_hidden_state
            reference_model = self._reference or self.model
            with (
                self._adapters_off(),
                input_of(decoder_layers(reference_model)[-self._critic_layers]) as caught,
            ):
                reference = reference_model.base_model(rollout.ids, **seen).last_hidden_state
            return Observation(policy, reference, None, caught[0])
        assert self._reference is not None
        with (
            input_of(layers[-self._num_top]) as below,
            input_of(layers[-self._critic_layers]) as caught,
        ):
            policy = self.model.base_model(rollout.ids, **seen).last_hidden_state
        policy_inputs = below[0]
        if self._critic_layers >= self._num_top:  # their layers begin in what is shared
            reference = self._reference(inputs_embeds=policy_inputs, **seen).last_hidden_state
        else:
            with input_of(decoder_layers(self._reference)[-self._critic_layers]) as caught:
                reference = self._reference(inputs_embeds=policy_inputs, **seen).last_hidden_state
        return Observation(policy, reference, policy_inputs, caught[0])

    def hidden(self, rollout: Rollout, inputs: Tensor | None) -> Tensor:
        """Last hidden states of the policy as it is now, with gradients, `(samples, columns, width)`."""
        return self.run(rollout.ids, rollout.attention, rollout.positions, inputs)

    def run(
        self, ids: Tensor, attention: Tensor, positions: Tensor, inputs: Tensor | None = None
    ) -> Tensor:
        """Last hidden states of any tokens; `inputs` spares the frozen layers."""
        seen = {"attention_mask": attention, "position_ids": positions, "use_cache": False}
        if self._top is None:
            with self._checkpointing():
                return self.model.base_model(ids, **seen).last_hidden_state
        if inputs is None:
            with torch.no_grad(), input_of(decoder_layers(self.model)[-self._num_top]) as caught:
                self.model.base_model(ids, **seen)
            inputs = caught[0]
        return self._top(inputs_embeds=inputs, **seen).last_hidden_state

    def logits(self, hidden: Tensor, of_reference: bool = False) -> Tensor:
        """The head on hidden states."""
        whole = self._reference if of_reference and self._recipe.tuning == "full" else self.model
        assert whole is not None
        return whole.get_output_embeddings()(hidden)

    def export(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write the policy as a standard language model folder, whole or not at all, adapters merged in."""
        if adapter_layers(self.model):
            merged = merged_weights(self.model, self.model.state_dict())
            remove_adapters(self.model)
            self.model.load_state_dict(merged)
        self.model.config._name_or_path = (
            ""  # else the folder on this machine that it was read from goes into a public file
        )
        self.model.config.use_cache = True
        beside = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        self.model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.rename(folder)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """The host checkpoints only layers that are in training mode, and writes no text with them: their flags alone, for a while."""
        layers = decoder_layers(self.model) if self._recipe.activation_checkpointing else ()
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
