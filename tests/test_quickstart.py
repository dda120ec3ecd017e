"""The commands of the tour follow the recipe's stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.quickstart import phases
from mipha.recipe import load_recipe


def test_the_model_is_asked_before_and_after_its_last_stage() -> None:
    found = {phase.name: phase.command for phase in phases(Path("out"), ["seed=3"], 50)}
    assert list(found) == [
        "train",
        "evaluate",
        "evaluate before finetune",
        "train blind",
        "evaluate blind",
    ]
    assert found["train"] == ("train", "quickstart", "-o", "out", "seed=3")
    before = found["evaluate before finetune"]
    assert before[1] == "out/pretrain/checkpoint" and before[-1] == "out/before-finetune"
    assert before[before.index("--limit") + 1] == "50"


def test_a_tour_of_one_stage_has_nothing_before_it() -> None:
    stage = load_recipe("quickstart").stages["finetune"].model_dump(mode="json")
    alone = f"stages={json.dumps({'finetune': stage})}"
    assert not any("before" in phase.name for phase in phases(Path("out"), [alone], None))


def test_a_wrong_override_is_said_before_the_first_command() -> None:
    with pytest.raises(ValueError, match="no stage 'fintune': did you mean finetune"):
        phases(Path("out"), ["stages.fintune.epochs=1"], None)
