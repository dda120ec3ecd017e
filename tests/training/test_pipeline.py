"""A run as a whole: what is refused before the first step, what is skipped, what is left."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mipha.assistant import load
from mipha.recipe import DataRecipe
from mipha.run import Run, open_run
from mipha.training import pipeline
from mipha.training.pipeline import pin, train

STAGES = ("pretrain", "finetune")


@pytest.fixture(scope="module")
def run(tiny_run_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(
        tiny_run_recipe("model.calibrate_projector=true"),
        tmp_path_factory.mktemp("pipeline") / "run",
    )


def test_what_a_run_leaves(run: Run) -> None:
    left = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    for stage in STAGES:
        assert {
            f"{stage}/metrics.jsonl",
            f"{stage}/loss.png",
            f"{stage}/checkpoint/model.safetensors",
        } <= left
        assert run.is_finished(stage)
    assert {"recipe.yaml", "provenance.json"} <= left
    assert not any("states" in name or "partial" in name or ".tmp" in name for name in left)


def test_the_recipe_is_read_back_from_the_run(run: Run, tiny_run_recipe: Callable) -> None:
    assert open_run(run.folder).recipe == tiny_run_recipe("model.calibrate_projector=true")


def test_the_result_answers_and_stock_transformers_loads_it(run: Run, tiny_data: Path) -> None:
    assert (
        load(run).answer(tiny_data.parent / "0.png", "Which colour?", max_new_tokens=4).num_tokens
        > 0
    )
    _, info = AutoModelForImageTextToText.from_pretrained(
        run.final_checkpoint(), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_frozen_parts_are_bit_equal_after_the_stage(
    run: Run, tiny_run_recipe: Callable, weights: Callable
) -> None:
    """Pretrain trains the projector alone; tower and language model stay those of the parts."""
    parts = weights(Path(tiny_run_recipe().model.language_model))
    mine = weights(run.checkpoint("pretrain"))
    for name, weight in parts.items():
        assert torch.equal(mine[f"language_model.{name}"], weight), name


def test_the_run_of_another_recipe_is_refused(run: Run, tiny_run_recipe: Callable) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    with pytest.raises(
        ValueError,
        match=r"holds a run of another recipe \(seed is 0 there and 1 here\): choose another -o",
    ):
        train(tiny_run_recipe("model.calibrate_projector=true", "seed=1"), run.folder)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_a_stage_that_is_done_is_skipped(
    run: Run, tmp_path: Path, weights: Callable, metrics: Callable
) -> None:
    copy = Run(tmp_path / "copy")
    shutil.copytree(run.folder, copy.folder)
    shutil.rmtree(copy.stage("finetune"))
    untouched = copy.checkpoint("pretrain").stat().st_mtime_ns
    train(copy.recipe, copy.folder)
    assert copy.checkpoint("pretrain").stat().st_mtime_ns == untouched
    mine, theirs = weights(copy.final_checkpoint()), weights(run.final_checkpoint())
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_disk_that_is_too_small_is_said_before_the_first_step(
    tiny_run_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 10**5, 10**5))
    with pytest.raises(
        OSError,
        match=r"0\.0 GB free, but this stage writes up to .* GB: free some, or choose another -o",
    ):
        train(tiny_run_recipe(), tmp_path / "run")
    assert not (tmp_path / "run" / "pretrain" / "metrics.jsonl").exists()


def test_each_stage_pads_or_squashes_as_it_says(tiny_run_recipe: Callable, tmp_path: Path) -> None:
    """As upstream: the first stage squashes, the second pads."""
    run = train(tiny_run_recipe("stages.pretrain.pad_to_square=false"), tmp_path / "run")
    saved = [json.loads((run.checkpoint(s) / "processor_config.json").read_text()) for s in STAGES]
    assert [config["image_processor"]["do_pad"] for config in saved] == [False, True]


def test_the_disk_must_hold_all_states_the_start_and_the_checkpoint(
    tiny_run_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(pipeline, "check_free_space", lambda folder, need: asked.append(need))
    run = train(tiny_run_recipe("keep_states=3"), tmp_path / "run")
    for stage, need in zip(STAGES, asked, strict=True):
        parts = json.loads((run.stage(stage) / "tuning.json").read_text())["parts"].values()
        trained = 4 * sum(part["trained"] for part in parts)
        everything = 4 * sum(part["parameters"] for part in parts)

        # Four states of weights and two moments, the start, an adapter, and the checkpoint.
        assert need == (4 * 3 + 2) * trained + everything


def test_a_data_set_that_is_missing_is_said_before_anything_is_built(
    tiny_run_recipe: Callable, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        train(
            tiny_run_recipe(
                f"data.finetune={tmp_path / 'missing.jsonl'}", "model.vision_tower=nothing/there"
            ),
            tmp_path / "run",
        )


def test_broken_data_leave_no_run_and_name_the_command_that_finds_them(
    tiny_run_recipe: Callable, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "a", "answer": "b"}\n{"colour": "red"}\n')
    with pytest.raises(ValueError, match=rf"line 2: .*`mipha check {broken}` shows every such row"):
        train(tiny_run_recipe(f"data.finetune={broken}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_first_sample_that_cannot_be_encoded_is_said_before_weights_are_saved(
    tiny_run_recipe: Callable, tmp_path: Path
) -> None:
    """The base of adapters would be gigabytes."""
    recipe = tiny_run_recipe(
        "stages.pretrain.tuning.language_model=lora", "stages.pretrain.row_tokens=5"
    )
    with pytest.raises(ValueError, match="row_tokens=5 cuts its answer off"):
        train(recipe, tmp_path / "run")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_calibration_needs_an_image(tiny_run_recipe: Callable, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        json.dumps(
            {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
        )
    )
    with pytest.raises(
        ValueError,
        match=r"calibrate_projector needs images, .* set model.calibrate_projector=false",
    ):
        train(
            tiny_run_recipe(f"data.pretrain={text}", "model.calibrate_projector=true"),
            tmp_path / "run",
        )


def test_a_stage_without_any_image_trains(
    tiny_run_recipe: Callable, tmp_path: Path, weights: Callable, metrics: Callable
) -> None:
    """With a frozen language model, a step without images has no gradient and must not fail."""
    text = tmp_path / "text.jsonl"
    line = json.dumps(
        {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
    )
    text.write_text(f"{line}\n" * 4)
    done = train(
        tiny_run_recipe(f"data.pretrain={text}", f"data.finetune={text}"), tmp_path / "run"
    )
    assert [row["images"] for row in metrics(done.metrics("finetune"))] == [0, 0]
    before, after = weights(done.checkpoint("pretrain")), weights(done.final_checkpoint())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("language_model") for name in changed)


def test_fewer_samples_than_a_step_train_one_step(
    tiny_run_recipe: Callable, tmp_path: Path, metrics: Callable
) -> None:
    done = train(
        tiny_run_recipe("stages.finetune.epochs=0.01", "stages.pretrain.max_steps=1"),
        tmp_path / "run",
    )
    assert [row["samples"] for row in metrics(done.metrics("finetune"))] == [1]


def test_weights_stay_float32_under_bfloat16(
    tiny_run_recipe: Callable, tmp_path: Path, weights: Callable, metrics: Callable
) -> None:
    done = train(
        tiny_run_recipe(
            "precision=bfloat16", "stages.pretrain.max_steps=1", "stages.finetune.max_steps=2"
        ),
        tmp_path / "run",
    )
    assert {weight.dtype for weight in weights(done.final_checkpoint()).values()} == {torch.float32}
    assert metrics(done.metrics("finetune"))[0]["loss"] > 0


def test_a_folder_that_cannot_be_written_to_is_said_at_once(
    tmp_path: Path, tiny_run_recipe: Callable
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError,
        match=r"file/run cannot be written to \(Not a directory\): "
        r"choose another -o, or get the right",
    ):
        train(tiny_run_recipe("model.vision_tower=nothing/there"), tmp_path / "file" / "run")


def test_a_package_that_is_not_installed_is_named_before_the_run_begins(
    tiny_run_recipe: Callable, tmp_path: Path
) -> None:
    missing = next((name for name in ("wandb", "trackio") if not _installed(name)), None)
    if missing is None:
        pytest.skip("all trackers are installed")
    message = (
        rf'tracking with {missing} needs the Python package .*pip install "mipha-vlm\[{missing}\]'
    )
    with pytest.raises(ModuleNotFoundError, match=message):
        train(tiny_run_recipe(), tmp_path / "run", track=[missing])
    assert not (tmp_path / "run").exists()


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_a_run_goes_on_with_the_commit_that_it_began_with() -> None:
    moving, fixed = "hf://datasets/a/moving", "hf://datasets/a/other"
    began = {moving: "a" * 40}
    data = DataRecipe(dataset="hub", root=moving, revision="main")
    assert pin(data, began).revision == "a" * 40
    assert pin(data, {}) == data
    assert pin(DataRecipe(dataset="hub", root=fixed), began).revision is None
