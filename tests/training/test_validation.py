"""Held-out images are measured and asked about, never trained on, and change no step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mipha.data.held_out import side_of
from mipha.data.mixture import Mixture
from mipha.models.modeling import load_model
from mipha.models.processing import load_processor
from mipha.recipe import Recipe
from mipha.run import Run
from mipha.training.pipeline import train
from mipha.training.stage import Stage
from mipha.training.validation import NUM_ANSWERS, Validation
from mipha.world import World

HELD_OUT = (
    "stages.finetune.held_out=0.4",
    "stages.finetune.max_steps=4",
    "stages.finetune.batch_size=3",
)


@pytest.fixture(scope="module")
def run(tiny_run_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Validated after steps 2 and 4."""
    return train(
        tiny_run_recipe(*HELD_OUT, "stages.finetune.validate_every=2"),
        tmp_path_factory.mktemp("validated") / "run",
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_loss_is_that_of_the_model_on_images_it_never_saw(run: Run) -> None:
    metrics = rows(run.metrics("finetune"))
    assert [row["step"] for row in metrics if "validation_loss" in row] == [2, 4]
    assert not any("validation_loss" in row for row in rows(run.metrics("pretrain")))
    stage = run.recipe.stages["finetune"]
    held_out, trained = Mixture(stage.data, 0.4, "validation"), Mixture(stage.data, 0.4)
    assert len(held_out) and {sample.id for sample in held_out}.isdisjoint(
        sample.id for sample in trained
    )
    assert {side_of(sample, 0.4) for sample in held_out} == {"validation"}
    model, processor = (
        load_model(str(run.final_checkpoint())),
        load_processor(run.final_checkpoint()),
    )
    recipe, here = run.recipe.override("precision=float32"), World(0, 1, torch.device("cpu"))
    again = Stage(Run(run.folder / "again"), recipe, "finetune", here)
    alone = Validation(again, held_out, processor)
    assert alone.measure(model, 4)["validation_loss"] == pytest.approx(
        metrics[-1]["validation_loss"], rel=1e-5
    )


def test_what_the_model_says_is_written_beside_what_it_should_say(run: Run) -> None:
    said = rows(run.stage("finetune") / "answers.jsonl")
    stage = run.recipe.stages["finetune"]
    answers = {
        sample.id: sample.messages[1].text for sample in Mixture(stage.data, 0.4, "validation")
    }
    assert [row["step"] for row in said] == [2] * (len(said) // 2) + [4] * (
        len(said) // 2
    ) and 0 < len(said) <= 2 * NUM_ANSWERS
    assert all(
        answers[row["sample"]] == row["expected"]
        and row["question"]
        and isinstance(row["answer"], str)
        for row in said
    )


def test_answers_are_shown_beside_the_loss_each_about_another_image(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run.final_checkpoint()
    stage = Stage(
        Run(run.folder / "shown"), run.recipe, "finetune", World(0, 1, torch.device("cpu"))
    )
    held_out = Mixture(run.recipe.stages["finetune"].data, 0.4, "validation")
    validation = Validation(stage, held_out, load_processor(checkpoint))
    loss = validation.measure(load_model(str(checkpoint)), 4)["validation_loss"]

    shown = capsys.readouterr().out
    assert f"finetune step 4: validation loss {loss:.3f}" in shown
    said = rows(stage.folder / "answers.jsonl")
    assert said and all(row["question"] in shown for row in said)
    images = [sample.images for sample in validation.asked if sample.images]
    assert len(set(images)) == len(images)


def test_a_validated_run_trains_bit_by_bit_as_one_that_is_not(
    run: Run, tiny_run_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    other = train(tiny_run_recipe(*HELD_OUT), tmp_path / "run")
    assert [row["step"] for row in rows(other.metrics("finetune")) if "validation_loss" in row] == [
        4
    ]
    weights, same = (
        load_file(one.final_checkpoint() / "model.safetensors") for one in (run, other)
    )
    assert weights.keys() == same.keys() and all(
        torch.equal(weights[name], same[name]) for name in weights
    )


def test_a_share_that_leaves_nothing_and_a_key_without_effect_are_refused(
    tiny_run_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="validate_every=5 has no effect without held_out"):
        tiny_run_recipe("stages.finetune.validate_every=5")
    with pytest.raises(ValueError, match=r"held_out=1e-09 leaves no sample for validation"):
        train(tiny_run_recipe("stages.finetune.held_out=1.0e-9"), tmp_path / "run")
