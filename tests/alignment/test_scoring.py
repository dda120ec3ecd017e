"""Scores are read on token ids at the end of the turn, whoever pads them and with what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForSequenceClassification

from mipha.alignment.scoring import PAD, Scorer, check_finite, new_scorer
from mipha.models.language_model import load_language_model

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
RESPONSES = [[20, 21, 2], [22, 23, 24, 25, 26, 2], [27, 2]]


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
    """As with Phi-2, whose tokenizer has no padding of its own: the stock class would read the token before."""
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
