"""The training benchmark at a tiny size.

Every way has the same losses on the same samples, and computes the positions that its name implies.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import against_trainer
import pytest
from harness import Row
from training import (
    BASELINE,
    LEVERS,
    SHARING,
    difference,
    like_with_like,
    run_part,
    together,
    unequal,
)
from ways import STOCK_BFLOAT16, Outcome, Trial
from workloads import EASY_VQA, SHARED, SINGLE, small_parts

TINY = replace(SHARED, image_size=112, words=(1, 5), answer=(1, 3))
OPTIONS = {"batch_size": 8, "steps": 2, "repeats": 1}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_way_has_the_losses_of_the_baseline(stage: str, tmp_path: Path) -> None:
    trial = Trial(
        tmp_path, small_parts(tmp_path, TINY, width=64, depth=3), TINY, stage, num_steps=2
    )
    wanted = trial.run(BASELINE)
    assert wanted.losses[0] != wanted.losses[1] != wanted.losses[2]
    exact = [*LEVERS, SHARING, together("packed", bf16=False), together("shared-image", bf16=False)]
    for way in exact:
        assert difference(trial.run(way).losses, wanted.losses) < (1e-2 if way.bf16 else 1e-5), way

    for batching in ("packed", "shared-image"):
        found = trial.run(together(batching, bf16=True)).losses
        assert 0 < difference(found, wanted.losses) < 1e-2, "bfloat16 is near, and is not float32"
    assert trial.run(BASELINE).losses == wanted.losses, "every run starts from the same weights"


def test_positions_that_are_computed(tmp_path: Path) -> None:
    trial = Trial(
        tmp_path, small_parts(tmp_path, TINY, width=64, depth=3), TINY, "finetune", num_steps=1
    )
    (samples,) = trial.samples
    lengths = [len(sample) for sample in samples]
    prefix = samples[0].prefix
    assert prefix > TINY.image_tokens

    assert trial.run(BASELINE).num_positions == 8 * max(lengths)
    assert trial.run(LEVERS[0]).num_positions == 4 * max(lengths) + 4 * sorted(lengths)[3]
    assert (
        trial.run(together("packed", bf16=False)).num_positions == sum(lengths) == trial.num_tokens
    )
    assert (
        trial.run(together("shared-image", bf16=False)).num_positions == sum(lengths) - 7 * prefix
    )


@pytest.mark.weights
def test_easy_vqa_is_read_as_training_reads_it(tmp_path: Path) -> None:
    trial = Trial(
        tmp_path,
        small_parts(tmp_path, EASY_VQA, width=64, depth=3),
        EASY_VQA,
        "finetune",
        num_steps=1,
    )
    assert [sample.id.split("/")[0] for sample in trial.samples[0]] == ["easy_vqa"] * 16
    shared, stock = trial.run(SHARING), trial.run(BASELINE)
    assert difference(shared.losses, stock.losses) < 1e-5
    assert shared.num_positions < stock.num_positions / 1.2


def test_a_part_writes_its_report(tmp_path: Path) -> None:
    parts = small_parts(tmp_path, replace(SINGLE, batch_size=4), width=64, depth=3)
    assert run_part("levers", Namespace(**OPTIONS, out=tmp_path / "out"), parts)
    found = json.loads((tmp_path / "out" / "training-levers.json").read_text())
    assert [row["way"] for row in found["rows"]] == [BASELINE.name, *(way.name for way in LEVERS)]
    assert found["rows"][0]["ratio"] == 1 and all(row["rate"] > 0 for row in found["rows"])
    assert found["about"]["losses in float32 equal to 1e-3"] is True
    assert (tmp_path / "out" / "training-levers.md").is_file() and (
        tmp_path / "out" / "training-levers.png"
    ).is_file()


def test_a_loss_that_differs_is_named() -> None:
    ways = (BASELINE, SHARING, together("packed", bf16=True))
    outcomes = {way.name: Outcome(1.0, (5.0, 4.0), 10) for way in ways}
    assert unequal(ways, outcomes) == []
    outcomes[SHARING.name] = Outcome(1.0, (5.0, 4.005), 10)
    outcomes[ways[2].name] = Outcome(1.0, (5.0, 4.5), 10)  # bfloat16 may differ
    assert unequal(ways, outcomes) == [SHARING.name]


def test_the_trainer_of_transformers_trains_the_same_samples_in_the_same_steps(
    tmp_path: Path,
) -> None:
    parts = small_parts(tmp_path, SINGLE, width=64, depth=3)
    losses = against_trainer.measure(
        Namespace(**OPTIONS | {"batch_size": 4}, out=tmp_path / "out"), parts
    )
    assert len(losses["Trainer, float32"]) == 2
    assert difference(losses["mipha, float32"], losses["Trainer, float32"]) < 1e-5
    assert (tmp_path / "out" / "training-trainer.json").is_file()


def test_each_way_is_compared_with_the_stock_model_in_its_own_type() -> None:
    in_float32, in_bfloat16 = (together("packed", bf16=bf16) for bf16 in (False, True))
    ways = (BASELINE, STOCK_BFLOAT16, in_float32, in_bfloat16)
    rates = zip(ways, (1.0, 2.0, 1.5, 5.0), strict=True)
    rows = [Row("stage 2", way.name, rate, rate, rate, rate, "samples") for way, rate in rates]
    assert like_with_like(ways, rows) == {
        f"{in_float32.name}, against stock LLaVA": "1.50 times",
        f"{in_bfloat16.name}, against stock LLaVA, bfloat16": "2.50 times",
    }
