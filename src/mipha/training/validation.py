"""Validation of a stage on held-out images: the loss, and some answers beside the expected ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from rich.text import Text
from torch import nn
from transformers import LlavaProcessor

from mipha.assistant import Assistant
from mipha.data.batches import StepDataset
from mipha.data.collate import to_device
from mipha.data.images import is_readable
from mipha.data.mixture import Mixture
from mipha.data.region_text import write_sample
from mipha.data.sample import IMAGE, Sample
from mipha.engine.precision import autocast
from mipha.files import append_line
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.terminal import Console
from mipha.training.stage import Stage

NUM_SAMPLES = 256
"""Samples that the loss is measured on, the same ones each time."""

NUM_ANSWERS = 3
MAX_NEW_TOKENS = 64


class Validation:
    """Measures a model in training, and leaves it as it was.

    All processes measure the loss together. Answers need a whole model, so only a single process
    gives them, into the stage's answers.jsonl: `{"step", "sample", "question", "answer",
    "expected"}`.

    Args:
        mixture: Held-out samples.
        processor: Processor of the model.
    """

    def __init__(self, stage: Stage, mixture: Mixture, processor: LlavaProcessor) -> None:
        self.stage, self.processor = stage, processor
        settings, world = stage.settings, stage.world
        once = settings.model_copy(update={"epochs": 1.0, "max_steps": None})
        self.steps = StepDataset(
            mixture, processor, once, stage.recipe.seed, world.rank, world.size
        )
        self.num_steps = min(len(self.steps), ceil(NUM_SAMPLES / settings.batch_size))
        self.substitutes = settings.unreadable_images == "substitute"
        can_answer = settings.prompt == "chat" and world.size == 1
        found = _find_questions(mixture, self.substitutes) if can_answer else []
        form = getattr(processor, "boxes", None)
        self.asked = [write_sample(sample, form) for sample in found]

    def measure(self, model: nn.Module, number: int) -> dict[str, float]:
        """Return the mean loss over supervised tokens, in nats, for a line of metrics.

        Args:
            model: Model as placed.
            number: Optimizer steps done.
        """
        world, dtype = self.stage.world, self.stage.autocast
        total = torch.zeros((), device=world.device)
        supervised = substituted = 0

        with _as_in_use(model):
            for index in range(self.num_steps):
                step = self.steps[index]
                supervised += step.num_supervised
                substituted += len(step.substituted)
                for batch in step.micro_batches:
                    batch = to_device(batch, world.device)
                    with autocast(world.device, dtype):
                        total += model(**batch).loss_sum

            # Frozen layers may be kept in the type that products run in, so answers need it too.
            answers = []
            if self.asked:
                with autocast(world.device, dtype):
                    answers = self._answer(model, number)

        loss = float(world.total(total) / supervised)
        if world.is_first:
            _print_answers(self.stage.name, number, loss, answers)
        measured = {"validation_loss": loss}
        if self.substitutes:
            count = world.total(torch.tensor(substituted, device=world.device))
            measured["validation_substituted_images"] = int(count)
        return measured

    def _answer(self, model: nn.Module, number: int) -> list[dict[str, Any]]:
        """Ask the model, and write down what it says; return the rows of answers.jsonl."""
        assert isinstance(model, LlavaForConditionalGeneration)
        pairs = [
            (sample.images, sample.messages[0].text if sample.images else _question(sample))
            for sample in self.asked
        ]

        answers = Assistant(model, self.processor).answer_many(pairs, max_new_tokens=MAX_NEW_TOKENS)
        rows = [
            {
                "step": number,
                "sample": sample.id,
                "question": _question(sample),
                "answer": answer.text,
                "expected": sample.messages[1].text,
            }
            for sample, answer in zip(self.asked, answers, strict=True)
        ]
        for row in rows:
            append_line(self.stage.folder / "answers.jsonl", row)
        return rows


def _find_questions(mixture: Mixture, only_readable: bool) -> list[Sample]:
    """Return the first samples that begin with a question that shows all images, answered.

    Each is about other images.
    """
    found: list[Sample] = []
    for sample in mixture:
        if sample.images and any(sample.images == other.images for other in found):
            continue
        roles = [message.role for message in sample.messages[:2]]
        readable = not only_readable or all(is_readable(image) for image in sample.images)
        shows_all = sample.messages[0].text.count(IMAGE) == len(sample.images)
        if roles == ["user", "assistant"] and shows_all and readable:
            found.append(sample)
        if len(found) == NUM_ANSWERS:
            break
    return found


def _print_answers(stage: str, number: int, loss: float, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show what the model says now, beside what it should say."""
    console = Console()
    console.print(f"{stage} step {number}: validation loss {loss:.3f}", highlight=False)
    for row in rows:
        answer, expected = row["answer"] or "(no answer)", row["expected"]
        line = Text(f"  {row['question']}  ", style="dim")
        if answer == expected:
            line.append(answer, style="green")
        else:
            line.append(answer, style="red").append(f"  (expected: {expected})", style="dim")
        console.print(line)


def _question(sample: Sample) -> str:
    return sample.messages[0].text.replace(IMAGE, "").strip()


@contextmanager
def _as_in_use(model: nn.Module) -> Iterator[None]:
    """Switch off gradients and dropout; afterwards every flag and the random state are as before.

    So a run that validates trains bit by bit as one that does not.
    """
    training = [module for module in model.modules() if module.training]
    random = torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        torch.set_rng_state(random)
