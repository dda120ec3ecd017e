"""The type that matrix products run in."""

from __future__ import annotations

import torch

from mipha.engine.precision import autocast, autocast_dtype

CPU = torch.device("cpu")


def test_precision_is_chosen_by_the_recipe_then_by_the_device() -> None:
    assert autocast_dtype("float32", CPU) is None
    assert autocast_dtype("bfloat16", CPU) is torch.bfloat16
    assert autocast_dtype("auto", CPU) in (None, torch.bfloat16)


def test_products_run_in_the_type_and_none_changes_nothing() -> None:
    one = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (one @ one).dtype is torch.bfloat16
    with autocast(CPU, None):
        assert (one @ one).dtype is torch.float32
