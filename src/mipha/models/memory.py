"""Memory of a training step by component, counted before it is taken.

Weights, gradients and moments follow from the parameters. To find the tensors that autograd keeps
for the backward pass, the parts run on fake tensors, which have shapes and no numbers.

`memory_of_copies` is what `sharding: auto` decides by.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mipha.models.loss import CHUNK
from mipha.models.modeling import LlavaForConditionalGeneration, parts, tile_tokens
from mipha.models.tuning import layers_of
from mipha.recipe import PARTS, StageRecipe

RESERVE = 0.9
"""Share of a device's memory that may be used: the count leaves out the allocator's holes."""

OVERHEAD = {"gpu": 1.2e9, "cpu": 0.6e9}
"""Bytes of the process itself: the context and libraries of CUDA; Python, torch, transformers."""


_ATEN = torch.ops.aten
PRODUCTS = (
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.linear.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What `activation_checkpointing: selective` keeps: nearly all of the work of a layer, and about
half of its memory. Norms, activation functions, rotations, casts and the kernels of `flex` and
`varlen`, which are no operators of ATen, are computed again.
"""


@dataclass(frozen=True)
class MicroBatch:
    """The widest forward pass of a stage.

    Args:
        rows: Rows side by side.
        tokens: Tokens of a row, padding included.
        images: Images in all rows.
    """

    rows: int
    tokens: int
    images: int


def largest_batch(model: LlavaForConditionalGeneration, stage: StageRecipe) -> MicroBatch:
    """Return the widest forward pass that a stage can have: full rows, of images alone.

    It follows from the recipe, so no data are read, and every process finds the same.
    """
    rows, tokens = stage.micro_batch_rows, stage.row_tokens
    return MicroBatch(rows, tokens, rows * max(1, tokens // tile_tokens(model.config)[1]))


def memory_of_copies(
    model: LlavaForConditionalGeneration,
    stage: StageRecipe,
    kind: str,
    autocast: bool,
    num_processes: int,
) -> float:
    """Return bytes of each device where every process holds the whole model (ddp).

    `sharding: auto` compares this with the memory of a device, in training and in plans.

    Args:
        model: As for `memory_of`, like the arguments behind it.
    """
    batch = largest_batch(model, stage)
    return sum(memory_of(model, stage, batch, kind, autocast, 1, num_processes).values())


def memory_of(
    model: LlavaForConditionalGeneration,
    stage: StageRecipe,
    micro_batch: MicroBatch,
    kind: str,
    autocast: bool,
    shards: int,
    num_processes: int = 1,
) -> dict[str, float]:
    """Return bytes of one device by component.

    Args:
        model: Model on the meta device, with its tuning applied.
        kind: gpu or cpu.
        autocast: Whether matrix products run in bfloat16.
        shards: Devices that weights, gradients and moments are spread over.
        num_processes: Devices that train together.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in trained)

    # On a GPU, frozen matrices are kept in bfloat16.
    halved = autocast and kind == "gpu"
    kept = sum(
        parameter.numel() * (2 if halved and parameter.dim() > 1 else parameter.element_size())
        for parameter in frozen
    )

    # Autocast keeps its copies of matrices until the forward pass ends. Sharded, two layers are
    # whole at a time.
    copies = (
        2.0 * sum(weight.numel() for weight in trained if weight.dim() > 1) if autocast else 0.0
    )
    if shards > 1:
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
        copies = 2 * 6.0 * max(sizes, default=0)

    # FSDP2 computes with a copy of the weights, which with one shard is whole for a whole pass.
    elif num_processes > 1:
        copies += 4.0 * numbers + kept

    # Logits of a chunk, their gradient, and a copy of them in bfloat16.
    positions = min(CHUNK, micro_batch.rows * micro_batch.tokens)
    logits = positions * model.config.text_config.vocab_size * (4.0 + 4.0 + 2.0 * autocast)

    return {
        "weights": 4.0 * numbers / shards + kept / shards,
        "gradients": 4.0 * numbers / shards,
        "optimizer": 8.0 * numbers / shards,
        "working copies": copies,
        "activations": kept_bytes(model, stage, micro_batch, autocast),
        "logits": logits,
        "program": OVERHEAD[kind],
    }


def memory_of_pairs(
    model: LlavaForConditionalGeneration,
    stage: StageRecipe,
    micro_batch: MicroBatch,
    kind: str,
    autocast: bool,
) -> dict[str, float]:
    """Return bytes of one device by component where answers are preferred, through TRL.

    All weights stay in float32, and without adapters the model that the stage starts from lies
    beside the one that trains. Arguments are those of `memory_of`; the stage is `as_answers`.
    """
    found = memory_of(model, stage, micro_batch, "cpu", autocast, 1)  # no frozen weights in 16 bits
    whole = 4.0 * sum(parameter.numel() for parameter in model.parameters())
    reference = whole if stage.tuning.language_model == "full" else 0.0
    return found | {"program": OVERHEAD[kind], "reference model": reference}


def kept_bytes(
    model: LlavaForConditionalGeneration,
    stage: StageRecipe,
    micro_batch: MicroBatch,
    autocast: bool,
) -> float:
    """Return the bytes that a forward pass keeps for the backward pass.

    With activation checkpointing, a part keeps what enters each of its layers, the products where
    it is selective, and all of one layer while that is computed again.
    """
    vision, text = model.config.vision_config, model.config.text_config
    patches = micro_batch.images * tile_tokens(model.config)[0]
    tokens = micro_batch.rows * micro_batch.tokens
    entering = {
        "vision_tower": 4.0 * patches * vision.hidden_size,
        "language_model": 4.0 * tokens * text.hidden_size,
    }

    kept, products = _kept_by_part(model, micro_batch, autocast)
    for part in stage.checkpointed:
        layers = len(layers_of(model, (part,)))
        stays = products[part] if stage.keeps_products and kept[part] else 0.0
        again = max(0.0, kept[part] - stays) / layers
        kept[part] = min(kept[part], layers * entering[part] + stays + again)
    return sum(kept.values())


class _CountProducts(TorchDispatchMode):
    """Counts the bytes of what `PRODUCTS` return, by the part that is at work.

    Args:
        part: Function that names that part.
    """

    def __init__(self, part: Callable[[], str]) -> None:
        super().__init__()
        self.part, self.num_bytes = part, dict.fromkeys(PARTS, 0.0)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        result = function(*arguments, **(options or {}))
        if function in PRODUCTS:
            tensors = result if isinstance(result, tuple) else (result,)
            self.num_bytes[self.part()] += sum(
                tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)
            )
        return result


def _kept_by_part(
    model: LlavaForConditionalGeneration, micro_batch: MicroBatch, autocast: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Run the forward pass of each part on fake tensors.

    Returns:
        Bytes that autograd keeps of it, and bytes of its products.
    """
    rows, tokens, images = micro_batch.rows, micro_batch.tokens, micro_batch.images
    kept: dict[str, dict[int, int]] = {part: {} for part in PARTS}
    part = "vision_tower"
    products = _CountProducts(lambda: part)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[part][storage._cdata] = storage.nbytes()
        return tensor

    fake = copy.deepcopy(model)
    with (
        FakeTensorMode(),
        saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        products,
    ):
        _move_to_fake_cpu(fake)
        own = {parameter.untyped_storage()._cdata for parameter in fake.parameters()}

        # Tower and projector; the language model's inputs depend on them, so gradients pass.
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        embeddings = fake.get_input_embeddings()(ids)  # (rows, tokens, width)
        if images:
            features = tower_output(fake, images)  # (images, patches, width)
            part = "projector"
            (projector,) = parts(fake).projector
            embeddings = embeddings + 0 * projector(features).mean()

        # Language model, with a mask, so that attention is the one of packed rows.
        part = "language_model"
        parts(fake).language_model[0](
            inputs_embeds=embeddings,
            attention_mask=torch.zeros(rows, 1, tokens, tokens, dtype=embeddings.dtype),
            position_ids=torch.arange(tokens).expand(rows, tokens),
            use_cache=False,
        )

    # Weights are counted elsewhere.
    activations = {
        name: float(sum(size for storage, size in sizes.items() if storage not in own))
        for name, sizes in kept.items()
    }
    return activations, products.num_bytes


def tower_output(model: LlavaForConditionalGeneration, images: int) -> torch.Tensor:
    """Run the tower on so many tiles, and return what enters the projector."""
    (tower,) = parts(model).vision_tower
    vision = model.config.vision_config
    if model.config.model_type not in ("idefics3", "lfm2_vl"):
        side = vision.image_size
        pixels = torch.zeros(images, vision.num_channels, side, side, dtype=model.dtype)
        hidden = tower(pixels).last_hidden_state
        layers = model.config.vision_feature_layer  # a list: the projector reads them side by side
        return torch.cat([hidden] * (len(layers) if isinstance(layers, list) else 1), -1)

    # These two find positions by the values of their inputs, which fake tensors do not have. What
    # enters their layers stands in for it.
    patches = tile_tokens(model.config)[0]
    hidden = torch.zeros(images, patches, vision.hidden_size, dtype=model.dtype)
    hidden = hidden + 0 * tower.embeddings.position_embedding.weight.mean()
    hidden = tower.post_layernorm(
        tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
    )
    if model.config.model_type == "idefics3":
        return hidden
    side = math.isqrt(patches)
    return hidden.reshape(images, side, side, -1)


def _move_to_fake_cpu(model: LlavaForConditionalGeneration) -> None:
    """Replace tensors on the meta device by fake ones on a CPU, because autocast skips the former.

    Runs under FakeTensorMode.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
