"""Memory of a training step by component, counted before it is taken.

Weights, gradients and moments follow from the parameters. What a forward pass keeps for the backward pass is found by running tower,
projector and language model on tensors that have shapes and no numbers, with a note of every tensor that autograd holds on to.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from mipha.models.loss import CHUNK
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import layers_of
from mipha.recipe import PARTS, StageRecipe

OVERHEAD = {"gpu": 1.2e9, "cpu": 0.6e9}
"""Bytes of the process itself: CUDA's context and libraries; Python, torch and transformers."""


@dataclass(frozen=True)
class MicroBatch:
    """The widest forward pass of a stage.

    Args:
        rows: Side by side.
        tokens: Of a row, padding included.
        images: In all rows.
    """

    rows: int
    tokens: int
    images: int


def memory_of(
    model: LlavaForConditionalGeneration,
    stage: StageRecipe,
    micro_batch: MicroBatch,
    kind: str,
    autocast: bool,
    shards: int,
) -> dict[str, float]:
    """Bytes of one device by component.

    Args:
        model: On the meta device, with its tuning applied.
        kind: gpu or cpu.
        autocast: Whether matrix products run in bfloat16.
        shards: Devices that weights, gradients and moments are spread over.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in trained)
    halved = autocast and kind == "gpu"  # frozen matrices are kept in bfloat16 there
    kept = sum(
        parameter.numel() * (2 if halved and parameter.dim() > 1 else parameter.element_size())
        for parameter in frozen
    )
    largest_layer = max(
        (sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)), default=0
    )
    copies = (
        2.0 * sum(parameter.numel() for parameter in trained if parameter.dim() > 1)
        if autocast
        else 0.0
    )
    vocabulary = model.config.text_config.vocab_size
    return {
        "weights": 4.0 * numbers / shards + kept / shards,
        "gradients": 4.0 * numbers / shards,
        "optimizer": 8.0 * numbers / shards,
        # Autocast keeps what it cast until the forward pass ends; sharded, two layers are whole at a time.
        "working copies": copies if shards == 1 else 2 * 6.0 * largest_layer,
        "activations": kept_bytes(model, stage, micro_batch, autocast),
        "logits": min(CHUNK, micro_batch.rows * micro_batch.tokens)
        * vocabulary
        * (4.0 + 4.0 + (2.0 if autocast else 0.0)),
        "program": OVERHEAD[kind],
    }


def kept_bytes(
    model: LlavaForConditionalGeneration,
    stage: StageRecipe,
    micro_batch: MicroBatch,
    autocast: bool,
) -> float:
    """Bytes that a forward pass keeps for the backward pass.

    With activation checkpointing, what enters each layer of that part, and all of one layer while it is computed again.
    """
    config = model.config
    kept = _kept_by_part(model, micro_batch, autocast)
    tower_tokens = (
        micro_batch.images
        * (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    )
    entering = {
        "vision_tower": 4.0 * tower_tokens * config.vision_config.hidden_size,
        "language_model": 4.0
        * micro_batch.rows
        * micro_batch.tokens
        * config.text_config.hidden_size,
    }
    for part in stage.checkpointed:
        layers = len(layers_of(model, (part,)))
        kept[part] = min(kept[part], layers * entering[part] + kept[part] / layers)
    return sum(kept.values())


def _kept_by_part(
    model: LlavaForConditionalGeneration, micro_batch: MicroBatch, autocast: bool
) -> dict[str, float]:
    """The parts' forward passes on tensors that have shapes and no numbers, with a note of every tensor that autograd keeps."""
    rows, tokens, images = micro_batch.rows, micro_batch.tokens, micro_batch.images
    vision = model.config.vision_config
    kept: dict[str, dict[int, int]] = {part: {} for part in PARTS}
    part = "vision_tower"

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[part][storage._cdata] = storage.nbytes()
        return tensor

    fake = copy.deepcopy(model)
    with (
        FakeTensorMode(),
        saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        _on_a_cpu_without_numbers(fake)
        own = {parameter.untyped_storage()._cdata for parameter in fake.parameters()}
        embeddings = fake.get_input_embeddings()(torch.zeros(rows, tokens, dtype=torch.long))
        if images:
            pixels = torch.empty(images, vision.num_channels, vision.image_size, vision.image_size)
            features = fake.model.vision_tower(pixels).last_hidden_state
            part = "projector"
            embeddings = embeddings + 0 * fake.model.multi_modal_projector(features).mean()
        part = "language_model"
        mask = torch.zeros(rows, 1, tokens, tokens, dtype=embeddings.dtype)
        position_ids = torch.arange(tokens).expand(rows, tokens)
        fake.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=False,
        )
    return {
        name: float(sum(size for storage, size in sizes.items() if storage not in own))
        for name, sizes in kept.items()
    }


def _on_a_cpu_without_numbers(model: LlavaForConditionalGeneration) -> None:
    """Tensors that say that they are on a CPU in place of those on the meta device, which autocast passes over; under FakeTensorMode."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
