"""FLOPs of a training step, counted from the model's matrices and its attention mask.

                 positions that pass it     linear FLOPs      attention FLOPs
vision tower     tokens of each image       2 x weights x n   4 x width x n^2: all see all
projector        image tokens               2 x weights x n
language model   real tokens                2 x weights x n   4 x width x (query, key) pairs
head             supervised positions       2 x weights x n

A step costs the forward pass once; where a gradient passes, its products with the weights once
more; where the weights train, their gradient too: 1, 2 or 3 times. Both factors of attention are
activations, so it costs 3 times wherever a gradient passes. Padding, blank images, norms, and the
second forward pass of activation checkpointing are not counted: the count is the useful work of a
step, not its cost.

Source: PaLM (Chowdhery et al. 2022), appendix B, for 2 FLOPs a weight and token forward and twice
that backward. There attention counts all pairs, here those of the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from mipha.models.modeling import LlavaForConditionalGeneration, parts, tile_tokens
from mipha.models.quantization import num_weights
from mipha.models.tuning import part_layers
from mipha.recipe import Part

Positions = Literal["patches", "tower tokens", "image tokens", "tokens", "supervised"]


@dataclass(frozen=True)
class Unit:
    """A section of the model, in the order of the forward pass.

    Args:
        part: Part that it belongs to.
        positions: Positions that pass it.
        weights: Numbers in its matrices; each is multiplied with every position.
        trained: Numbers of these that get a gradient.
        attention: Heads times width of a head; 0 where there is no attention.
        reached: Whether a gradient passes it in the backward pass.
    """

    part: Part
    positions: Positions
    weights: int
    trained: int
    attention: int
    reached: bool

    def flops(self, num_positions: int, num_pairs: int) -> tuple[int, int]:
        """Return its FLOPs forward, and forward and backward together.

        Args:
            num_positions: Positions that pass it.
            num_pairs: (query, key) pairs that attend.
        """
        linear, attention = 2 * num_positions, 4 * self.attention * num_pairs
        forward = linear * self.weights + attention
        backward = linear * (self.weights + self.trained) + 2 * attention
        return forward, forward + (backward if self.reached else 0)


@dataclass(frozen=True)
class Work:
    """The work of a step, or of a sample: real positions alone.

    Args:
        images: Images encoded; a shared one counts once.
        tokens: Tokens of the language model.
        pairs: (query, key) pairs that its mask allows.
        supervised: Positions whose logits are made.
    """

    images: int
    tokens: int
    pairs: int
    supervised: int


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one part: forward alone, and with the backward pass."""

    forward: int
    total: int


class StepFlops:
    """Counts the FLOPs of steps of one model; it may be on the meta device.

    Every matrix of a layer counts as multiplied with every position, so a mixture of experts counts
    as if every expert were asked.

    Args:
        model: Model with its tuning applied.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self._patches, self._image_tokens = tile_tokens(model.config)
        # The stock class leaves out the tower's first token where there is one before the patches.
        strategy = getattr(model.config, "vision_feature_select_strategy", None)
        self._tower_tokens = self._image_tokens + (strategy == "default")
        if strategy is None:  # a shuffle stands between the tower and the projector
            self._tower_tokens = self._patches
        self.units = tuple(_units(model))

    def by_part(self, work: Work) -> dict[Part, PartFlops]:
        """Return the FLOPs of each part; the head belongs to the language model."""
        counts: dict[Positions, tuple[int, int]] = {
            "patches": (work.images * self._patches, 0),
            "tower tokens": (work.images * self._tower_tokens, work.images * self._tower_tokens**2),
            "image tokens": (work.images * self._image_tokens, 0),
            "tokens": (work.tokens, work.pairs),
            "supervised": (work.supervised, 0),
        }
        sums: dict[Part, PartFlops] = {}
        for unit in self.units:
            forward, total = unit.flops(*counts[unit.positions])
            before = sums.get(unit.part, PartFlops(0, 0))
            sums[unit.part] = PartFlops(before.forward + forward, before.total + total)
        return sums

    def total(self, work: Work) -> int:
        """Return the forward and backward FLOPs of all parts."""
        return sum(flops.total for flops in self.by_part(work).values())


def _units(model: LlavaForConditionalGeneration) -> Iterator[Unit]:
    """Yield the sections of a model in the order of the forward pass."""
    config, (tower,), (projector,) = model.config, parts(model).vision_tower, parts(model).projector
    patches = [module for module in tower.modules() if isinstance(module, nn.Conv2d)]
    if config.model_type == "lfm2_vl":
        patches = [tower.embeddings.patch_embedding]
    tower_layers = part_layers(model, "vision_tower")
    language_layers = part_layers(model, "language_model")
    tower_width = _attention_width(config.vision_config)
    language_width = _attention_width(config.text_config)

    chain: list[tuple[Part, Positions, nn.Module, int]] = [
        *(("vision_tower", "patches", module, 0) for module in patches),
        *(("vision_tower", "tower tokens", layer, tower_width) for layer in tower_layers),
        ("projector", "image tokens", projector, 0),
        *(("language_model", "tokens", layer, language_width) for layer in language_layers),
        ("language_model", "supervised", model.lm_head, 0),
    ]

    # A gradient passes everything behind the first weight that trains.
    embeddings_train = _trains(model.get_input_embeddings())
    reached = False
    for part, positions, module, attention in chain:
        reached = reached or _trains(module) or (part == "language_model" and embeddings_train)
        # Biases, norms and scales are not matrix products. A convolution's kernel is a matrix with
        # more axes.
        matrices = [parameter for parameter in module.parameters() if parameter.dim() >= 2]
        weights = sum(num_weights(matrix) for matrix in matrices)
        trained = sum(num_weights(matrix) for matrix in matrices if matrix.requires_grad)
        yield Unit(part, positions, weights, trained, attention, reached)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _attention_width(config: object) -> int:
    heads, width = config.num_attention_heads, config.hidden_size  # type: ignore[attr-defined]
    return heads * (getattr(config, "head_dim", None) or width // heads)
