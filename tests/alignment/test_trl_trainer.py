"""What the steps share: a killed step ends in the same weights; changed data are refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from safetensors.torch import load_file

from mipha.alignment.dpo import dpo
from mipha.alignment.preference import train_cost, train_reward
from mipha.alignment.recipe import StepRecipe
from mipha.alignment.sft import sft
from mipha.alignment.step import Step
from mipha.alignment.trl_trainer import StepRecorder
from mipha.engine.states import newest_state, seal_state
from mipha.files import read_lines
from mipha.processes import hold_folder


@pytest.mark.parametrize(
    ("step", "overrides", "family"),
    [
        ("sft", ("max_tokens=64", "micro_batch=1"), "phi"),
        ("reward", ("tuning=lora", "lora.rank=4"), "llama"),
        ("cost", (), "llama"),
        ("dpo", (), "llama"),
    ],
)
def test_killed_in_the_midst_of_saving_it_ends_in_the_same_weights(
    step: str,
    overrides: tuple[str, ...],
    family: str,
    finished: Callable[..., Path],
    step_recipe: Callable[..., StepRecipe],
    kill_mid_save: Callable[[StepRecipe, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Phi has dropout, so that what is drawn counts too.
    recipe, out = step_recipe(step, *overrides, family=family), tmp_path / "run"
    kill_mid_save(recipe, out)
    left = out / "checkpoints" / "checkpoint-4"
    assert (
        left.is_dir() and not (left / "optimizer.pt").exists() and not Step(recipe, out).is_finished
    )

    function = {"sft": sft, "reward": train_reward, "cost": train_cost, "dpo": dpo}[step]
    with monkeypatch.context() as patch:  # and once more, between the last step and the result

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(f"{function.__module__}.export", stop)
        with pytest.raises(KeyboardInterrupt):
            function(recipe, out)
    assert not Step(recipe, out).is_finished
    model = function(recipe, out)

    whole = finished(step, *overrides, family=family)
    ours, theirs = (
        load_file(model / "model.safetensors"),
        load_file(whole / "model" / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    drawn = [
        [(row["step"], row.get("loss")) for row in read_lines(folder / "metrics.jsonl")]
        for folder in (out, whole)
    ]
    assert drawn[0] == drawn[1]
    assert not (out / "checkpoints").exists()


def test_a_finished_step_is_not_done_again_and_another_recipe_is_refused(
    finished: Callable[..., Path], step_recipe: Callable[..., StepRecipe]
) -> None:
    out = finished("sft")
    (out / "checkpoints").mkdir()  # left by a kill between the result and the clearing up
    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    assert sft(step_recipe("sft", "name=other"), out) == out / "model"
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert not (out / "checkpoints").exists()
    with pytest.raises(
        ValueError,
        match=r"holds an alignment step of another recipe \(learning_rate is 0.005 there and "
        r"0.0001 here; seed is 0 there and 1 here\): choose another -o",
    ):
        sft(step_recipe("sft", "seed=1", "learning_rate=1e-4"), out)


@pytest.mark.parametrize("changed", ["base model", "data"])
def test_states_of_another_base_or_of_other_data_are_refused(
    changed: str, step_recipe: Callable[..., StepRecipe], tmp_path: Path
) -> None:
    recipe, out = step_recipe("cost"), tmp_path / "run"
    out.mkdir()
    (out / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    (out / "checkpoints").mkdir()
    (out / "provenance.json").write_text(json.dumps({changed: {"sha256": "0"}}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"the {changed} changed since .* choose another -o"):
        train_cost(recipe, out)


def test_a_folder_of_something_else_is_not_touched(
    step_recipe: Callable[..., StepRecipe], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty and not an alignment step"):
        sft(step_recipe("sft"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_step_that_is_not_finite_stops_and_keeps_its_states(
    step_recipe: Callable[..., StepRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mipha.alignment import preference

    calls = []

    def explode(higher: torch.Tensor, lower: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(1)
        return (higher - lower).mean() * (
            float("nan") if len(calls) > 6 else 1.0
        )  # two forward passes a step: in step 4

    monkeypatch.setattr(preference, "pair_loss", explode)
    with pytest.raises(FloatingPointError, match="step 4: the loss is nan"):
        train_reward(step_recipe("reward"), tmp_path / "run")
    state = newest_state(tmp_path / "run" / "checkpoints")
    assert state is not None and state.name == "checkpoint-2"
    assert all(
        weight.isfinite().all() for weight in load_file(state / "model.safetensors").values()
    )


def test_bfloat16_trains_where_it_is_asked_for(
    step_recipe: Callable[..., StepRecipe], tmp_path: Path
) -> None:
    model = sft(
        step_recipe("sft", "precision=bfloat16", "max_steps=1", "held_out=0"), tmp_path / "run"
    )
    assert {weight.dtype for weight in load_file(model / "model.safetensors").values()} == {
        torch.float32
    }  # only products are rounded


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_a_state_of_a_stranger_runs_no_code(
    step_recipe: Callable[..., StepRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = step_recipe("sft", "checkpoint_every=1", "max_steps=2", "held_out=0")
    mark, out = tmp_path / "mark", tmp_path / "run"

    # Stop behind the first state.
    def stop(*_: Any, **__: Any) -> None:
        on_save(*_, **__)
        raise KeyboardInterrupt

    on_save = StepRecorder.on_save
    with monkeypatch.context() as patch:
        patch.setattr(StepRecorder, "on_save", stop)
        with pytest.raises(KeyboardInterrupt):
            sft(recipe, out)

    # Replace each file that transformers pickles, one at a time.
    state = out / "checkpoints" / "checkpoint-1"
    pickled = [path for path in state.iterdir() if path.suffix in {".pt", ".pth", ".bin"}]
    assert {path.name for path in pickled} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for path in pickled:
        content = path.read_bytes()
        path.write_bytes(pickle.dumps(Evil(mark)))
        (state / "manifest.json").unlink()
        seal_state(state)
        with monkeypatch.context() as patch:
            patch.setattr(StepRecorder, "on_log", lambda *_, **__: 1 / 0)
            with pytest.raises((ValueError, ZeroDivisionError)) as refused:
                sft(recipe, out)
        assert not mark.exists(), path.name
        if path.name != "training_args.bin":  # which is not read
            assert "code in it is never run" in str(refused.value), path.name
        path.write_bytes(content)


def test_a_step_that_another_process_trains_is_refused(
    step_recipe: Callable[..., StepRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mipha.processes.PATIENCE", 0.0)
    recipe = step_recipe("sft")
    for train in (sft, train_reward):
        with (
            hold_folder(tmp_path / "run"),
            pytest.raises(ValueError, match=r"run is in use by another process \(process \d+ on"),
        ):
            train(step_recipe("reward") if train is train_reward else recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
