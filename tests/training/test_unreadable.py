"""An image that cannot be read stops the run by name, or is replaced by grey and counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mipha.data.images import is_readable
from mipha.engine.states import StateWriter
from mipha.recipe import Recipe
from mipha.run import Run
from mipha.training.pipeline import train

FINETUNE = "stages.finetune."
TIMED = {
    "seconds",
    "data_wait_seconds",
    "samples_per_second",
    "images_per_second",
    "tokens_per_second",
    "peak_memory_gib",
}


@pytest.fixture
def damaged(tiny_data: Path, tmp_path: Path) -> Path:
    """Return data with one of six images cut short: it is there, but cannot be decoded."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data.parent, folder)
    image = folder / "3.png"
    image.write_bytes(image.read_bytes()[:-200])
    return folder / tiny_data.name


@pytest.fixture
def recipe(damaged: Path, tiny_run_recipe: Callable) -> Recipe:
    """Two epochs of 24 samples."""
    return tiny_run_recipe(
        f"data.finetune={damaged}", "stages.pretrain.max_steps=1", FINETUNE + "max_steps=8"
    )


def test_it_stops_and_names_sample_and_file(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^sample \S+: \S+3\.png cannot be read as an image: .*"
        r"unreadable_images=substitute to train on",
    ):
        train(recipe, tmp_path / "run")
    assert not Run(tmp_path / "run").is_finished("finetune")


def test_grey_stands_in_and_every_case_is_counted_and_listed_once(
    recipe: Recipe,
    tmp_path: Path,
    metrics: Callable,
    weights: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe.override(FINETUNE + "unreadable_images=substitute")
    assert not is_readable(recipe.stages["finetune"].data[0].root.parent / "3.png")
    whole = train(recipe, tmp_path / "whole")
    rows = metrics(whole.metrics("finetune"))
    samples = [
        json.loads(line) for line in recipe.stages["finetune"].data[0].root.read_text().splitlines()
    ]
    shown = sum(sample["images"] == ["3.png"] for sample in samples)
    assert shown == 4 and sum(row["substituted_images"] for row in rows) == 2 * shown
    listed = metrics(whole.stage("finetune") / "unreadable.jsonl")
    assert len(listed) == shown == len({case["sample"] for case in listed})
    for case in listed:
        assert case["image"].endswith("/3.png") and "cannot be read" in case["reason"]
        assert rows[case["step"] - 1]["substituted_images"] > 0
    assert "substituted_images" not in metrics(whole.metrics("pretrain"))[0]

    def stop_in_the_sixth(self: StateWriter, step: int, *state: object) -> None:
        save(self, step, *state)
        if step == 6:
            raise RuntimeError("stopped")

    save = StateWriter.save
    monkeypatch.setattr(StateWriter, "save", stop_in_the_sixth)
    with pytest.raises(RuntimeError, match="stopped"):
        train(recipe, tmp_path / "stopped")
    monkeypatch.undo()
    shutil.rmtree(
        Run(tmp_path / "stopped").states("finetune") / "step-00000006"
    )  # so that two steps are made again
    stopped = train(recipe, tmp_path / "stopped")
    mine, theirs = weights(stopped.final_checkpoint()), weights(whole.final_checkpoint())
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert metrics(stopped.stage("finetune") / "unreadable.jsonl") == listed
    assert [
        {k: v for k, v in row.items() if k not in TIMED}
        for row in metrics(stopped.metrics("finetune"))
    ] == [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def test_validation_and_calibration_count_and_pass_over_what_cannot_be_read(
    recipe: Recipe, damaged: Path, tmp_path: Path, metrics: Callable
) -> None:
    """One epoch and one validation show each sample once, wherever the damaged ones are."""
    changes = (
        FINETUNE + "unreadable_images=substitute",
        FINETUNE + "held_out=0.4",
        FINETUNE + "max_steps=null",
        FINETUNE + "epochs=1",
    )
    changes += (
        f"data.pretrain={damaged}",
        "stages.pretrain.unreadable_images=substitute",
        "model.calibrate_projector=true",
    )
    done = train(recipe.override(*changes), tmp_path / "run")
    rows = metrics(done.metrics("finetune"))
    assert (
        sum(row["substituted_images"] + row.get("validation_substituted_images", 0) for row in rows)
        == 4
    )
    assert "validation_substituted_images" in rows[-1]
    assert metrics(done.stage("finetune") / "answers.jsonl")


def test_a_step_of_which_nothing_can_be_read_is_no_matter_of_single_files(
    recipe: Recipe, damaged: Path, tmp_path: Path
) -> None:
    for image in damaged.parent.glob("*.png"):
        image.write_bytes(b"gone")
    recipe = recipe.override(FINETUNE + "unreadable_images=substitute", FINETUNE + "batch_size=24")
    with pytest.raises(
        FileNotFoundError,
        match=r"step 1: none of its 18 images can be read, .*: "
        r"see whether the disk that holds them",
    ):
        train(recipe, tmp_path / "run")
