"""Direct preference optimization: the labelled response is preferred, more than at the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mipha.alignment.dpo import preferred_pairs
from mipha.data.alignment import Preference, encode_exchange
from mipha.files import read_lines
from mipha.models.language_model import load_language_model
from mipha.recipe import ModelRecipe


def test_either_label_may_say_what_is_preferred(finished: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished("dpo") / "model")
    row = Preference("row 1", "May I?", ("yes", "no"), better=0, safer=1, safe=(False, True))
    prompt, yes = encode_exchange(tokenizer, row.prompt, "yes", "")
    no = encode_exchange(tokenizer, row.prompt, "no", "")[1]
    assert preferred_pairs(tokenizer, [row], "better", 64) == [
        {"prompt_ids": prompt, "chosen_ids": yes, "rejected_ids": no}
    ]
    assert preferred_pairs(tokenizer, [row], "safer", 64) == [
        {"prompt_ids": prompt, "chosen_ids": no, "rejected_ids": yes}
    ]
    with pytest.raises(ValueError, match=r"row 1 takes .* more than max_tokens=8"):
        preferred_pairs(tokenizer, [row], "better", 8)


@pytest.mark.parametrize("overrides", [(), ("tuning=lora", "lora.rank=4")])
def test_it_starts_at_its_reference_and_learns_the_preference(
    overrides: tuple[str, ...], finished: Callable[..., Path]
) -> None:
    rows = [
        row for row in read_lines(finished("dpo", *overrides) / "metrics.jsonl") if "loss" in row
    ]
    assert rows[0]["loss"] == pytest.approx(
        math.log(2), abs=1e-5
    )  # policy and reference agree, so sigma(0)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_result_is_a_language_model_that_a_recipe_takes(finished: Callable[..., Path]) -> None:
    folder = finished("dpo") / "model"
    model, tokenizer, _ = load_language_model(
        ModelRecipe(vision_tower="none", language_model=str(folder)), torch.float32
    )
    assert torch.equal(
        model.lm_head.weight, AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    )
    ends: Any = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (
        ends if isinstance(ends, list) else [ends]
    )
