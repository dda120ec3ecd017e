"""A finished model learns to prefer answers about images.

A killed run ends in the same weights, which it does not with the stock trainer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("trl")

import torch
from safetensors.torch import load_file

from mipha.alignment.dpo import dpo
from mipha.alignment.image_dpo import answered_pairs, collate_answers
from mipha.alignment.recipe import StepRecipe
from mipha.alignment.step import Step, load_rows
from mipha.data.alignment import ImagePreference, load_image_preferences, split_by_prompt
from mipha.files import read_lines
from mipha.models.build import save_checkpoint
from mipha.models.modeling import load_model
from mipha.models.processing import load_processor


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "checkpoint"
    save_checkpoint(*tiny_model("phi"), folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen questions about eight images; "yes" is chosen."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(random.integers(0, 255, (30, 30, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    rows = [
        {
            "image": f"{n % 8}.png",
            "prompt": f"Is it {n}?",
            "chosen": "yes",
            "rejected": "no, a circle",
        }
        for n in range(16)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture
def recipe(step_recipe: Callable[..., StepRecipe], checkpoint: Path, pairs: Path) -> StepRecipe:
    changes = (
        "chat_template=null",
        f"language_model={checkpoint}",
        f"data={pairs}",
        "max_steps=4",
        "learning_rate=1e-3",
    )
    return step_recipe("dpo", *changes)


def test_both_answers_of_a_pair_follow_the_same_image(checkpoint: Path, pairs: Path) -> None:
    processor = load_processor(checkpoint)
    rows = load_image_preferences(pairs)[:2]
    batch = collate_answers(answered_pairs(processor, rows, 128), processor)
    spoken = [
        ids[mask.bool()]
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert [processor.tokenizer.decode(ids) for ids in spoken] == ["yes<|im_end|>"] * 2 + [
        "no, a circle<|im_end|>"
    ] * 2
    assert batch["pixel_values"].shape[0] == 4
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2]) and not torch.equal(
        *batch["pixel_values"][:2]
    )
    with pytest.raises(
        ValueError,
        match=r"row \d takes \d+ tokens, more than max_tokens=20, .* \(4 rows are too long",
    ):
        answered_pairs(processor, rows, 20)


def test_nothing_of_a_pair_is_lost(
    recipe: StepRecipe, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"image": "0.png", "prompt": "Is it?", "chosen": "yes", "rejected": "no"}

    def load(**more: Any) -> ImagePreference:
        (pairs.parent / "one.jsonl").write_text(json.dumps(row | more))
        return load_image_preferences(pairs.parent / "one.jsonl")[0]

    # The image may stand in a list, and its place in the question.
    for more in ({}, {"image": None, "images": ["0.png"]}, {"prompt": "<image>\nIs it?"}):
        for sample in load(**more).samples:
            assert sample.messages[0].text == "<image>\nIs it?"
            assert sample.images == (pairs.parent / "0.png",)

    # What nothing reads is named when the rows are loaded.
    (remark,) = load(system="Be brief.").remarks
    assert remark.kind == "unread-content" and '"system", which holds a system turn' in remark.about
    step = Step(recipe.override(f"data={pairs.parent / 'one.jsonl'}", "held_out=0"), tmp_path)
    (tmp_path / "provenance.json").write_text("{}")
    load_rows(step, load_image_preferences)
    assert "which holds a system turn (1 of 1 rows)" in " ".join(capsys.readouterr().out.split())

    # What cannot be meant is refused.
    (tmp_path / "outside.png").write_bytes(b"x")
    for more, sentence in (
        ({"image": "0.png", "image2": "1.png"}, "it has 2 images; wanted the path of one"),
        ({"image": str(tmp_path / "outside.png")}, "leads out of .*; put it into"),
        ({"image": "https://a.org/0.png"}, "is an address"),
        (
            {"image": {"bytes": "x" * 999, "path": None}},
            "it has an image .{0,100}; wanted the path",
        ),
        ({"weight": 0}, "so nothing of it is to be learned"),
        ({"chosen": ["yes"] * 99}, r"'chosen' must be text, but is .{0,80};"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load(**more)
    (pairs.parent / "two.jsonl").write_text(json.dumps(row)[:-1] + ', "chosen": "no"}')
    with pytest.raises(ValueError, match="an object has the key 'chosen' twice"):
        load_image_preferences(pairs.parent / "two.jsonl")


def test_no_image_is_on_both_sides(pairs: Path, tmp_path: Path) -> None:
    train, test = split_by_prompt(load_image_preferences(pairs), 0.4, seed=0)
    assert train and test and not {row.image for row in train} & {row.image for row in test}
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"image": "none.png", "prompt": "a", "chosen": "b", "rejected": "c"})
    )
    with pytest.raises(ValueError, match=r"row 1: there is no image .*none\.png"):
        load_image_preferences(tmp_path / "a.jsonl")


def test_it_learns_and_a_killed_run_ends_in_the_same_weights(
    recipe: StepRecipe,
    checkpoint: Path,
    tmp_path: Path,
    kill_mid_save: Callable[[StepRecipe, Path], None],
) -> None:
    whole = dpo(recipe, tmp_path / "whole")
    kill_mid_save(recipe, tmp_path / "killed")
    resumed = dpo(recipe, tmp_path / "killed")
    weights = [load_file(folder / "model.safetensors") for folder in (whole, resumed, checkpoint)]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[2][name])}
    assert any("language_model" in name for name in changed) and any(
        "projector" in name for name in changed
    )
    assert not any("vision_tower" in name for name in changed)
    rows = [row for row in read_lines(tmp_path / "whole" / "metrics.jsonl") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[-1]["loss"] < 0.6
    assert load_model(str(whole)).lm_head.bias is not None  # Phi's


def test_adapters_of_the_language_model_are_merged(
    recipe: StepRecipe, checkpoint: Path, tmp_path: Path
) -> None:
    model = dpo(recipe.override("tuning=lora", "lora.rank=4", "max_steps=2"), tmp_path / "run")
    after, before = (
        load_file(model / "model.safetensors"),
        load_file(checkpoint / "model.safetensors"),
    )
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(
        "language_model" in name and name.endswith(".weight") for name in changed
    )


def test_a_setting_without_effect_is_refused(recipe: StepRecipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prefer=safer has no effect"):
        dpo(recipe.override("prefer=safer"), tmp_path / "run")
