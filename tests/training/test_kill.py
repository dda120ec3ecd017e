"""After `kill -9` at any moment, a resumed run ends in the weights of an undisturbed one."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mipha.recipe import Recipe
from mipha.run import Run
from mipha.training.pipeline import train

STAGES = ("pretrain", "finetune")

LONG = ("stages.finetune.max_steps=12", "stages.finetune.epochs=3", "stages.pretrain.max_steps=3")
TIMED = {
    "seconds",
    "data_wait_seconds",
    "samples_per_second",
    "images_per_second",
    "tokens_per_second",
    "peak_memory_gib",
}


@pytest.fixture(scope="module")
def uninterrupted(tiny_run_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Phi here has dropout, so that a resumed run must draw what it would have drawn."""
    return train(
        tiny_run_recipe(*LONG, family="phi"), tmp_path_factory.mktemp("uninterrupted") / "run"
    )


def killed_at(recipe: Recipe, folder: Path, moment: Callable[[], bool], delay: float) -> bool:
    """Train in another process and kill it after a moment; return whether it was still at work.

    Args:
        moment: Condition that the kill waits for.
        delay: Seconds between the moment and the kill.
    """
    # The same as `mipha train`, except for the time to start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mipha.training.pipeline"])
    process = context.Process(target=train, args=(recipe, folder))
    process.start()
    while process.is_alive() and not moment():
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def is_behind(run: Run, stage: str, lines: int) -> bool:
    """Return whether the stage has more lines of metrics than that, or is finished."""
    return num_lines(run.metrics(stage)) > lines or run.is_finished(stage)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same(run: Run, other: Run, weights: Callable, metrics: Callable) -> None:
    for stage in STAGES:
        mine, theirs = weights(run.checkpoint(stage)), weights(other.checkpoint(stage))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), stage
        rows, others = (
            [{k: v for k, v in row.items() if k not in TIMED} for row in metrics(r.metrics(stage))]
            for r in (run, other)
        )
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert rows == others
    assert not any(run.folder.rglob("*.partial"))
    assert not any(run.states(stage).exists() for stage in STAGES)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_in_the_same_weights(
    kills: int,
    asynchronous: bool,
    uninterrupted: Run,
    tmp_path: Path,
    weights: Callable,
    metrics: Callable,
) -> None:
    """Every third kill comes while a state is written, the others at random moments."""
    recipe = uninterrupted.recipe.override(f"async_checkpoints={str(asynchronous).lower()}")
    chance, landed, number = random.Random(kills), 0, 0
    run = Run(tmp_path / "0")
    while landed < kills:
        number += 1
        assert number < 3 * kills, "too few of the kills came before the end"
        if run.is_finished("finetune"):  # and one more run to kill
            assert_same(train(recipe, run.folder), uninterrupted, weights, metrics)
            run = Run(tmp_path / str(number))
        stage = "finetune" if run.is_finished("pretrain") else "pretrain"
        before, states = num_lines(run.metrics(stage)), run.states(stage)
        if number % 3 == 0:
            landed += killed_at(
                recipe,
                run.folder,
                lambda states=states: any(states.glob(".step-*.partial")),
                0.003 * chance.random(),
            )
        else:
            lines = before + chance.randrange(4)
            landed += killed_at(
                recipe,
                run.folder,
                lambda run=run, stage=stage, lines=lines: is_behind(run, stage, lines),
                0.04 * chance.random(),
            )
    assert_same(train(recipe, run.folder), uninterrupted, weights, metrics)


def test_a_killed_run_with_adapters_ends_in_the_same_weights(
    tiny_run_recipe: Callable, tmp_path: Path, weights: Callable, metrics: Callable
) -> None:
    lora = ("language_model=lora", "vision_tower=last-1", "lora.rank=4")
    recipe = tiny_run_recipe(
        "stages.pretrain.tuning.language_model=lora",
        *(f"stages.finetune.tuning.{change}" for change in lora),
    )
    run, whole = Run(tmp_path / "run"), train(recipe, tmp_path / "whole")
    moments = (("pretrain", 1), ("finetune", 1), ("finetune", 4))
    killed = [
        killed_at(recipe, run.folder, lambda s=s, n=n: num_lines(run.metrics(s)) >= n, 0.0)
        for s, n in moments
    ]
    assert sum(killed) >= 2, "too few of the kills came before the end"
    assert_same(train(recipe, run.folder), whole, weights, metrics)
    for stage in STAGES:
        mine, theirs = (
            load_file(done.stage(stage) / "adapter" / "adapter_model.safetensors")
            for done in (run, whole)
        )
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), stage
        assert (run.stage(stage) / "tuning.json").read_text() == (
            whole.stage(stage) / "tuning.json"
        ).read_text()
