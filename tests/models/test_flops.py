"""FLOPs by the rule, by hand, and by torch's counter over a real forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mipha.models.build import skeleton
from mipha.models.flops import StepFlops, Unit, Work
from mipha.models.tuning import apply_tuning
from mipha.recipe import ModelRecipe, TuningRecipe

FULL = {"vision_tower": "full", "projector": "full", "language_model": "full"}
FROZEN = dict.fromkeys(FULL, "frozen")


def test_a_unit_costs_once_twice_or_three_times() -> None:
    """2 x 10 positions x 7 weights = 140; attention of width 3 over 20 pairs: 4 x 3 x 20 = 240."""
    frozen, passed, trained, half = (
        Unit("projector", "tokens", 7, trained, attention=3, reached=reached)
        for trained, reached in ((0, False), (0, True), (7, True), (3, True))
    )
    assert frozen.flops(10, 20) == (380, 380)
    assert passed.flops(10, 20) == (380, 2 * 140 + 3 * 240)
    assert trained.flops(10, 20) == (380, 3 * 140 + 3 * 240)
    assert half.flops(10, 20) == (380, 2 * 140 + 2 * 10 * 3 + 3 * 240)


def test_mipha_3b_by_hand() -> None:
    """SigLIP SO400M with 26 layers at 384 pixels, and Phi-2: 729 patches of 14 x 14 x 3 numbers."""
    model = skeleton(
        ModelRecipe(
            vision_tower="siglip-so400m-384", language_model="phi-2", chat_template="vicuna"
        )
    )
    model.requires_grad_(False)
    flops = StepFlops(model).by_part(Work(images=1, tokens=1000, pairs=500_500, supervised=200))
    layer = 4 * 1152**2 + 2 * 1152 * 4304
    tower = 2 * 729 * (588 * 1152 + 26 * layer) + 26 * 4 * 1152 * 729**2
    body = 32 * (2 * 1000 * (4 * 2560**2 + 2 * 2560 * 10240) + 4 * 2560 * 500_500)
    assert flops["vision_tower"].forward == flops["vision_tower"].total == tower
    assert flops["projector"].forward == 2 * 729 * (1152 * 2560 + 2560**2)
    assert flops["language_model"].forward == body + 2 * 200 * 2560 * 51200
    assert tower == pytest.approx(
        0.64e12, rel=0.02
    )  # what the tower takes of one image, 0.64 TFLOP


@pytest.mark.parametrize(
    ("family", "tower", "tuning"),
    [
        ("phi", "siglip", FULL),
        (
            "qwen2",
            "clip",
            FROZEN | {"projector": "full"},
        ),  # a tied head, shared key and value heads, a class token
        ("gpt_neox", "dinov2", FROZEN | {"projector": "full", "language_model": "full"}),
        ("llama", "siglip", FROZEN | {"language_model": "last-1"}),
    ],
)
def test_it_is_what_torch_counts(
    family: str, tower: str, tuning: dict, tiny_model: Callable
) -> None:
    model, processor = tiny_model(family, tower)
    apply_tuning(model, TuningRecipe(**tuning))
    model.set_attn_implementation("eager")  # whose products torch's counter sees, all pairs of them
    size, tokens = model.config.vision_config.image_size, 40
    ids = torch.full((1, tokens), 5)
    ids[0, : model.config.image_seq_length] = processor.image_token_id
    labels = ids.masked_fill(torch.arange(tokens) < 30, -100)
    with FlopCounterMode(display=False) as counter:
        outputs = model(
            input_ids=ids,
            pixel_values=torch.rand(1, 3, size, size),
            position_ids=torch.arange(tokens)[None],
            labels=labels,
        )
        forward = counter.get_total_flops()
        outputs.loss_sum.backward()
    head = 2 * 10 * model.lm_head.weight.numel()
    work = Work(images=1, tokens=tokens, pairs=tokens**2, supervised=10)
    mine = StepFlops(model).by_part(work)
    angles = (
        16 * tokens
    )  # of the rotary positions: a product too, of half a head's width, and once for all layers
    assert sum(part.forward for part in mine.values()) == pytest.approx(forward, abs=angles)
    # The head is computed again for its chunk. The first module needs no gradient of its input,
    # which torch leaves out.
    counted = counter.get_total_flops() - head
    total = sum(part.total for part in mine.values())
    first = next(unit for unit in StepFlops(model).units if unit.reached)
    assert counted <= total + angles
    assert total - counted <= first.flops(tokens, 0)[0] + angles


def test_adapters_are_counted_as_trained(tiny_model: Callable) -> None:
    model, _ = tiny_model()
    before = sum(unit.weights for unit in StepFlops(model).units)
    apply_tuning(
        model,
        TuningRecipe(
            vision_tower="frozen",
            projector="frozen",
            language_model="lora",
            lora={"rank": 2, "alpha": 4},
        ),
    )
    units = StepFlops(model).units
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert added and sum(unit.weights for unit in units) == before + added == before + sum(
        unit.trained for unit in units
    )
    assert [unit.reached for unit in units if unit.part != "language_model"] == [False] * (
        1 + 2 + 1
    )
    assert all(unit.reached for unit in units if unit.part == "language_model")


def test_a_frozen_stack_before_what_trains_is_not_reached(tiny_model: Callable) -> None:
    model, _ = tiny_model()
    apply_tuning(
        model, TuningRecipe(vision_tower="last-1", projector="frozen", language_model="frozen")
    )
    assert [unit.reached for unit in StepFlops(model).units] == [
        False,
        False,
        True,
        True,
        True,
        True,
        True,
    ]
    assert [unit.trained > 0 for unit in StepFlops(model).units] == [
        False,
        False,
        True,
        False,
        False,
        False,
        False,
    ]
