"""A plan follows from recipe and device, and names the changes that make a stage fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mipha.catalog.published_data import PUBLISHED_DATA
from mipha.files import append_line
from mipha.planning.plan import Device, compare_with_run, device_named, plan_training
from mipha.planning.tables import as_json, print_plan
from mipha.recipe import load_recipe
from mipha.run import create_run

SMALL = Device("small", "cpu", 1e11, 8e9, autocast=False)


def test_the_papers_model_on_what_the_paper_had() -> None:
    """Eight GPUs of 80 GB, data that are not on this machine."""
    pretrain, finetune = plan_training(
        load_recipe("mipha-3b-base"), device_named("a100"), num_devices=8
    )
    assert (pretrain.samples, finetune.samples) == (558_128, 665_298)
    assert pretrain.steps == -(-558_128 // 256) and finetune.steps == -(-2 * 665_298 // 128)
    assert (
        not pretrain.fixes
        and not finetune.fixes
        and finetune.largest_rows >= finetune.stage.micro_batch_rows
    )
    # Forward of projector, layers and head: 2 x (729 x 9.5 M + 764 x 2.65 G + 25 x 131 M). Twice
    # that with the gradients of activations, and 0.6 for the tower: about 9 TFLOP a sample.
    assert pretrain.flops / 256 == pytest.approx(8.9e12, rel=0.05)
    assert finetune.seconds is not None and finetune.hours is not None
    assert finetune.hours * 60 * 60 == pytest.approx(finetune.steps * finetune.seconds)
    assert 2 < finetune.hours < 24
    assert "assumed" in finetune.step.source


def test_a_model_of_tiles_on_published_data() -> None:
    """Of each picture, 2 x 2 tiles and the whole, 64 tokens each."""
    plans = plan_training(load_recipe("mipha-2026-small"), device_named("h100"), num_devices=8)
    assert [plan.samples for plan in plans] == [558_128, 665_298]
    assert plans[0].step.work.images == 5 * 256
    assert plans[0].step.work.tokens == 256 * (5 * 64 + 35)
    assert not any(plan.fixes for plan in plans)


def test_where_it_does_not_fit_the_plan_says_what_would(tiny_parts, tiny_data) -> None:
    recipe = _tiny(tiny_parts, tiny_data)
    for value in ("selective", "true"):  # the one that costs less time first
        change = f"stages.finetune.activation_checkpointing={value}"
        _, enough = plan_training(recipe.override(change), SMALL)
        tight = replace(SMALL, memory=1.0001 * enough.total_memory / 0.9)
        _, finetune = plan_training(recipe, tight)
        assert finetune.fixes == (change,)
        assert finetune.largest_rows < finetune.step.widest.rows
        _, fixed = plan_training(recipe.override(change), tight)
        assert not fixed.fixes and fixed.total_memory < finetune.total_memory
    _, hopeless = plan_training(recipe, replace(SMALL, memory=1e6))
    assert hopeless.largest_rows == 0 and hopeless.fixes == (
        "more than 1 devices, or devices with more memory",
    )


def test_more_devices_take_less_memory_each_and_less_time(tiny_parts, tiny_data) -> None:
    recipe = _tiny(tiny_parts, tiny_data)
    spread = recipe.override("sharding=fsdp")
    one, two = (plan_training(spread, SMALL, number)[1] for number in (1, 2))
    assert two.memory["optimizer"] == one.memory["optimizer"] / 2
    assert two.seconds is not None and two.seconds < one.seconds


def test_a_plan_for_several_devices_chooses_the_sharding_of_training(
    tiny_parts, tiny_data, capsys
) -> None:
    recipe = _tiny(tiny_parts, tiny_data)
    one = plan_training(recipe, SMALL)[1]
    roomy = plan_training(recipe, SMALL, 2)
    assert [stage.sharding for stage in roomy] == ["ddp", "ddp"]
    assert roomy[1].memory["optimizer"] == one.memory["optimizer"]
    tight = replace(SMALL, memory=roomy[0].total_memory)  # and a tenth of it is reserve
    assert [stage.sharding for stage in plan_training(recipe, tight, 2)] == ["fsdp", "fsdp"]

    print_plan(recipe.name, roomy, SMALL, 2, None, ())
    print_plan(recipe.name, [one], SMALL, 1, None, ())
    assert capsys.readouterr().out.count("sharding") == 1
    tree = as_json(roomy, SMALL, 2, None, ())["stages"]
    assert [stage["sharding"] for stage in tree] == ["ddp", "ddp"]


def test_a_plan_of_data_that_are_here_reads_its_first_steps(tiny_parts, tiny_data) -> None:
    recipe = _tiny(tiny_parts, tiny_data)
    pretrain, _ = plan_training(recipe, SMALL)
    assert (
        pretrain.samples == 24 and pretrain.steps == 6 and "first 3 steps" in pretrain.step.source
    )
    assert pretrain.seconds is not None and pretrain.step.work.tokens > 4 * 10


def test_a_plan_is_compared_with_a_run(tiny_parts, tiny_data, tmp_path) -> None:
    recipe = _tiny(tiny_parts, tiny_data)
    (pretrain, _), run = plan_training(recipe, SMALL), create_run(tmp_path / "run", recipe)
    with pytest.raises(FileNotFoundError, match="has no metrics of pretrain"):
        compare_with_run(pretrain, run, SMALL, 1)
    append_line(run.metrics("pretrain"), {"seconds": 100.0, "peak_memory_gib": 1.5})
    with pytest.raises(ValueError, match="trained one step of pretrain, and the first only warms"):
        compare_with_run(pretrain, run, SMALL, 1)
    for seconds in (2.0, 2.0):
        append_line(run.metrics("pretrain"), {"seconds": seconds, "peak_memory_gib": 1.5})
    found = compare_with_run(pretrain, run, SMALL, 1)
    assert found.seconds[1] == 2.0 and found.memory[1] == 1.5 * 2**30
    assert found.efficiency == pytest.approx(pretrain.flops / 2.0 / 1e11)


@pytest.mark.parametrize(("efficiency", "assumed"), [(None, True), (0.25, False)])
def test_a_share_of_the_peak_that_nobody_measured_is_called_assumed(
    efficiency: float | None, assumed: bool, tiny_parts, tiny_data, capsys
) -> None:
    recipe = _tiny(tiny_parts, tiny_data)
    plans = plan_training(recipe, SMALL, efficiency=efficiency)
    print_plan(recipe.name, plans, SMALL, 1, None, ())
    assert ("assumed" in capsys.readouterr().out) == assumed
    tree = as_json(plans, SMALL, 1, None, ())["stages"][0]
    assert (tree["efficiency"], tree["efficiency_is_assumed"]) == (efficiency or 0.5, assumed)


@pytest.mark.parametrize(
    ("name", "precision", "sentence"),
    [
        ("h10", "auto", "no device 'h10': did you mean h100"),
        ("cuda", "auto", "no device 'cuda': give its model: cpu, b200"),
        ("t4", "bfloat16", "t4 does not compute in bfloat16: set precision=float32"),
    ],
)
def test_a_device_that_cannot_be(name: str, precision: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        device_named(name, precision)


def test_published_sizes_are_those_of_the_paper() -> None:
    """Table 2: 558K and 665K."""
    assert {name: round(fact.samples / 1000) for name, fact in PUBLISHED_DATA.items()} == {
        "llava_pretrain": 558,
        "llava_instruct": 665,
    }


def _tiny(tiny_parts, tiny_data):
    parts = tiny_parts()
    base = load_recipe("quickstart").override(
        f"data.pretrain={tiny_data}", f"data.finetune={tiny_data}", "precision=float32"
    )
    model = {
        "vision_tower": str(parts.vision_tower),
        "language_model": str(parts.language_model),
        "chat_template": "chatml",
    }
    stages = ("pretrain", "finetune")
    small = [
        f"stages.{name}.{value}"
        for name in stages
        for value in (
            *("max_steps=null", "batch_size=4"),
            *("batching=packed", "row_tokens=256", "micro_batch_rows=1"),
        )
    ]
    return base.override(
        f"model={json.dumps(model)}",
        *small,
        "stages.finetune.samples_per_image=null",
        "stages.finetune.tuning={vision_tower: frozen, projector: full, language_model: full}",
    )
