"""What a stage is worth on images that it never trains on: the loss, and a few answers beside what they should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaProcessor

from mipha.assistant import Assistant
from mipha.data.batches import StepDataset
from mipha.data.collate import to_device
from mipha.data.images import is_readable
from mipha.data.mixture import Mixture
from mipha.data.sample import IMAGE, Sample
from mipha.engine.precision import autocast
from mipha.files import append_line
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.recipe import StageRecipe
from mipha.world import World

NUM_SAMPLES = 256
"""Samples that the loss is measured on, the same ones each time."""

NUM_ANSWERS = 4
MAX_NEW_TOKENS = 64


class Validation:
    """Measures a model in training; leaves it as it was.

    Args:
        mixture: The held-out side.
        processor: Of the model.
        stage: How samples become rows.
        seed: Chooses the samples.
        world: All processes measure together; answers are given by a model that is whole, that is with one process.
        autocast: Type that matrix products run in; null for that of the weights.
        answers_file: Gets `{"step", "sample", "question", "answer", "expected"}` lines.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: LlavaProcessor,
        stage: StageRecipe,
        seed: int,
        world: World,
        autocast: torch.dtype | None,
        answers_file: Path,
    ) -> None:
        once = stage.model_copy(update={"epochs": 1.0, "max_steps": None})
        self.steps = StepDataset(mixture, processor, once, seed, world.rank, world.size)
        self.num_steps = min(len(self.steps), ceil(NUM_SAMPLES / stage.batch_size))
        self.processor, self.world, self.autocast, self.answers_file = (
            processor,
            world,
            autocast,
            answers_file,
        )
        self.substitutes = stage.unreadable_images == "substitute"
        self.asked = (
            _askable(mixture, self.substitutes)
            if stage.prompt == "chat" and world.size == 1
            else []
        )

    def measure(self, model: nn.Module, number: int) -> dict[str, float]:
        """The mean loss over supervised tokens, nats, for a line of metrics; answers go into their file.

        Args:
            model: As placed.
            number: Optimizer steps done.
        """
        total = torch.zeros((), device=self.world.device)
        supervised = substituted = 0
        with _as_when_it_answers(model):
            for place in range(self.num_steps):
                step = self.steps[place]
                supervised += step.num_supervised
                substituted += len(step.substituted)
                for batch in step.micro_batches:
                    batch = to_device(batch, self.world.device)
                    with autocast(self.world.device, self.autocast):
                        total += model(**batch).loss_sum
            if self.asked:
                # Frozen layers may be kept in the type that products run in.
                with autocast(self.world.device, self.autocast):
                    self._answer(model, number)
        measured = {"validation_loss": float(self.world.total(total) / supervised)}
        if self.substitutes:
            count = torch.tensor(substituted, device=self.world.device)
            measured["validation_substituted_images"] = int(self.world.total(count))
        return measured

    def _answer(self, model: nn.Module, number: int) -> None:
        assert isinstance(model, LlavaForConditionalGeneration)
        pairs = [
            (sample.images[0] if sample.images else None, _question(sample))
            for sample in self.asked
        ]
        answers = Assistant(model, self.processor).answer_many(pairs, max_new_tokens=MAX_NEW_TOKENS)
        for sample, answer in zip(self.asked, answers, strict=True):
            row = {
                "step": number,
                "sample": sample.id,
                "question": _question(sample),
                "answer": answer.text,
            }
            append_line(self.answers_file, row | {"expected": sample.messages[1].text})


def _askable(mixture: Mixture, only_readable: bool) -> list[Sample]:
    """The first samples that are a question about one image at most and its answer."""
    found: list[Sample] = []
    for sample in mixture:
        roles = [message.role for message in sample.messages[:2]]
        readable = not only_readable or all(is_readable(image) for image in sample.images)
        if roles == ["user", "assistant"] and len(sample.images) <= 1 and readable:
            found.append(sample)
        if len(found) == NUM_ANSWERS:
            break
    return found


def _question(sample: Sample) -> str:
    return sample.messages[0].text.replace(IMAGE, "").strip()


@contextmanager
def _as_when_it_answers(model: nn.Module) -> Iterator[None]:
    """No gradient, no dropout, and afterwards every flag as before: a run that validates trains bit by bit as one that does not."""
    training = [module for module in model.modules() if module.training]
    config = model.config.text_config
    attention = config._attn_implementation
    random = torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if config._attn_implementation != attention:
            model.set_attn_implementation({"text_config": attention})
        torch.set_rng_state(random)
