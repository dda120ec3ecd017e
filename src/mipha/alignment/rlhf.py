"""RLHF and Safe RLHF: PPO and PPO-Lagrangian of a language model, resumable at every saved state.

One step, in `train_policy`:

    prompts --Sampler--> responses --Judge--> scores --Learner.observe--> experience
    mean cost --Multiplier.update--> lambda
    experience, lambda --Learner.assign--> advantages --Learner.learn--> updated policy and critics

A step depends only on the recipe, its number and the weights before it, so a resumed run continues
as if it had never stopped.

Source: Safe RLHF, arXiv:2310.12773; with no price on costs it is PPO with a reward model,
arXiv:2203.02155.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mipha.alignment.figures import plot_rlhf
from mipha.alignment.learning import Learner
from mipha.alignment.policy import Policy
from mipha.alignment.ppo import Multiplier
from mipha.alignment.preference import Scorer
from mipha.alignment.recipe import RlhfRecipe, SafeRlhfRecipe
from mipha.alignment.rollout import Judge, Prompt, Sampler, ScoreFunction, UnsafeRule
from mipha.alignment.step import (
    Step,
    begin_step,
    in_held_folder,
    load_base,
    load_rows,
    record_base,
    stop_at_end_of_turn,
    training_device,
    write_result,
)
from mipha.data.alignment import (
    Exchange,
    Preference,
    check_lengths,
    encode_exchange,
    encode_prompt,
    load_instructions,
    load_preferences,
    split_by_prompt,
)
from mipha.engine.optimizer import warmup_cosine
from mipha.engine.precision import autocast_dtype
from mipha.engine.progress import Shown, show_progress
from mipha.engine.states import load_tensors, save_tensors
from mipha.files import append_line, keep_lines
from mipha.models.language_model import end_tokens


def rlhf(recipe: RlhfRecipe, out: Path, unsafe: UnsafeRule | None = None) -> Path:
    """Train a policy on a reward model; run again, it continues where it stopped.

    Args:
        recipe: Recipe of the step.
        out: Folder, new or of this same recipe.
        unsafe: Independent rule whose share of unsafe responses goes into the metrics.

    Returns:
        The policy's folder, which a recipe's `model.language_model` takes.

    Raises:
        ValueError, FileNotFoundError: Something that the user can fix, before the first step.
        FloatingPointError: A score, loss or gradient is not finite; the states before it are
            intact.
    """
    return _train_with_scorers(recipe, out, unsafe)


def safe_rlhf(recipe: SafeRlhfRecipe, out: Path, unsafe: UnsafeRule | None = None) -> Path:
    """Train a policy on a reward model while its mean cost stays below a threshold.

    Arguments, result and errors are those of `rlhf`.
    """
    return _train_with_scorers(recipe, out, unsafe)


def _train_with_scorers(recipe: RlhfRecipe, out: Path, unsafe: UnsafeRule | None) -> Path:
    if Step(recipe, out).is_finished:
        return begin_step(recipe, out).model

    device = training_device()
    dtype = autocast_dtype(recipe.precision, device) or torch.float32
    reward = Scorer.load(recipe.reward_model, device, dtype)
    cost = Scorer.load(recipe.cost_model, device, dtype) if recipe.cost_model else None
    return train_policy(recipe, out, reward.score, cost.score if cost else None, unsafe)


@in_held_folder
def train_policy(
    recipe: RlhfRecipe,
    out: Path,
    reward: ScoreFunction,
    cost: ScoreFunction | None,
    unsafe: UnsafeRule | None = None,
) -> Path:
    """Train a policy on any functions that score token ids; else as `rlhf`.

    Args:
        recipe: Recipe of the step; its reward and cost models are not read.
        out: Folder, new or of this same recipe.
        reward: Reward of responses; higher is better.
        cost: Cost of responses; above zero is unsafe. None, with `rlhf`: not reported.
        unsafe: Independent rule whose share of unsafe responses goes into the metrics.
    """
    step = begin_step(recipe, out)
    if step.is_finished:
        return step.model

    # Load the data and the starting model.
    rows, held_out = load_rows(step, load_preferences)
    model, tokenizer = load_base(recipe)
    record_base(step, model)
    stop_at_end_of_turn(model, tokenizer)
    prompts, held_out_prompts = (
        _encode_prompts(tokenizer, part, recipe) for part in (rows, held_out)
    )
    instructions = _encode_instructions(tokenizer, recipe)

    # Set up what writes responses, what scores them and what learns from them.
    device = training_device()
    model, dtype = model.to(device), autocast_dtype(recipe.precision, device)
    multiplier = _new_multiplier(recipe)
    setup = _Setup(
        step=step,
        prompts=prompts,
        held_out=held_out_prompts,
        instructions=instructions,
        num_steps=recipe.max_steps or math.ceil(recipe.epochs * len(prompts) / recipe.batch_size),
        sampler=_new_sampler(model, tokenizer, recipe),
        judge=Judge(tokenizer, {"reward": reward} | ({"cost": cost} if cost else {}), unsafe),
        multiplier=multiplier,
        learner=Learner(Policy(model, recipe), recipe, multiplier.value > 0, dtype),
    )

    # Train, from the newest state where there is one.
    done = _resume(setup)
    with show_progress(recipe.step, setup.num_steps, _describe) as show:
        for number in range(done + 1, setup.num_steps + 1):
            is_last = number == setup.num_steps
            metrics = _take_step(setup, number)
            if held_out and (is_last or number % (recipe.validate_every or setup.num_steps) == 0):
                metrics |= _validate(setup)
            append_line(step.metrics, metrics)
            show(metrics)
            if is_last or number % recipe.checkpoint_every == 0:
                _save(setup, number)

    # Draw and export.
    title = f"{recipe.step}: {recipe.name}"
    threshold = recipe.threshold if isinstance(recipe, SafeRlhfRecipe) else None
    plot_rlhf({title: step.metrics}, out / "curves.png", threshold)
    return write_result(step, setup.learner.policy.merge_adapters(), tokenizer)


@dataclass(frozen=True)
class _Setup:
    """The objects that every step of training works with.

    Args:
        step: Recipe and folder.
        prompts: Prompts to train on.
        held_out: Held-out prompts.
        instructions: Instructions whose language-model loss is added; may be empty.
        num_steps: Number of steps of the whole setup.
        sampler: Writer of responses.
        judge: Functions that score them.
        multiplier: Price of cost.
        learner: Policy, critics and optimizer.
    """

    step: Step
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    instructions: Sequence[Exchange]
    num_steps: int
    sampler: Sampler
    judge: Judge
    multiplier: Multiplier
    learner: Learner

    @property
    def recipe(self) -> RlhfRecipe:
        assert isinstance(self.step.recipe, RlhfRecipe)
        return self.step.recipe


def _take_step(setup: _Setup, number: int) -> dict[str, float]:
    """Take one step of RLHF.

    Args:
        number: Number of the step, from 1.

    Returns:
        The step's metrics.

    Raises:
        FloatingPointError: A score, loss or gradient is not finite; names the step and its prompts.
    """
    recipe, learner, began = setup.recipe, setup.learner, time.monotonic()

    # Sample a response to each prompt, and score it.
    torch.manual_seed(recipe.seed * 1_000_003 + number)
    order = batch_indices(len(setup.prompts), recipe.batch_size, number - 1, recipe.seed)
    prompts = [setup.prompts[index] for index in order]
    rollout = setup.sampler.sample([prompt.ids for prompt in prompts])
    scores, means = setup.judge.score(prompts, rollout, number)

    # Look at the responses with all models, move lambda, and make advantages of the scores.
    experience = learner.observe(rollout, scores)
    multiplier = 0.0
    if "cost" in learner.critics:
        multiplier = setup.multiplier.update(number, scores["cost"].tolist())
    experience = learner.assign(experience, multiplier)

    # Learn.
    share = warmup_cosine(number - 1, setup.num_steps, recipe.warmup_ratio)
    updates = recipe.minibatches * recipe.ppo_epochs
    instructions = [
        _instructions_of_update(setup, (number - 1) * updates + update) for update in range(updates)
    ]
    try:
        losses = learner.learn(experience, instructions, share)
    except FloatingPointError as error:
        named = ", ".join(prompt.id for prompt in prompts)
        raise FloatingPointError(
            f"step {number}: {error}; its prompts are {named}. No weight was changed by it, and "
            f"the states in {setup.step.states} are intact: "
            "lower the learning_rate, or try precision=float32"
        ) from error

    seconds = time.monotonic() - began
    return {
        "step": number,
        **means,
        "multiplier": multiplier,
        **experience.means(),
        **losses,
        "learning_rate": recipe.learning_rate * share,
        "seconds": seconds,
        "tokens_per_second": int(rollout.attention.sum()) / seconds,
    }


def _validate(setup: _Setup) -> dict[str, float]:
    """Return means over one sampled response to each held-out prompt.

    The random numbers are the same every time, and training's own stay as they were.
    """
    sums: dict[str, float] = {}
    size = setup.recipe.batch_size
    with torch.random.fork_rng():
        torch.manual_seed(setup.recipe.seed)
        for start in range(0, len(setup.held_out), size):
            prompts = setup.held_out[start : start + size]
            rollout = setup.sampler.sample([prompt.ids for prompt in prompts])
            _, means = setup.judge.score(prompts, rollout, step=0)
            for name, value in means.items():
                weighted = value * len(prompts) / len(setup.held_out)
                sums[f"validation_{name}"] = sums.get(f"validation_{name}", 0.0) + weighted
    return sums


def _resume(setup: _Setup) -> int:
    """Load the newest training state; return the number of steps done."""
    position = load_tensors(setup.step.states, setup.learner.trained, setup.learner.optimizer)
    done = 0 if position is None else position["step"]
    if position is not None:
        setup.multiplier.load_state(position)
    keep_lines(setup.step.metrics, done)
    return done


def _save(setup: _Setup, number: int) -> None:
    state, learner = setup.step.states / f"checkpoint-{number}", setup.learner
    save_tensors(state, learner.trained, learner.optimizer, setup.multiplier.state())


# Data --------------------------------------------------------------------------------------------


def batch_indices(count: int, size: int, number: int, seed: int) -> list[int]:
    """Return the rows of a batch, computed without the batches before it.

    Every epoch takes each row once, in an order of its own.

    Args:
        count: Number of rows.
        size: Number of rows in a batch.
        number: Number of the batch, from 0.
        seed: Seed of the orders.
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range(number * size, (number + 1) * size):
        epoch, index = divmod(place, count)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        chosen.append(orders[epoch][index])
    return chosen


def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Preference], recipe: RlhfRecipe
) -> list[Prompt]:
    """Encode each different prompt: named after the first row with it, in order of the last."""
    first = {row.prompt: row.id for row in reversed(rows)}
    prompts = [
        Prompt(row, text, encode_prompt(tokenizer, text)) for text, row in reversed(first.items())
    ]
    longest_response = range(recipe.max_new_tokens)
    check_lengths(
        ((prompt.id, prompt.ids, longest_response) for prompt in prompts), recipe.max_tokens
    )
    return prompts


def _encode_instructions(tokenizer: PreTrainedTokenizerBase, recipe: RlhfRecipe) -> list[Exchange]:
    if recipe.instructions is None:
        return []
    rows = load_instructions(recipe.instructions, [] if recipe.skip_empty else None)
    rows, _ = split_by_prompt(rows, recipe.held_out, recipe.seed)
    encoded = [
        (row.id, *encode_exchange(tokenizer, row.prompt, row.response, row.id)) for row in rows
    ]
    check_lengths(encoded, recipe.max_tokens)
    return [(prompt, response) for _, prompt, response in encoded]


def _instructions_of_update(setup: _Setup, number: int) -> list[Exchange]:
    """Return the instructions of an optimizer step, counted from 0 over the whole setup."""
    recipe, instructions = setup.recipe, setup.instructions
    if not instructions:
        return []
    size = recipe.ptx_batch or recipe.batch_size // recipe.minibatches
    order = batch_indices(len(instructions), size, number, recipe.seed + 1)
    return [instructions[index] for index in order]


# Parts -------------------------------------------------------------------------------------------


def _new_sampler(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: RlhfRecipe
) -> Sampler:
    ends = set(end_tokens(tokenizer, tokenizer.chat_template))
    return Sampler(model, recipe.max_new_tokens, ends, tokenizer.pad_token_id, recipe.temperature)


def _new_multiplier(recipe: RlhfRecipe) -> Multiplier:
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


def _describe(steps: Sequence[Mapping[str, float]]) -> Shown:
    """Return what the progress shows of the last steps."""
    last = steps[-1]
    labels = {
        "reward": "reward",
        "cost": "cost",
        "multiplier": "lambda",
        "unsafe": "unsafe",
        "kl": "kl",
    }
    means = [f"{label} {last[name]:.2f}" for name, label in labels.items() if name in last]
    return Shown("  ".join(means), f"{last['tokens_per_second']:,.0f} tokens/s")
