"""Samples a second of a training stage with the reading of its data.

The Trainer of transformers on the stock LLaVA is the baseline of this repository's loop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Row, report
from transformers import Trainer, TrainingArguments
from ways import stock_model
from workloads import SINGLE, TUNING, quickstart_parts, stage_recipe, whole_recipe, write_samples

from mipha.data.batches import StepDataset
from mipha.data.encode import encode
from mipha.data.images import open_image
from mipha.data.mixture import Mixture
from mipha.engine.precision import autocast_dtype
from mipha.files import read_lines
from mipha.models.build import build
from mipha.models.tuning import apply_tuning
from mipha.recipe import ModelRecipe
from mipha.run import Run
from mipha.training.loop import run_steps
from mipha.training.placement import place
from mipha.training.stage import Stage
from mipha.world import join_world


class _Conversations(torch.utils.data.Dataset):
    """Samples as users write them: each read calls the processor."""

    def __init__(self, mixture: Mixture, processor: Any, order: Sequence[int], recipe: Any) -> None:
        self.mixture, self.processor, self.order, self.recipe = mixture, processor, order, recipe

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = encode(self.mixture[self.order[index]], self.processor, self.recipe.row_tokens)
        pixels = self.processor.image_processor(
            [open_image(image) for image in sample.images], return_tensors="pt"
        )["pixel_values"]
        return {
            "input_ids": torch.from_numpy(sample.input_ids),
            "labels": torch.from_numpy(sample.labels),
            "pixel_values": pixels,
        }


def pad(samples: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad samples to the longest of the batch, as LLaVA's collator does.

    Source: `DataCollatorForSupervisedDataset` of LLaVA, train.py.
    """
    ids = torch.nn.utils.rnn.pad_sequence(
        [sample["input_ids"] for sample in samples], batch_first=True, padding_value=pad_token_id
    )
    labels = torch.nn.utils.rnn.pad_sequence(
        [sample["labels"] for sample in samples], batch_first=True, padding_value=-100
    )

    # Mask the padding.
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()  # (samples, longest)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "pixel_values": torch.cat([s["pixel_values"] for s in samples]),
    }


class _InOrder(Trainer):
    """Trainer that reads samples in order, so that both train the same ones in the same step."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def measure(
    options: argparse.Namespace, parts: ModelRecipe | None = None
) -> dict[str, list[float]]:
    """Measure both side by side, and write the report.

    They run in float32, and also in bfloat16 where the processor computes in it.

    Args:
        options: Options of the command line.
        parts: Parts of the model; default: the quickstart's.

    Returns:
        The losses of each way, step by step.
    """
    workload = replace(SINGLE, batch_size=options.batch_size or SINGLE.batch_size)
    parts = parts or quickstart_parts(workload)
    world = join_world()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = stage_recipe(
            write_samples(folder, workload, workload.batch_size * (options.steps or 2)),
            workload,
            "finetune",
            "packed",
        )

        # Build the model, and keep the weights that every run starts from.
        mixture = Mixture(recipe.data)
        torch.manual_seed(0)
        model, processor = build(parts)
        apply_tuning(model, TUNING["finetune"])
        start = {
            name: weight.detach().clone()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

        # Fix the order of the samples.
        steps = StepDataset(mixture, processor, recipe, seed=0)
        order = [index for step in range(len(steps)) for index in steps.indices(step)]

        def restart() -> None:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if name in start:
                        weight.copy_(start[name])

        def run_trainer(bf16: bool) -> float:
            restart()
            model.set_attn_implementation("sdpa")
            arguments = TrainingArguments(
                output_dir=str(folder / "trainer"),
                per_device_train_batch_size=max(1, workload.batch_size // 2),
                gradient_accumulation_steps=2 if workload.batch_size > 1 else 1,
                num_train_epochs=1,
                learning_rate=recipe.learning_rate,
                lr_scheduler_type="cosine",
                adam_beta1=recipe.adam_betas[0],
                adam_beta2=recipe.adam_betas[1],
                adam_epsilon=recipe.adam_eps,
                bf16=bf16,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to=[],
                logging_steps=1,
                disable_tqdm=True,
                remove_unused_columns=False,
            )

            trainer = _InOrder(
                model=stock_model(model),
                args=arguments,
                train_dataset=_Conversations(mixture, processor, order, recipe),
                data_collator=lambda samples: pad(samples, processor.tokenizer.pad_token_id),
            )

            seconds = trainer.train().metrics["train_runtime"]
            found[f"Trainer, {_type(bf16)}"] = [
                line["loss"] for line in trainer.state.log_history if "loss" in line
            ]
            return seconds

        def own(bf16: bool) -> float:
            restart()
            model.set_attn_implementation("sdpa")
            shutil.rmtree(folder / "own", ignore_errors=True)
            precision = f"precision={'bfloat16' if bf16 else 'float32'}"
            whole = whole_recipe(parts, recipe).override(precision)

            stage = Stage(Run(folder / "own"), whole, "finetune", world)
            place(model, stage)
            run_steps(stage, model, steps)

            lines = list(read_lines(stage.run.metrics("finetune")))
            found[f"mipha, {_type(bf16)}"] = [line["loss"] for line in lines]
            return sum(line["seconds"] for line in lines)

        # Time both in each precision.
        types = (False, True) if autocast_dtype("auto", world.device) else (False,)
        rows = []
        for bf16 in types:
            ways: dict[str, Callable[[], float]] = {
                f"Trainer, {_type(bf16)}": lambda bf16=bf16: run_trainer(bf16),
                f"mipha, {_type(bf16)}": lambda bf16=bf16: own(bf16),
            }
            rows += _side_by_side("stage 2", len(order), ways, options.repeats)

    # Write the report.
    facts = {
        "repeats": options.repeats,
        "steps": len(steps),
        "threads": torch.get_num_threads(),
        "workload": json.dumps(asdict(workload)),
        "losses": json.dumps(
            {way: [round(loss, 5) for loss in losses] for way, losses in found.items()}
        ),
        "timed": "reading, batching and all steps; neither writes a state at its end: "
        "checkpointing.py measures that",
        "transformers": transformers.__version__,
    }
    report(
        "training-trainer",
        "Training against the Trainer of transformers, stage 2",
        rows,
        options.out,
        facts,
    )
    return found


def _side_by_side(
    case: str, work: int, ways: Mapping[str, Callable[[], float]], repeats: int
) -> list[Row]:
    """Time the ways as the harness does, by the seconds that each call returns."""
    for call in ways.values():
        call()

    rounds = [{way: work / call() for way, call in ways.items()} for _ in range(repeats)]

    first = next(iter(ways))
    rows = []
    for way in ways:
        rates = [rates[way] for rates in rounds]
        ratio = statistics.median(rates[way] / rates[first] for rates in rounds)
        rows.append(
            Row(case, way, statistics.median(rates), min(rates), max(rates), ratio, "samples")
        )
    return rows


def _type(bf16: bool) -> str:
    return "bfloat16" if bf16 else "float32"
