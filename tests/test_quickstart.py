"""The commands of the tour follow the recipe's stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.quickstart import Phase, phases
from mipha.recipe import load_recipe


def test_the_model_is_asked_before_and_after_its_last_stage() -> None:
    found = {phase.name: phase.command for phase in phases(Path("out"), ["seed=3"], 50, True)}
    assert list(found) == [
        "train",
        "evaluate",
        "evaluate before finetune",
        "train blind",
        "evaluate blind",
    ]
    assert found["train"] == (
        *("train", "quickstart", "-o", "out", "seed=3"),
        *("stages.pretrain.held_out=0.005", "stages.finetune.held_out=0.005"),
        "stages.finetune.validate_every=30",
    )
    before = found["evaluate before finetune"]
    assert before[1] == "out/pretrain/checkpoint" and before[-1] == "out/before-finetune"
    assert before[before.index("--limit") + 1] == "50"


def test_a_tour_of_one_stage_has_nothing_before_it() -> None:
    stage = load_recipe("quickstart").stages["finetune"].model_dump(mode="json")
    alone = f"stages={json.dumps({'finetune': stage})}"
    assert not any("before" in phase.name for phase in phases(Path("out"), [alone], None, True))


def test_what_the_user_holds_out_stays() -> None:
    train = phases(Path("out"), ["stages.finetune.held_out=0.1"], None)[0].command
    assert train[4:] == ("stages.finetune.held_out=0.1", "stages.pretrain.held_out=0.005")


def test_baselines_are_measured_on_request_only() -> None:
    assert [phase.name for phase in phases(Path("out"), [], None)] == ["train", "evaluate"]


def test_a_phase_shows_the_command_that_it_runs() -> None:
    alone, shared = Phase("train", ("train", "a b")), Phase("evaluate", ("evaluate", "run"), 2)
    assert alone.shown == "mipha train 'a b'"
    assert alone.arguments[1:] == ["-m", "mipha", "train", "a b"]
    assert shared.shown == "torchrun --standalone --nproc-per-node 2 -m mipha evaluate run"
    assert shared.arguments[-7:] == shared.shown.split()[1:]


def test_a_wrong_override_is_said_before_the_first_command() -> None:
    with pytest.raises(ValueError, match="no stage 'fintune': did you mean finetune"):
        phases(Path("out"), ["stages.fintune.epochs=1"], None)
