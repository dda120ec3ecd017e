"""Any number of stages: the first starts from the parts, each later one from the one before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mipha import api
from mipha.planning.plan import device_named, plan_training
from mipha.processes import hold_folder
from mipha.recipe import Recipe
from mipha.run import Run, model_folder
from mipha.training.pipeline import train


@pytest.fixture(scope="module")
def three(tiny_run_recipe: Callable) -> Recipe:
    """Pretrain, finetune, and a third stage that trains the projector and adapters."""
    recipe: Recipe = tiny_run_recipe("stages.finetune.max_steps=2")
    stages = {
        name: stage.model_dump(mode="json", exclude_unset=True)
        for name, stage in recipe.stages.items()
    }
    tuning = {
        "vision_tower": "frozen",
        "projector": "full",
        "language_model": "lora",
        "lora": {"rank": 2, "alpha": 4},
    }
    stages["polish"] = stages["finetune"] | {"tuning": tuning}
    return recipe.override(f"stages={json.dumps(stages)}")


@pytest.fixture(scope="module")
def run(three: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return api.train(three, tmp_path_factory.mktemp("three") / "run")


def test_each_stage_starts_from_the_one_before(run: Run, weights: Callable) -> None:
    before, after = (weights(run.checkpoint(stage)) for stage in ("finetune", "polish"))
    frozen = [name for name in before if "vision_tower" in name]
    trained = [name for name in before if "projector" in name]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert trained and not any(torch.equal(before[name], after[name]) for name in trained)
    parts = weights(run.checkpoint("pretrain"))
    assert not all(torch.equal(parts[name], before[name]) for name in frozen), "finetune moved it"

    # The adapter is of the model that the stage before made; no copy of it is kept.
    adapter = json.loads((run.stage("polish") / "adapter" / "adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]).resolve() == run.checkpoint("finetune")
    assert not (run.stage("polish") / "base").exists()


def test_the_last_stage_is_the_result(run: Run) -> None:
    assert run.is_trained
    assert run.final_checkpoint() == model_folder(run.folder) == run.checkpoint("polish")
    card = (run.final_checkpoint() / "README.md").read_text()
    rows = [line.split("|")[1].strip() for line in card.splitlines() if line.startswith("| p")]
    assert [row for row in rows if row in ("pretrain", "polish")] == ["pretrain", "polish"]
    data = json.loads((run.folder / "provenance.json").read_text())["data"]
    assert list(data) == ["pretrain", "finetune", "polish"]


def test_a_run_that_was_stopped_between_stages_goes_on(
    run: Run, three: Recipe, tmp_path: Path, weights: Callable
) -> None:
    for last in ("pretrain", "finetune"):
        again = Run(tmp_path / last)
        shutil.copytree(run.folder, again.folder)
        for stage in list(three.stages)[list(three.stages).index(last) + 1 :]:
            shutil.rmtree(again.stage(stage))
        untouched = again.checkpoint(last).stat().st_mtime_ns
        train(three, again.folder)
        assert again.checkpoint(last).stat().st_mtime_ns == untouched
        mine, theirs = weights(again.final_checkpoint()), weights(run.final_checkpoint())
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_one_stage_is_enough(tiny_run_recipe: Callable, tmp_path: Path, weights: Callable) -> None:
    recipe: Recipe = tiny_run_recipe("model.calibrate_projector=true")
    alone = recipe.model_copy(update={"stages": {"finetune": recipe.stages["finetune"]}})
    run = train(alone.override("stages.finetune.max_steps=1"), tmp_path / "run")
    assert run.final_checkpoint() == run.checkpoint("finetune")
    assert not run.stage("pretrain").exists()

    # Calibration belongs to the first stage, whatever its name is.
    plain = train(
        alone.override("stages.finetune.max_steps=1", "model.calibrate_projector=false"),
        tmp_path / "plain",
    )
    mine, theirs = weights(run.final_checkpoint()), weights(plain.final_checkpoint())
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine if "projector" in name)


def test_a_plan_has_every_stage_in_order(three: Recipe) -> None:
    plans = plan_training(three, device_named("h100", three.precision), 1, None)
    assert [stage.name for stage in plans] == ["pretrain", "finetune", "polish"]


def copied(run: Run, folder: Path) -> Run:
    """Return a copy of a run in which the last stage is still to be trained."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(Run(folder).stage("polish"))
    return Run(folder)


def test_a_stage_does_not_start_from_a_damaged_checkpoint(
    run: Run, three: Recipe, tmp_path: Path
) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        damaged = copied(run, tmp_path / name)
        path = damaged.checkpoint("finetune") / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=rf"finetune/checkpoint is not what finetune exported .*{name}.*: put those files",
        ):
            train(three, damaged.folder)
    assert not damaged.stage("polish").exists()


def test_a_checkpoint_of_an_older_version_is_trained_from(
    run: Run, three: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture, weights: Callable
) -> None:
    old = copied(run, tmp_path / "old")
    old.checkpoint_record("finetune").unlink()
    train(three, old.folder)
    said = capsys.readouterr().out.replace("\n", "")
    assert "finetune/checkpoint has no checksums: an older version exported it" in said
    mine, theirs = weights(old.final_checkpoint()), weights(run.final_checkpoint())
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_that_another_process_trains_is_refused(
    run: Run, three: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mipha.processes.PATIENCE", 0.0)
    for folder in (run.folder, tmp_path / "new"):
        with (
            hold_folder(folder),
            pytest.raises(ValueError, match=r"is in use by another process \(process \d+ on"),
        ):
            train(three, folder)
    assert not (tmp_path / "new" / "recipe.yaml").exists()
    train(three, run.folder)
    assert not (run.folder / ".lock").exists()
