"""RLHF and Safe RLHF: PPO and PPO-Lagrangian of a language model, resumable at every saved step.

out/recipe.yaml, provenance.json, metrics.jsonl, curves.png
    checkpoints/   states to resume from; gone when the step is finished
    model/         the policy, as a standard language model folder; there, and whole, when the step is finished

A step is a pure function of the recipe, its number and the weights before it, so a resumed run goes on as if it had never stopped.

Source: Safe RLHF, arXiv:2310.12773; with no price on costs it is PPO with a reward model, arXiv:2203.02155.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mipha.alignment.curves import plot_rlhf
from mipha.alignment.datasets import load_instructions, load_preferences, split_by_prompt
from mipha.alignment.encoding import check_lengths, encode_exchange, encode_prompt
from mipha.alignment.folder import forget_after, is_finished, open_folder
from mipha.alignment.host import computes_in_bfloat16, load_part, load_rows, record_base
from mipha.alignment.lagrangian import Multiplier
from mipha.alignment.learning import Learner, ScoreFunction
from mipha.alignment.policy import Policy
from mipha.alignment.recipe import RlhfRecipe, SafeRlhfRecipe
from mipha.alignment.rollout import Rollout, sample
from mipha.alignment.scoring import Scorer
from mipha.alignment.sft import end_turns
from mipha.alignment.state import load_state, save_state
from mipha.files import append_line
from mipha.models.language_model import end_of_turn

UnsafeRule = Callable[[str, str], bool]
"""Prompt and response -> whether the response is unsafe, by something else than the cost model."""


def rlhf(recipe: RlhfRecipe, out: Path, unsafe: UnsafeRule | None = None) -> Path:
    """Train a policy on a reward model; run again, it goes on where it stopped.

    Args:
        out: New, or the folder of this same recipe.
        unsafe: An independent judge, whose share of unsafe responses goes into the metrics.

    Returns:
        The policy's folder, which a recipe's `model.language_model` takes.

    Raises:
        ValueError, FileNotFoundError: Something the user can mend, said before the first step.
        FloatingPointError: A score, loss or gradient is not finite; the states before it are intact.
    """
    return _with_scorers(recipe, out, unsafe)


def safe_rlhf(recipe: SafeRlhfRecipe, out: Path, unsafe: UnsafeRule | None = None) -> Path:
    """Train a policy on a reward model while its mean cost stays below the threshold; as `rlhf` otherwise."""
    return _with_scorers(recipe, out, unsafe)


def _with_scorers(recipe: RlhfRecipe, out: Path, unsafe: UnsafeRule | None) -> Path:
    if is_finished(out):
        open_folder(out, recipe)
        return out / "model"
    dtype = torch.bfloat16 if computes_in_bfloat16(recipe.precision) else torch.float32
    reward, cost = (
        path and Scorer.load(path, _device(), dtype)
        for path in (recipe.reward_model, recipe.cost_model)
    )
    return train_policy(recipe, out, reward.score, cost.score if cost else None, unsafe)


def train_policy(
    recipe: RlhfRecipe,
    out: Path,
    reward: ScoreFunction,
    cost: ScoreFunction | None,
    unsafe: UnsafeRule | None = None,
) -> Path:
    """RLHF with any functions that score token ids; arguments and what is raised otherwise as of `rlhf`.

    Args:
        reward: Higher is better.
        cost: Above zero is unsafe; null with `rlhf`: not reported.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "align runs in one process, but WORLD_SIZE says there are several: start it without torchrun"
        )
    open_folder(out, recipe)
    if is_finished(out):
        return out / "model"
    rows, held_out = load_rows(recipe, out, load_preferences)
    model, tokenizer = load_part(recipe)
    record_base(recipe, out, model)
    end_turns(model, tokenizer)
    prompts, held_out_prompts = (_prompts(tokenizer, part, recipe) for part in (rows, held_out))
    instructions = _instructions(tokenizer, recipe)
    device = _device()
    multiplier = _multiplier(recipe)
    autocast = torch.bfloat16 if computes_in_bfloat16(recipe.precision) else None
    learner = Learner(Policy(model.to(device), recipe), recipe, multiplier.value > 0, autocast)
    position = load_state(out / "checkpoints", learner.trained, learner.optimizer) or {
        "step": 0,
        **multiplier.state(),
    }
    multiplier.load_state(position)
    num_steps = recipe.max_steps or math.ceil(recipe.epochs * len(prompts) / recipe.batch_size)
    forget_after(out / "metrics.jsonl", position["step"])
    judge = _Judge(tokenizer, reward, cost, unsafe)

    def continued(chosen: Sequence[tuple[str, str, list[int]]]) -> Rollout:
        ends = {tokenizer.eos_token_id, end_of_turn(tokenizer, tokenizer.chat_template)}
        ids = [prompt_ids for _, _, prompt_ids in chosen]
        return sample(
            model, ids, recipe.max_new_tokens, ends, tokenizer.pad_token_id, recipe.temperature
        )

    with _bar(recipe, position["step"], num_steps) as show:
        for step in range(position["step"] + 1, num_steps + 1):
            began = time.monotonic()
            torch.manual_seed(recipe.seed * 1_000_003 + step)
            chosen = [
                prompts[index]
                for index in drawn(len(prompts), recipe.batch_size, step - 1, recipe.seed)
            ]
            rollout = continued(chosen)
            scores, measured = judge(chosen, rollout, step)
            experience = learner.experience(rollout, scores)
            weight = (
                multiplier.update(step, scores["cost"].tolist())
                if "cost" in learner.critics
                else 0.0
            )
            learner.assign(experience, weight)
            share = _schedule(step - 1, num_steps, recipe.warmup_ratio)
            updates = recipe.minibatches * recipe.ppo_epochs
            texts = [
                _batch(instructions, recipe, (step - 1) * updates + number)
                for number in range(updates)
            ]
            try:
                losses = learner.learn(experience, texts, share)
            except FloatingPointError as error:
                named = ", ".join(row for row, _, _ in chosen)
                raise FloatingPointError(
                    f"step {step}: {error}; its prompts are {named}. Nothing was moved by it, and the "
                    f"states in {out / 'checkpoints'} are intact: lower the learning_rate, or try precision=float32"
                ) from error
            seconds = time.monotonic() - began
            metrics = (
                {"step": step, **measured, "multiplier": weight} | _spread(experience) | losses
            )
            metrics |= {"learning_rate": recipe.learning_rate * share, "seconds": seconds}
            metrics["tokens_per_second"] = int(rollout.attention.sum()) / seconds
            if held_out and (step == num_steps or step % (recipe.validate_every or num_steps) == 0):
                metrics |= {
                    f"validation_{name}": value
                    for name, value in _validate(held_out_prompts, continued, judge, recipe).items()
                }
            append_line(out / "metrics.jsonl", metrics)
            show(metrics)
            if step % recipe.checkpoint_every == 0 or step == num_steps:
                save_state(
                    out / "checkpoints",
                    step,
                    learner.trained,
                    learner.optimizer,
                    multiplier.state(),
                )
    plot_rlhf(
        out / "metrics.jsonl",
        out / "curves.png",
        f"{recipe.step}: {recipe.name}",
        getattr(recipe, "threshold", None),
    )
    learner.policy.export(tokenizer, out / "model")
    shutil.rmtree(out / "checkpoints")
    return out / "model"


def drawn(count: int, size: int, number: int, seed: int) -> list[int]:
    """Indices of the `number`-th batch: every epoch shows each row once, in an order of its own; any batch is told without the others."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range(number * size, (number + 1) * size):
        epoch, index = divmod(place, count)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        chosen.append(orders[epoch][index])
    return chosen


class _Judge:
    """Scores of a rollout, and their means."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reward: ScoreFunction,
        cost: ScoreFunction | None,
        unsafe: UnsafeRule | None,
    ) -> None:
        self._tokenizer, self._unsafe = tokenizer, unsafe
        self._functions = {"reward": reward} | ({"cost": cost} if cost else {})

    def __call__(
        self, chosen: Sequence[tuple[str, str, list[int]]], rollout: Rollout, step: int
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        responses = rollout.response_ids()
        scores, measured = {}, {}
        for name, function in self._functions.items():
            values = (
                function([ids for _, _, ids in chosen], responses).to(rollout.ids.device).float()
            )
            assert values.shape == (len(chosen),), (
                f"{name}: one score a sample, got {tuple(values.shape)}"
            )
            bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
            if bad:
                text = self._tokenizer.decode(responses[bad[0]])
                raise FloatingPointError(
                    f"step {step}: the {name} of the response {text[:100]!r} to {chosen[bad[0]][0]} is {values[bad[0]].item()}; the states "
                    f"before it are intact: look at the {name} model"
                )
            scores[name], measured[name] = values, values.mean().item()
        if self._unsafe is not None:
            texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
            flags = [
                self._unsafe(prompt, text)
                for (_, prompt, _), text in zip(chosen, texts, strict=True)
            ]
            measured["unsafe"] = sum(flags) / len(flags)
        measured["response_tokens"] = rollout.mask.sum(1).float().mean().item()
        measured["ended"] = rollout.ended.float().mean().item()
        return scores, measured


def _validate(
    prompts: list[tuple[str, str, list[int]]],
    continued: Callable[..., Rollout],
    judge: _Judge,
    recipe: RlhfRecipe,
) -> dict[str, float]:
    """Means over one sampled response to each held-out prompt, the same random numbers every time."""
    sums: dict[str, float] = {}
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        for start in range(0, len(prompts), recipe.batch_size):
            chosen = prompts[start : start + recipe.batch_size]
            for name, value in judge(chosen, continued(chosen), step=0)[1].items():
                sums[name] = sums.get(name, 0.0) + value * len(chosen) / len(prompts)
    return sums


def _prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], recipe: RlhfRecipe
) -> list[tuple[str, str, list[int]]]:
    """Row, text and ids of each different prompt."""
    first = {row.prompt: row.id for row in reversed(rows)}
    prompts = [
        (row, prompt, encode_prompt(tokenizer, prompt)) for prompt, row in reversed(first.items())
    ]
    check_lengths(
        ((row, ids, range(recipe.max_new_tokens)) for row, _, ids in prompts), recipe.max_tokens
    )
    return prompts


def _instructions(
    tokenizer: PreTrainedTokenizerBase, recipe: RlhfRecipe
) -> list[tuple[list[int], list[int]]]:
    if recipe.instructions is None:
        return []
    rows = load_instructions(recipe.instructions, [] if recipe.skip_empty else None)
    rows, _ = split_by_prompt(rows, recipe.held_out, recipe.seed)
    encoded = [
        (row.id, *encode_exchange(tokenizer, row.prompt, row.response, row.id)) for row in rows
    ]
    check_lengths(encoded, recipe.max_tokens)
    return [(prompt, response) for _, prompt, response in encoded]


def _batch(
    instructions: list[tuple[list[int], list[int]]], recipe: RlhfRecipe, number: int
) -> list[tuple[list[int], list[int]]]:
    if not instructions:
        return []
    size = recipe.ptx_batch or recipe.batch_size // recipe.minibatches
    return [
        instructions[index] for index in drawn(len(instructions), size, number, recipe.seed + 1)
    ]


def _multiplier(recipe: RlhfRecipe) -> Multiplier:
    if not isinstance(recipe, SafeRlhfRecipe):
        return Multiplier()
    return Multiplier(
        recipe.initial_multiplier,
        recipe.multiplier_learning_rate,
        recipe.max_multiplier,
        recipe.threshold,
        recipe.cost_window,
        recipe.multiplier_delay,
    )


def _spread(experience: Any) -> dict[str, float]:
    mask = experience.rollout.mask
    return {
        "kl": (experience.log_ratio.sum() / len(mask)).item(),
        "entropy": ((experience.entropy * mask).sum() / mask.sum()).item(),
    }


def _schedule(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate: linear warmup, then a cosine to zero."""
    warmup = math.ceil(num_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _bar(
    recipe: RlhfRecipe, start: int, total: int
) -> Iterator[Callable[[dict[str, float]], None]]:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed}/{task.total}  {task.fields[said]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, speed_estimate_period=600) as progress:
        task = progress.add_task(recipe.step, total=total, completed=start, said="")

        def show(metrics: dict[str, float]) -> None:
            names = {
                "reward": "reward",
                "cost": "cost",
                "multiplier": "lambda",
                "unsafe": "unsafe",
                "kl": "kl",
            }
            said = "  ".join(
                f"{label} {metrics[name]:.2f}" for name, label in names.items() if name in metrics
            )
            progress.update(
                task,
                completed=metrics["step"],
                said=f"{said}  {metrics['tokens_per_second']:,.0f} tokens/s",
            )

        yield show
