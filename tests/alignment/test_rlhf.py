"""RLHF and Safe RLHF of a tiny language model: what is learned, is equal, survives a kill."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from tests import forked

if TYPE_CHECKING:
    from mipha.alignment.recipe import RlhfRecipe


def reward(prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """The share of tokens from the upper part of the vocabulary."""
    return torch.tensor([sum(token >= 200 for token in ids) / 4 for ids in responses])


def cost(prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """Unsafe is what holds a token of the highest quarter, of which the reward asks half."""
    return torch.tensor([1.0 if any(token >= 300 for token in ids) else -1.0 for ids in responses])


@pytest.fixture
def rlhf_recipe(alignment_data: dict[str, Path], tiny_parts: Callable) -> Callable[..., RlhfRecipe]:
    """`rlhf_recipe("safe-rlhf", "seed=1", family=)`: a few short steps."""

    def recipe(step: str, *overrides: str, family: str = "llama", **extra: Any) -> RlhfRecipe:
        import mipha.alignment.recipe  # noqa: F401
        from mipha.alignment.recipe import StepRecipe

        tree = {
            "name": "tiny",
            "step": step,
            "precision": "float32",
            "language_model": str(tiny_parts(family).language_model),
            "chat_template": "chatml",
            "data": str(alignment_data["preferences"]),
            "reward_model": "reward/model",
            **({"cost_model": "cost/model"} if step == "safe-rlhf" else {}),
            "held_out": 0.0,
            "max_tokens": 128,
            "max_new_tokens": 4,
            "learning_rate": 5e-3,
            "critic_learning_rate": 5e-3,
            "critic_layers": 1,
            "max_steps": 4,
            "batch_size": 4,
            "micro_batch": 2,
            "checkpoint_every": 2,
            **extra,
        }
        return StepRecipe.parse(tree, source="tiny").override(*overrides)

    return recipe


def train(recipe: RlhfRecipe, out: Path, **functions: Any) -> list[dict[str, float]]:
    from mipha.alignment.rlhf import train_policy

    train_policy(
        recipe,
        out,
        **{"reward": reward, "cost": cost if recipe.step == "safe-rlhf" else None} | functions,
    )
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_policy_learns_what_a_rule_rewards_and_a_price_on_cost_holds_it_back(
    rlhf_recipe: Callable, tiny_parts: Callable, tmp_path: Path
) -> None:
    """Tokens of two kinds are rewarded, and one of the kinds costs.

    A kind is a side of the head, so that a small model can learn it.
    """
    head = load_file(tiny_parts("llama").language_model / "model.safetensors")["lm_head.weight"]
    kinds = (head[:, :2] > 0).float()

    def shares(responses: list[list[int]]) -> torch.Tensor:
        return torch.stack([kinds[ids].mean(0) for ids in responses])

    functions = {
        "reward": lambda p, r: shares(r).sum(1),
        "cost": lambda p, r: 2 * shares(r)[:, 1] - 1,
    }
    settings = (
        "max_steps=24",
        "batch_size=48",
        "micro_batch=48",
        "max_new_tokens=2",
        "tuning=last-2",
        "learning_rate=3e-3",
    )
    settings += ("kl_weight=0.001", "warmup_ratio=0", "checkpoint_every=100")
    rows = {
        step: train(rlhf_recipe(step, *settings, *more), tmp_path / step, **functions)
        for step, more in (("rlhf", ()), ("safe-rlhf", ("threshold=-0.8", "initial_multiplier=3")))
    }

    def gain(step: str, key: str) -> float:
        first, last = (
            sum(row[key] for row in part) / 4 for part in (rows[step][:4], rows[step][-4:])
        )
        return last - first

    assert gain("rlhf", "reward") > 0.2
    assert gain("rlhf", "cost") > 0.1
    assert gain("safe-rlhf", "cost") < -0.25
    assert all(row["multiplier"] == 0 for row in rows["rlhf"])
    assert (
        rows["safe-rlhf"][3]["multiplier"] > 3
    )  # the mean cost is above the threshold, so it grows
    assert rows["rlhf"][-1]["kl"] > 0.1


@pytest.mark.parametrize("tuning", ["full", "lora", "last-1"])
def test_a_price_of_zero_is_plain_ppo(tuning: str, rlhf_recipe: Callable, tmp_path: Path) -> None:
    settings = (f"tuning={tuning}", *(["lora.rank=4"] if tuning == "lora" else []))
    train(rlhf_recipe("rlhf", *settings), tmp_path / "plain")
    train(rlhf_recipe("safe-rlhf", *settings, "initial_multiplier=0"), tmp_path / "free")
    train(rlhf_recipe("safe-rlhf", *settings, "initial_multiplier=1"), tmp_path / "priced")
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "free"))
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "priced"))


@pytest.mark.parametrize("family", ["llama", "phi", "qwen2", "gpt_neox", "gemma"])
@pytest.mark.parametrize("tuning", ["full", "lora", "last-1", "last-2"])
def test_policy_and_reference_see_what_the_model_alone_sees(
    tuning: str, family: str, rlhf_recipe: Callable
) -> None:
    """The hidden states are equal at first; after training, the reference has not moved."""
    from mipha.alignment.learning import Learner
    from mipha.alignment.policy import Observation, Policy
    from mipha.alignment.rollout import mark_responses
    from mipha.alignment.step import load_base

    recipe = rlhf_recipe("rlhf", f"tuning={tuning}", family=family)
    alone, _ = load_base(recipe)
    alone.eval()
    model, _ = load_base(recipe)
    learner = Learner(Policy(model, recipe), recipe, with_cost=True, dtype=None)
    ids = torch.tensor([[0, 0, 21, 22, 23, 24], [30, 31, 32, 33, 34, 2]])
    rollout = mark_responses(ids, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), {2})
    seen = {
        "attention_mask": rollout.attention,
        "position_ids": rollout.positions,
        "use_cache": False,
    }
    expected = alone.base_model(ids, **seen, output_hidden_states=True)
    real = rollout.attention.bool()

    def check(hidden: torch.Tensor, states: torch.Tensor) -> None:
        torch.testing.assert_close(hidden[real], states[real], atol=1e-5, rtol=1e-5)

    def now(observation: Observation) -> torch.Tensor:
        return learner.policy.hidden(
            ids, rollout.attention, rollout.positions, observation.policy_inputs
        )

    observation = learner.policy.observe(rollout)
    check(observation.policy, expected.last_hidden_state)
    check(now(observation), expected.last_hidden_state)
    for _ in range(2):
        check(observation.reference, expected.last_hidden_state)
        check(
            observation.critic_inputs, expected.hidden_states[1]
        )  # what enters the second, last layer
        with torch.no_grad():
            for weight in learner.trained.values():
                weight.add_(0.1 * torch.rand_like(weight))
        observation = learner.policy.observe(rollout)
        assert not torch.allclose(
            observation.policy[real], expected.last_hidden_state[real], atol=1e-2
        )
        moved = now(observation)
        torch.testing.assert_close(moved[real], observation.policy[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuning", ["full", "lora", "last-1"])
def test_killed_at_any_step_it_ends_as_if_never_stopped(
    tuning: str, rlhf_recipe: Callable, tmp_path: Path, alignment_data: dict
) -> None:
    settings = [
        f"tuning={tuning}",
        f"instructions={alignment_data['instructions']}",
        "ptx_batch=2",
        "checkpoint_every=1",
        "minibatches=2",
    ]
    settings += ["lora.rank=4"] if tuning == "lora" else []
    recipe = rlhf_recipe("safe-rlhf", *settings)
    whole = train(recipe, tmp_path / "whole")
    calls = []

    def failing(prompts: list, responses: list) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("pulled the plug")
        return reward(prompts, responses)

    with pytest.raises(RuntimeError, match="plug"):
        train(recipe, tmp_path / "cut", reward=failing)
    newest = tmp_path / "cut" / "checkpoints" / "checkpoint-2"
    # The newest is damaged by one bit: the one before it is taken.
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(content)
    cut = train(recipe, tmp_path / "cut")
    timed = {"seconds", "tokens_per_second"}
    assert [{k: v for k, v in row.items() if k not in timed} for row in cut] == [
        {k: v for k, v in row.items() if k not in timed} for row in whole
    ]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "checkpoints").exists()
    assert (tmp_path / "cut" / "curves.png").stat().st_size > 10_000


PROGRAM = """
import os, signal, sys, torch
from pathlib import Path
import mipha.alignment.recipe
from mipha.engine import states
from mipha.alignment.recipe import load_alignment_recipe
from mipha.alignment.rlhf import train_policy
sys.path.insert(0, {here!r})
from test_rlhf import cost, reward
real = states.save_file
def save(content, path, **options):
    if "checkpoint-2" in str(path) and "optimizer" in str(path):
        Path(path).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    real(content, path, **options)
states.save_file = save
torch.set_num_threads(1)
recipe = load_alignment_recipe({recipe!r})
train_policy(recipe, Path({out!r}), reward, cost if recipe.step == "safe-rlhf" else None)
"""


@pytest.mark.parametrize("step", ["rlhf", "safe-rlhf"])
def test_kill_9_in_the_middle_of_a_save(step: str, rlhf_recipe: Callable, tmp_path: Path) -> None:
    recipe = rlhf_recipe(step, "checkpoint_every=1", "max_steps=3")
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    program = PROGRAM.format(
        here=str(Path(__file__).parent),
        recipe=str(tmp_path / "recipe.yaml"),
        out=str(tmp_path / "killed"),
    )
    (tmp_path / "killed.py").write_text(program)
    killed = forked.start([tmp_path / "killed.py"], tmp_path / "said.txt")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-1"
    ]
    train(recipe, tmp_path / "killed")
    train(recipe, tmp_path / "whole")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_what_is_not_finite_is_named_and_the_state_before_it_stays(
    rlhf_recipe: Callable, tmp_path: Path
) -> None:
    calls = []

    def broken(prompts: list, responses: list) -> torch.Tensor:
        calls.append(1)
        scores = reward(prompts, responses)
        scores[1] = float("nan") if len(calls) == 3 else scores[1]
        return scores

    recipe = rlhf_recipe("rlhf")
    with pytest.raises(
        FloatingPointError,
        match=r"step 3: the reward of the response .* to .*train.jsonl row \d+ is nan",
    ):
        train(recipe, tmp_path / "out", reward=broken)
    assert train(recipe, tmp_path / "out")[-1]["step"] == 4  # it goes on from step 2
    with pytest.raises(
        FloatingPointError, match=r"step 1: .*not finite; its prompts are .*train.jsonl row \d+"
    ):
        train(
            rlhf_recipe("rlhf", "score_clip=3e38"),
            tmp_path / "loss",
            reward=lambda p, r: torch.full((len(p),), 3e38),
        )


def test_the_result_is_a_language_model_and_held_out_prompts_are_only_measured(
    rlhf_recipe: Callable, tmp_path: Path
) -> None:
    from mipha.models.language_model import load_language_model
    from mipha.recipe import ModelRecipe

    asked: list[list[int]] = []

    def listening(prompts: list, responses: list) -> torch.Tensor:
        asked.extend(prompts)
        return reward(prompts, responses)

    def unsafe(prompt: str, response: str) -> bool:
        return "circle" in prompt

    from mipha.alignment.rlhf import train_policy

    recipe = rlhf_recipe("rlhf", "held_out=0.3", "validate_every=2", "tuning=lora", "lora.rank=2")
    model = train_policy(recipe, tmp_path / "out", listening, None, unsafe)
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(row["unsafe"] == 1.0 for row in rows)
    assert ["validation_reward" in row for row in rows] == [False, True, False, True]
    wanted = ModelRecipe(vision_tower="none", language_model=str(model), chat_template="chatml")
    loaded, _, _ = load_language_model(wanted, torch.float32)
    assert not any("lora" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("minibatches=3",), "do not divide batch_size=4"),
        (("tuning=last-0",), "last-N"),
        (("ptx_batch=2",), "no effect without instructions"),
        (("tuning=lora", "lora.dropout=0.1"), "lora.dropout has no effect"),
        (("initial_multiplier=9",), "above max_multiplier"),
        (("cost_window=0",), "cost_window"),
    ],
)
def test_settings_that_cannot_be_or_would_be_ignored(
    overrides: tuple[str, ...], match: str, rlhf_recipe: Callable
) -> None:
    with pytest.raises(ValueError, match=match):
        rlhf_recipe("safe-rlhf", *overrides)


def test_more_layers_than_there_are(rlhf_recipe: Callable, tmp_path: Path) -> None:
    for number, setting in enumerate(("critic_layers=3", "tuning=last-3")):
        with pytest.raises(ValueError, match=rf"{setting} asks for more than the 2 layers"):
            train(rlhf_recipe("rlhf", setting), tmp_path / str(number))
