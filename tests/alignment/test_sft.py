"""SFT trains on the assistant's words alone, and gives a language model that a recipe takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mipha.alignment.recipe import StepRecipe
from mipha.alignment.sft import sft, supervised
from mipha.data.alignment import (
    encode_exchange,
    encode_prompt,
    load_instructions,
    split_by_prompt,
)
from mipha.errors import MissingPackage
from mipha.files import read_lines
from mipha.models.build import build
from mipha.models.language_model import load_language_model
from mipha.recipe import ModelRecipe


@pytest.fixture(params=["chatml", "vicuna"])
def tokenizer(request: pytest.FixtureRequest, tiny_parts: Callable[..., Any]) -> Any:
    wanted = tiny_parts("llama").recipe(chat_template=request.param)
    _, read, template = load_language_model(wanted, torch.float32)
    read.chat_template = template
    return read


def test_labels_are_the_assistants_words_and_the_end_of_the_turn(
    tokenizer: Any, alignment_data: dict[str, Path]
) -> None:
    rows = load_instructions(alignment_data["instructions"])
    for row, encoded in zip(rows, supervised(tokenizer, rows, max_tokens=256), strict=True):
        trained = [label for label in encoded["labels"] if label != -100]
        assert tokenizer.decode(trained).strip() == f"{row.response}<|im_end|>"
        assert encoded["input_ids"][-len(trained) :] == trained  # nothing after the end
        assert row.prompt in tokenizer.decode(encoded["input_ids"][: -len(trained)])


def test_the_prompt_is_what_a_policy_is_asked_with(tokenizer: Any) -> None:
    prompt_ids, response_ids = encode_exchange(tokenizer, "Which colour?", "\n red ", "row 1")
    assert prompt_ids == encode_prompt(tokenizer, "Which colour?")
    assert tokenizer.decode(response_ids).strip() == "red<|im_end|>"


def test_too_long_rows_are_counted_and_never_cut(
    tokenizer: Any, alignment_data: dict[str, Path]
) -> None:
    rows = load_instructions(alignment_data["instructions"])
    lengths = [
        sum(map(len, encode_exchange(tokenizer, row.prompt, row.response, row.id))) for row in rows
    ]
    longest = max(lengths)
    over = sum(length > longest - 1 for length in lengths)
    with pytest.raises(
        ValueError,
        match=rf"row \d+ takes {longest} tokens, more than .* "
        rf"\({over} rows are too long.*set max_tokens={longest}",
    ):
        supervised(tokenizer, rows, longest - 1)
    assert len(supervised(tokenizer, rows, longest)) == len(rows)


def test_the_result_is_a_language_model_that_a_recipe_takes(
    finished: Callable[..., Path], tiny_parts: Callable[..., Any]
) -> None:
    folder = finished("sft") / "model"
    model, processor = build(
        ModelRecipe(vision_tower=str(tiny_parts().vision_tower), language_model=str(folder))
    )
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight[: stock.vocab_size], stock.lm_head.weight)
    assert "<|im_start|>user" in processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False
    )
    assert "/" not in json.loads((folder / "config.json").read_text()).get("_name_or_path", "")


def test_packed_steps_count_rows_and_the_loss_falls(finished: Callable[..., Path]) -> None:
    rows = list(read_lines(finished("sft") / "metrics.jsonl"))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert losses[-1] < 0.8 * losses[0]
    assert (finished("sft") / "loss.png").stat().st_size > 1000


def test_packed_rows_are_isolated_and_every_token_weighs_the_same(
    finished: Callable[..., Path],
    step_recipe: Callable[..., StepRecipe],
    alignment_data: dict[str, Path],
) -> None:
    """The first step sees all conversations; its loss is that of each alone, by the base model."""
    base = AutoModelForCausalLM.from_pretrained(
        step_recipe("sft").language_model, dtype=torch.float32
    )
    out = finished("sft", "max_tokens=256", "max_steps=1")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    train, _ = split_by_prompt(load_instructions(alignment_data["instructions"]), 0.2, seed=0)
    total, tokens = 0.0, 0
    for row in supervised(tokenizer, train, 256):
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(row["labels"][1:]), reduction="sum"
        ).item()
        tokens += sum(label != -100 for label in row["labels"])
    # 557 tokens make three rows of 256, in two forward passes of two and one. A step has four rows.
    first = next(read_lines(out / "metrics.jsonl"))
    assert first["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_the_reported_loss_is_plain_cross_entropy_with_phis_head_bias(
    finished: Callable[..., Path],
    step_recipe: Callable[..., StepRecipe],
    alignment_data: dict[str, Path],
) -> None:
    out = finished("sft", "max_tokens=64", "micro_batch=1", family="phi")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out / "model"),
        AutoTokenizer.from_pretrained(out / "model"),
    )
    assert model.lm_head.bias.abs().max() > 0.5
    held_out = split_by_prompt(load_instructions(alignment_data["instructions"]), 0.2, seed=0)[1]
    losses = []
    for row in supervised(tokenizer, held_out, 64):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]))
        )  # ignores -100
    reported = [
        row["validation_loss"]
        for row in read_lines(out / "metrics.jsonl")
        if "validation_loss" in row
    ]
    assert len(reported) == 1
    assert reported[0] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_an_adapter_is_merged_and_kept(
    finished: Callable[..., Path], step_recipe: Callable[..., StepRecipe]
) -> None:
    from peft import PeftModel

    out = finished("sft", "tuning=lora", "lora.rank=4", "max_steps=2")
    base = AutoModelForCausalLM.from_pretrained(
        step_recipe("sft").language_model, dtype=torch.float32
    )
    ids = torch.arange(20)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, before, atol=1e-3)
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight)  # the head has no adapter


def test_prompts_that_leak_into_the_held_out_file_are_refused(
    step_recipe: Callable[..., StepRecipe], tmp_path: Path
) -> None:
    (tmp_path / "test.json").write_text(
        json.dumps([{"instruction": "which colour is SHAPE 3?", "output": "x"}])
    )
    with pytest.raises(
        ValueError,
        match=r"test.json row 1 is held out, but .*alpaca_data.json row 4 "
        "trains on the same prompt",
    ):
        sft(
            step_recipe("sft", "held_out=0", f"held_out_data={tmp_path / 'test.json'}"),
            tmp_path / "run",
        )


def test_without_trl_the_extra_is_named(
    step_recipe: Callable[..., StepRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        MissingPackage,
        match=r'package trl, which is not installed: pip install "mipha-vlm\[align\]"',
    ):
        sft(step_recipe("sft"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
