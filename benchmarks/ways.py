"""Ways to train on the same samples: the stock LLaVA as users train it, and changes to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import LlavaProcessor
from workloads import TUNING, Workload, stage_recipe, write_samples

from mipha.data.batches import StepDataset
from mipha.data.collate import collate
from mipha.data.encode import IGNORE, Encoded
from mipha.data.mixture import Mixture
from mipha.data.packing import Row, make_rows
from mipha.models.attention import dense_mask, use_segments
from mipha.models.build import build
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import apply_tuning
from mipha.models.vision_tower import load_vision_tower
from mipha.recipe import ModelRecipe
from mipha.training.loop import make_optimizer


@dataclass(frozen=True)
class Way:
    """Way to train; the defaults are the baseline.

    Args:
        name: Name in reports.
        own_loss: True for our class, with logits of supervised positions alone; False for the stock
            class, with logits of all positions.
        attention: `eager` or `sdpa`.
        batching: `padded`, `packed` or `shared-image`.
        grouped: True to sort padded samples by length, in two micro-batches.
        bf16: True for matrix products in bfloat16; weights and optimizer stay float32.
        fused: True for AdamW in one kernel; False for torch's loop over tensors.
        pruned: True to remove the tower's layers above the one that is read.
    """

    name: str
    own_loss: bool = False
    attention: str = "eager"
    batching: str = "padded"
    grouped: bool = False
    bf16: bool = False
    fused: bool = False
    pruned: bool = False


BASELINE = Way("stock LLaVA")
"""Padding to the longest of the batch, logits of all positions, eager attention, float32."""

STOCK_BFLOAT16 = Way("stock LLaVA, bfloat16", bf16=True)
"""The same in bfloat16, as upstream trains: what ours in bfloat16 is compared with."""

LEVERS = (
    Way("grouped by length", grouped=True),
    Way("SDPA", attention="sdpa"),
    Way("supervised logits only", own_loss=True),
    Way("packing", batching="packed"),
    Way("bfloat16", bf16=True),
    Way("fused AdamW", fused=True),
    Way("pruned tower", pruned=True),
)
SHARING = Way("shared images", batching="shared-image")


def together(batching: str, bf16: bool) -> Way:
    """Return the way that has all levers at once."""
    name = f"mipha, {batching}, {'bfloat16' if bf16 else 'float32'}"
    return Way(
        name, own_loss=True, attention="sdpa", batching=batching, bf16=bf16, fused=True, pruned=True
    )


@dataclass(frozen=True)
class Outcome:
    """Outcome of some steps.

    Args:
        seconds: Seconds of all steps (forward, backward, optimizer), without reading samples.
        losses: Mean loss over supervised tokens, nats, before each step and after the last.
        num_positions: Number of positions that the language model computed, padding included.
    """

    seconds: float
    losses: tuple[float, ...]
    num_positions: int


class Trial:
    """Weights and samples from which every way starts anew.

    Args:
        folder: Folder of the samples' files.
        parts: Parts of the model; its tower ends at the layer that is read, and a whole tower is
            loaded beside it.
        workload: Conversations to train on.
        stage: `pretrain` or `finetune`.
        num_steps: Number of timed optimizer steps.
    """

    def __init__(
        self, folder: Path, parts: ModelRecipe, workload: Workload, stage: str, num_steps: int
    ) -> None:
        torch.manual_seed(0)
        self.workload, self.stage, self.num_steps = workload, stage, num_steps

        # Build the model with a pruned tower, and load the whole tower beside it.
        self.model, self.processor = build(parts)
        self._whole_tower, _, _ = load_vision_tower(
            parts.model_copy(update={"feature_layer": -1}), torch.float32
        )
        self._whole_tower.requires_grad_(False)
        self._pruned_tower = self.model.model.vision_tower
        self._layer_read = self._pruned_tower.config.num_hidden_layers

        # Keep the weights that training starts from.
        apply_tuning(self.model, TUNING[stage])
        self._start = {
            name: weight.detach().clone()
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }

        # Read the samples.
        file = (
            None
            if workload.dataset
            else write_samples(folder / "samples", workload, workload.batch_size * num_steps)
        )
        self.recipe = stage_recipe(
            file, workload, stage, "shared-image" if workload.questions > 1 else "packed"
        )
        steps = StepDataset(Mixture(self.recipe.data), self.processor, self.recipe, seed=0)
        self.samples = [steps.samples(step) for step in range(num_steps)]
        self._batches: dict[Way, list[list[dict[str, Tensor]]]] = {}

    @property
    def num_tokens(self) -> int:
        """Number of real tokens of all steps, each sample by itself."""
        return sum(len(sample) for samples in self.samples for sample in samples)

    def run(self, way: Way, num_steps: int | None = None) -> Outcome:
        """Train from the start; the time includes the steps, not the loss at the end."""
        model = self._prepared(way)
        optimizer = self._optimizer(way)
        batches = self._batches_of(way)[: num_steps or self.num_steps]

        losses = []
        started = time.perf_counter()
        for step in batches:
            losses.append(_loss(model, way, step, train=True))
            nn.utils.clip_grad_norm_(
                [weight for group in optimizer.param_groups for weight in group["params"]], 1.0
            )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started

        with torch.no_grad():
            losses.append(_loss(model, way, batches[-1], train=False))
        return Outcome(
            seconds,
            tuple(losses),
            sum(batch["input_ids"].numel() for step in batches for batch in step),
        )

    def _prepared(self, way: Way) -> nn.Module:
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if name in self._start:
                    weight.copy_(self._start[name])

        self.model.model.vision_tower = self._pruned_tower if way.pruned else self._whole_tower
        self.model.config.vision_feature_layer = -1 if way.pruned else self._layer_read
        self.model.set_attn_implementation(way.attention)
        if way.own_loss:
            use_segments(self.model)
        return self.model if way.own_loss else stock_model(self.model)

    def _optimizer(self, way: Way) -> torch.optim.Optimizer:
        if way.fused:
            return make_optimizer(self.model, self.recipe)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        recipe = self.recipe
        return torch.optim.AdamW(
            trained,
            recipe.learning_rate,
            betas=recipe.adam_betas,
            eps=recipe.adam_eps,
            weight_decay=recipe.weight_decay,
        )

    def _batches_of(self, way: Way) -> list[list[dict[str, Tensor]]]:
        key = replace(BASELINE, own_loss=way.own_loss, batching=way.batching, grouped=way.grouped)
        if key not in self._batches:
            self._batches[key] = [
                _micro_batches(samples, way, self.workload, self.processor)
                for samples in self.samples
            ]
        return self._batches[key]


def stock_model(model: LlavaForConditionalGeneration) -> transformers.LlavaForConditionalGeneration:
    """Return the model class of transformers around the same modules."""
    with torch.device("meta"):
        stock = transformers.LlavaForConditionalGeneration(model.config)
    stock.model, stock.lm_head = model.model, model.lm_head
    return stock.eval()


def _micro_batches(
    samples: Sequence[Encoded], way: Way, workload: Workload, processor: LlavaProcessor
) -> list[dict[str, Tensor]]:
    if way.batching == "padded":
        ordered = sorted(samples, key=len) if way.grouped else samples
        rows = [make_rows([sample], workload.row_tokens, "padded")[0] for sample in ordered]
        size = max(1, len(rows) // 2) if way.grouped else workload.micro_batch
    else:
        rows, size = make_rows(samples, workload.row_tokens, way.batching), 1
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [
        collate(chunk, processor) if way.own_loss else _for_stock(chunk, processor)
        for chunk in chunks
    ]


def _for_stock(rows: Sequence[Row], processor: LlavaProcessor) -> dict[str, Tensor]:
    """Return a batch for the stock class, with a mask of padding or of packed samples."""
    batch = collate(rows, processor)
    keys = {"input_ids", "labels", "pixel_values"}
    if len(rows) == 1 and len(rows[0].ids) > 1:
        mask = dense_mask(batch["spans"], len(rows[0]))
        return {key: batch[key] for key in keys | {"position_ids"}} | {"attention_mask": mask}
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return {key: batch[key] for key in keys} | {"attention_mask": mask}


def _loss(model: nn.Module, way: Way, step: Sequence[dict[str, Tensor]], train: bool) -> float:
    """Return the mean loss over the step's supervised tokens; add its gradient when training."""
    counts = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in step]

    total = 0.0
    for batch, count in zip(step, counts, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=way.bf16):
            loss = (
                model(**batch).loss_sum
                if way.own_loss
                else model(**batch, use_cache=False).loss * count
            )

        loss = loss / sum(counts)
        if train:
            loss.backward()
        total += loss.item()
    return total
