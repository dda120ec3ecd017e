"""Reward and cost models: losses by hand, order of pairs, scores at the end of the turn."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerState

from mipha.alignment import preference
from mipha.alignment.preference import (
    PAD,
    Scorer,
    _trainer_class,
    check_finite,
    collate_pairs,
    measure_pairs,
    new_scorer,
    pair_loss,
    ranked_pairs,
    train_cost,
    train_reward,
)
from mipha.alignment.recipe import StepRecipe
from mipha.data.alignment import (
    Preference,
    encode_exchange,
    load_preferences,
    split_by_prompt,
)
from mipha.files import read_lines
from mipha.models.language_model import load_language_model

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
RESPONSES = [[20, 21, 2], [22, 23, 24, 25, 26, 2], [27, 2]]
HIGHER, LOWER = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])


@pytest.fixture(scope="module")
def tokenizer(finished: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(finished("reward") / "model")


def test_reward_loss_by_hand() -> None:
    # differences 1 and -2: ln(1 + 1/e) = 0.313262 and ln(1 + e^2) = 2.126928
    # mean square of 1, 0, 0, 2: 1.25
    assert pair_loss(HIGHER, LOWER, 0.0).item() == pytest.approx(1.220095, abs=1e-5)
    assert pair_loss(HIGHER, LOWER, 0.1).item() == pytest.approx(1.220095 + 0.125, abs=1e-5)


def test_cost_loss_by_hand() -> None:
    # The more harmful: unsafe, unsafe; the others: safe, unsafe. Each adds
    # ln(1 + exp(-sign * score)):
    # ln(1 + 1/e) = 0.313262 and ln 2 = 0.693147, sum 1.006409
    # ln 2 = 0.693147 and ln(1 + exp(-2)) = 0.126928, sum 0.820075
    loss = pair_loss(HIGHER, LOWER, 0.0, torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 1.0]))
    assert loss.item() == pytest.approx(1.220095 + 0.913242, abs=1e-5)


@pytest.mark.parametrize(("unsafe", "wanted"), [(True, 1.0), (False, -1.0)])
def test_the_cost_loss_pushes_unsafe_above_zero_and_safe_below(unsafe: bool, wanted: float) -> None:
    score = torch.zeros(1, requires_grad=True)
    sign = torch.tensor([1.0 if unsafe else -1.0])
    pair_loss(score, score, 0.0, sign, sign).backward()
    assert -torch.sign(score.grad).item() == wanted


def test_what_is_measured() -> None:
    measured = measure_pairs(
        torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    )
    assert measured == {
        "accuracy": 0.5,
        "margin": 0.5,
        "sign_accuracy": 0.5,
    }  # 3 over 2, but 1 only level with 1


@pytest.mark.parametrize("is_cost", [True, False])
def test_a_cost_model_is_trained_on_the_signs_and_a_reward_model_is_not(is_cost: bool) -> None:
    higher, lower = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 2.0, 1.0])
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, -1.0])  # three pairs: the higher, the lower
    trainer = _trainer_class().__new__(_trainer_class())
    trainer.regularization, trainer.state = 0.1, TrainerState()
    trainer.signed, trainer._metrics = is_cost, {"train": defaultdict(list)}

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.cat([higher, lower])[:, None])

    inputs = {"input_ids": None, "attention_mask": None, "signs": signs}
    loss = trainer.compute_loss(model, inputs)
    wanted = pair_loss(higher, lower, 0.1, *((signs[:3], signs[3:]) if is_cost else ()))
    assert torch.equal(loss, wanted)

    # What the curves show.
    reported = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert reported == measure_pairs(torch.cat([higher, lower]), signs if is_cost else None)


def test_no_response_is_cut(
    step_recipe: Callable[..., StepRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL cuts at 1,024 tokens unless it is told not to."""
    row = {"prompt": "May I?", "response_0": "no " * 1200, "response_1": "yes " * 1200}
    row |= {"better_response_id": 0, "safer_response_id": 0}
    row |= {"is_response_0_safe": True, "is_response_1_safe": False}
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row | {"prompt": f"{n}?"}) + "\n" for n in range(4)))
    lengths = []

    def collate(pairs: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
        lengths.extend(len(pair["chosen_ids"]) for pair in pairs)
        return collate_pairs(pairs, pad_id)

    monkeypatch.setattr(preference, "collate_pairs", collate)
    changes = (f"data={data}", "max_tokens=3000", "max_steps=1", "held_out=0", "batch_size=2")
    train_reward(step_recipe("reward", *changes, "micro_batch=2"), tmp_path / "run")
    assert min(lengths) > 1024


@pytest.mark.parametrize("step", ["reward", "cost"])
def test_the_order_of_the_responses_does_not_count(
    step: str, tokenizer: Any, alignment_data: dict[str, Path]
) -> None:
    rows = load_preferences(alignment_data["preferences"])
    swapped = [
        replace(
            row,
            responses=row.responses[::-1],
            better=1 - row.better,
            safer=1 - row.safer,
            safe=row.safe[::-1],
        )
        for row in rows
    ]
    assert ranked_pairs(tokenizer, rows, step, 128) == ranked_pairs(tokenizer, swapped, step, 128)


def test_a_reward_ranks_by_better_and_a_cost_by_harm(tokenizer: Any) -> None:
    row = Preference("row 1", "May I?", ("yes", "no"), better=1, safer=1, safe=(False, True))
    reward, cost = (ranked_pairs(tokenizer, [row], step, 128)[0] for step in ("reward", "cost"))
    ids = [
        [*prompt, *ended]
        for prompt, ended in (
            encode_exchange(tokenizer, row.prompt, text, "row 1") for text in row.responses
        )
    ]
    assert (reward["chosen_ids"], reward["rejected_ids"]) == (ids[1], ids[0])
    assert (cost["chosen_ids"], cost["rejected_ids"], cost["signs"]) == (
        ids[0],
        ids[1],
        [1.0, -1.0],
    )
    assert tokenizer.decode(cost["chosen_ids"]).endswith("yes<|im_end|>")


def test_a_batch_is_all_higher_then_all_lower() -> None:
    pairs = [
        {"chosen_ids": [1, 2], "rejected_ids": [3], "signs": [1.0, -1.0]},
        {"chosen_ids": [4], "rejected_ids": [5, 6, 7], "signs": [1.0, 1.0]},
    ]
    batch = collate_pairs(pairs, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [4, 9, 9], [3, 9, 9], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]
    assert batch["signs"].tolist() == [1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("step", "overrides"),
    [("reward", ()), ("reward", ("tuning=lora", "lora.rank=4")), ("cost", ())],
)
def test_what_is_reported_of_held_out_pairs_is_what_the_scorer_says(
    step: str,
    overrides: tuple[str, ...],
    finished: Callable[..., Path],
    tokenizer: Any,
    alignment_data: dict[str, Path],
) -> None:
    out = finished(step, *overrides)
    held_out = split_by_prompt(load_preferences(alignment_data["preferences"]), 0.2, seed=0)[1]
    scorer = Scorer.load(out / "model")
    scores = torch.stack(
        [
            scorer.score(
                *map(
                    list,
                    zip(
                        *(
                            encode_exchange(tokenizer, row.prompt, text, "")
                            for text in row.responses
                        ),
                        strict=True,
                    ),
                )
            )
            for row in held_out
        ]
    )
    right = [
        (s[1] > s[0]).item() == bool(r.better if step == "reward" else 1 - r.safer)
        for s, r in zip(scores, held_out, strict=True)
    ]
    reported = [row for row in read_lines(out / "metrics.jsonl") if "validation_accuracy" in row]
    assert len(reported) == 1
    assert reported[0]["validation_accuracy"] == pytest.approx(sum(right) / len(right))
    if step == "cost":
        signs = torch.tensor([[1.0 if not safe else -1.0 for safe in row.safe] for row in held_out])
        assert reported[0]["validation_sign_accuracy"] == pytest.approx(
            (scores * signs > 0).float().mean().item()
        )


def test_a_reward_recipe_trains_no_cost(
    step_recipe: Callable[..., StepRecipe], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match="recipe 'tiny' is for the reward step: run that, or set step=cost"
    ):
        train_cost(step_recipe("reward"), tmp_path)


@pytest.fixture
def scorer(finished: Callable[..., Path]) -> Scorer:
    return Scorer.load(finished("reward") / "model")


def test_a_batch_scores_as_its_samples_do(scorer: Scorer) -> None:
    alone = torch.cat(
        [
            scorer.score([prompt], [response])
            for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
        ]
    )
    scorer.batch_size = 2
    together = scorer.score(PROMPTS, RESPONSES)
    assert together.dtype == torch.float32 and together.shape == (3,)
    assert torch.allclose(together, alone, atol=1e-5)
    assert alone.unique().numel() == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_stock_transformers_gives_the_same_scores(
    side: str, scorer: Scorer, finished: Callable[..., Path]
) -> None:
    stock = AutoModelForSequenceClassification.from_pretrained(
        finished("reward") / "model", dtype=torch.float32
    )
    samples = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    longest = max(map(len, samples))
    pads = [[stock.config.pad_token_id] * (longest - len(ids)) for ids in samples]
    ids = torch.tensor(
        [pad + ids if side == "left" else ids + pad for ids, pad in zip(samples, pads, strict=True)]
    )
    mask = torch.tensor(
        [
            [0] * len(p) + [1] * len(i) if side == "left" else [1] * len(i) + [0] * len(p)
            for i, p in zip(samples, pads, strict=True)
        ]
    )
    with torch.no_grad():
        logits = stock(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    assert torch.allclose(logits, scorer.score(PROMPTS, RESPONSES), atol=1e-5)


def test_the_last_token_counts_even_where_it_looks_like_padding(scorer: Scorer) -> None:
    ended, padded = [*RESPONSES[0], scorer.pad_id], RESPONSES[0]
    assert not torch.allclose(
        scorer.score(PROMPTS[:1], [ended]), scorer.score(PROMPTS[:1], [padded]), atol=1e-4
    )


@pytest.mark.parametrize(
    ("family", "vocab_size"), [("phi", 512), ("gpt_neox", 512), ("llama", None)]
)
def test_the_end_of_the_turn_is_read_where_it_would_be_padding(
    family: str, vocab_size: int | None, tiny_parts: Callable[..., Any]
) -> None:
    """Phi-2's tokenizer has no padding of its own: the stock class would read the token before."""
    recipe = tiny_parts(family, vocab_size=vocab_size).recipe()
    language_model, tokenizer, template = load_language_model(recipe, torch.float32)
    tokenizer.chat_template, tokenizer.pad_token = template, tokenizer.eos_token
    stack = language_model.base_model
    model = new_scorer(language_model, tokenizer, family).eval()
    assert (
        tokenizer.pad_token == PAD
        and model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    )
    ids = torch.tensor([[5, 6, 7, tokenizer.eos_token_id, tokenizer.pad_token_id]])
    with torch.no_grad():
        score = model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0]])).logits[0, 0]
        last = stack(ids[:, :4]).last_hidden_state[0, -1]
    assert torch.allclose(score, model.score(last)[0], atol=1e-5)


def test_a_language_model_is_no_scorer(finished: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="gives no single score"):
        Scorer.load(finished("sft") / "model")
    with pytest.raises(FileNotFoundError, match="no reward or cost model"):
        Scorer.load(finished("sft") / "nothing")


def test_a_score_that_is_no_number_is_named(scorer: Scorer) -> None:
    with torch.no_grad():
        scorer.model.score.weight[0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match="the score of sample 0 of 3 is nan, and 3 are not finite"
    ):
        scorer.score(PROMPTS, RESPONSES)
    with pytest.raises(FloatingPointError, match="sample 1 of 2 is inf, and 1 are"):
        check_finite(torch.tensor([0.0, float("inf")]), "sample")
