"""A stage that learns from preferences, inside a recipe: one file and one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from mipha.api import check_training, train
from mipha.cli import app
from mipha.data.alignment import load_image_preferences, split_by_prompt
from mipha.files import read_lines
from mipha.models.memory import RESERVE
from mipha.planning.plan import Device, plan_training
from mipha.recipe import DpoStageRecipe, Recipe
from mipha.run import Run
from tests import forked
from tests.training.test_kill import kill_at, num_lines


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions about images; "yes" is chosen."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(8):
        Image.new("RGB", (30, 30), (number * 30, 60, 90)).save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "prompt": f"Is it {number}?"}
        rows.append(row | {"chosen": "yes", "rejected": "no, a circle"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture
def recipe(tiny_run_recipe: Callable[..., Recipe], pairs: Path) -> Recipe:
    tree = tiny_run_recipe("stages.finetune.max_steps=2").model_dump(mode="json")
    tree["stages"]["prefer"] = {
        "kind": "dpo",
        "data": str(pairs),
        "learning_rate": 1e-3,
        "batch_size": 4,
        "max_steps": 2,
        "checkpoint_every": 1,
        "held_out": 0.0,
    }
    return Recipe.parse(tree, "three stages")


def test_three_stages_with_preferences_are_one_command(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    whole = train(recipe, tmp_path / "whole")
    assert [row["step"] for row in read_lines(whole.stage("prefer") / "dpo" / "metrics.jsonl")]
    card = (whole.final_checkpoint() / "README.md").read_text()
    assert "by preferences" in card

    # The language model moved, the tower did not.
    start = load_file(whole.checkpoint("finetune") / "model.safetensors")
    end = load_file(whole.final_checkpoint() / "model.safetensors")
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert any("language_model" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_killed_in_any_stage_it_ends_in_the_same_weights(
    recipe: Recipe, tmp_path: Path, tuning: str
) -> None:
    """`kill -9` in the stage before, between two steps of this one, and when it has its result."""
    pytest.importorskip("trl")
    recipe = recipe.override(
        f"stages.prefer.tuning={tuning}",
        "stages.prefer.max_steps=4",
        *(f"stages.{name}.checkpoint_every=1" for name in ("pretrain", "finetune")),
    )
    whole, run = train(recipe, tmp_path / "whole"), Run(tmp_path / "killed")
    steps = run.stage("prefer") / "dpo" / "metrics.jsonl"
    moments: list[Callable[[], bool]] = [
        lambda: num_lines(run.metrics("finetune")) >= 1,
        lambda: num_lines(steps) >= 2,
        (run.stage("prefer") / "dpo" / "model" / "config.json").exists,
    ]
    killed = [
        kill_at(forked.start_function(train, recipe, run.folder), moment) for moment in moments
    ]
    assert all(killed[:2]), "a kill came after the end"

    train(recipe, run.folder)
    for name in recipe.stages:
        one, other = (load_file(r.checkpoint(name) / "model.safetensors") for r in (whole, run))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    rows, others = (
        [row for row in read_lines(r.stage("prefer") / "dpo" / "metrics.jsonl") if "loss" in row]
        for r in (whole, run)
    )
    assert rows == others and [row["step"] for row in rows] == [1, 2, 3, 4]


def test_it_may_be_the_only_stage_from_anybodys_checkpoint(
    stock_llava: Callable[..., Path], recipe: Recipe, tmp_path: Path
) -> None:
    """What a checkpoint answers is found without marks in its template, as in other stages."""
    pytest.importorskip("trl")
    folder = stock_llava()
    tree = recipe.model_dump(mode="json") | {"model": {"checkpoint": str(folder)}}
    tree["stages"] = {"prefer": tree["stages"]["prefer"]}
    alone = Recipe.parse(tree, "alone")
    run = train(alone, tmp_path / "run")
    assert "generation" in (run.final_checkpoint() / "chat_template.jinja").read_text()

    # A class that it cannot train is refused before anything loads; a template as elsewhere.
    config = folder / "config.json"
    kept = config.read_text()
    config.write_text(json.dumps(json.loads(kept) | {"model_type": "llava_next"}))
    with pytest.raises(ValueError, match="is a 'llava_next', and answers about images are"):
        check_training(alone, tmp_path / "other")
    config.write_text(kept)
    with pytest.raises(ValueError, match="own template can be trained on and stays"):
        train(alone.override("model.chat_template=vicuna"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(
        ValueError, match=r"trains the class 'llava' alone, and model\.image=anyres"
    ):
        recipe.override("model.image=anyres")


def test_a_dpo_stage_has_keys_of_its_own(recipe: Recipe) -> None:
    assert isinstance(recipe.stages["prefer"], DpoStageRecipe)
    assert list(recipe.supervised_stages) == ["pretrain", "finetune"]
    assert Recipe.parse(recipe.model_dump(mode="json"), "again") == recipe
    moved = recipe.override("data.prefer=other.jsonl", "stages.prefer.beta=0.2")
    assert moved.stages["prefer"].data == Path("other.jsonl")
    with pytest.raises(ValueError, match=r"stages\.prefer\.row_tokens: unknown key"):
        recipe.override("stages.prefer.row_tokens=100")
    with pytest.raises(ValueError, match="is a dpo stage, which has no answers but pairs"):
        recipe.stage("prefer")


def test_what_cannot_be_trained_is_said_before_anything_loads(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = pairs.with_name("broken.jsonl")
    broken.write_text(pairs.read_text().replace('"7.png"', '"gone.png"'))
    with pytest.raises(ValueError, match=r"broken\.jsonl row 8: there is no image .*gone\.png"):
        check_training(recipe.override(f"data.prefer={broken}"), tmp_path / "run")
    with pytest.raises(ValueError, match="leaves none to hold out"):
        check_training(recipe.override("stages.prefer.held_out=0.0001"), tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="prefer is a dpo stage, which trains in one process"):
            check_training(recipe, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"no data at gone\.jsonl"):
        check_training(recipe.override("data.prefer=gone.jsonl"), tmp_path / "run")
    with pytest.raises(ValueError, match="does not divide batch_size"):
        check_training(recipe.override("stages.prefer.micro_batch=3"), tmp_path / "run")

    tree = recipe.model_dump(mode="json")
    tree["stages"] = {"prefer": tree["stages"]["prefer"]}
    with pytest.raises(ValueError, match="the projector of a model from parts has not learned"):
        Recipe.parse(tree, "alone")
    Recipe.parse(tree | {"model": {"checkpoint": "runs/x"}}, "from a checkpoint")


# ---- Before training: check and plan -------------------------------------------------------------


def mipha(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_check_reads_pairs_row_by_row(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:
    path = tmp_path / "three.yaml"
    path.write_text(recipe.dump())
    sound = mipha("check", "--recipe", path, "--stage", "prefer")
    assert sound.exit_code == 0, sound.output
    assert "8 rows, 8 samples" in sound.output and "0 errors" in sound.output
    assert "2 of 4 samples: 8 samples" in " ".join(sound.output.split())
    assert "pairs.jsonl" in mipha("check", "--recipe", path).output  # beside the other stages

    # Each fault is found at its row; a rejected answer is read as a chosen one is.
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["image"] = "gone.png"
    rows[3]["chosen"] = 5
    rows[4]["rejected"] = "a long one " * 900
    rows[5]["rejected"] = "<|im_end|>"
    rows[6]["source"] = "somebody"
    rows[7]["prompt"] = " "
    bad, report = pairs.with_name("bad.jsonl"), tmp_path / "report.json"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("check", f"{bad}", "--recipe", path, "--stage", "prefer", "--json", report)
    assert mipha(*words, "--html", tmp_path / "page.html").exit_code == 1
    found = json.loads(report.read_text())["findings"]
    assert {one["row"]: one["kind"] for one in found if one["severity"] == "error"} == {
        1: "no-preference",
        2: "missing-image",
        3: "malformed",
        4: "long-pair",
        5: "special-token",
        7: "empty-answer",
    }
    assert any("source" in one["what"] for one in found if one["kind"] == "unread-key")
    assert "yes" in (tmp_path / "page.html").read_text()

    # What training leaves out by request is counted, and no error.
    tree = recipe.override("stages.prefer.skip_empty=true")
    path.write_text(tree.dump())
    mipha(*words)
    again = json.loads(report.read_text())
    assert again["rows"] == 6 and again["left_out"] == "2 rows that skip_empty leaves out"

    for more in (("--fix", tmp_path / "x.jsonl"), ("--root", tmp_path)):
        assert "have no effect on the pairs of a dpo stage" in mipha(*words, *more).output
    assert "whose pairs `mipha check` alone" in mipha("show", bad, "--row", 0, *words[2:6]).output
    assert "which a dpo stage learns from" in mipha("check", f"{pairs}").output


def test_a_plan_counts_what_trl_takes(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:
    device = Device("small", "cpu", 1e11, 8e9, autocast=False)
    held_out = recipe.override("stages.prefer.held_out=0.4", "stages.prefer.max_steps=null")
    *_, plan = plan_training(held_out, device)
    rows, _ = split_by_prompt(load_image_preferences(pairs), 0.4, recipe.seed)
    assert plan.samples == len(rows) < 8 and plan.steps == -(-len(rows) // 4)

    # Without adapters the model lies there twice; with them its projector is frozen.
    weights = sum(part.parameters for part in plan.parts)
    assert plan.memory["reference model"] == 4 * weights
    *_, adapted = plan_training(held_out.override("stages.prefer.tuning=lora"), device)
    assert adapted.memory["reference model"] == 0
    assert [part.trained > 0 for part in plan.parts] == [False, True, True]
    assert [part.trained > 0 for part in adapted.parts] == [False, False, True]

    # Two answers a pair, and what would fit where it does not.
    larger = held_out.override("stages.prefer.micro_batch=4")
    *_, four = plan_training(larger, device)
    assert (plan.step.widest.rows, four.step.widest.rows) == (2, 8)
    between = (plan.total_memory + four.total_memory) / 2
    room = replace(device, memory=between / RESERVE)
    *_, tight = plan_training(larger, room)
    assert tight.fixes and all(fix.startswith("stages.prefer.") for fix in tight.fixes)
    *_, fixed = plan_training(larger.override(*tight.fixes), room)
    assert not fixed.fixes
    with pytest.raises(ValueError, match="is a dpo stage, which trains in one process: plan"):
        plan_training(recipe, device, num_devices=2)

    # Beside the other stages, and in the file.
    path, out = tmp_path / "three.yaml", tmp_path / "plan.json"
    path.write_text(recipe.dump())
    done = mipha("plan", path, "--json", out)
    assert done.exit_code == 0 and "reference" in done.output, done.output
    assert [one["stage"] for one in json.loads(out.read_text())["stages"]] == list(recipe.stages)
