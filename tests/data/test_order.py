"""An order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from mipha.data.mixture import Mixture

IMAGES = [f"{number % 4}.png" if number % 5 else None for number in range(40)]


@pytest.mark.parametrize("bundle", [None, 3])
def test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch(
    write: Callable, bundle: int | None
) -> None:
    mixture = Mixture([write("a", IMAGES)])
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            orders[seed, epoch] = mixture.epoch_order(seed, epoch, bundle).tolist()
            assert sorted(orders[seed, epoch]) == list(range(40))
    assert len({tuple(order) for order in orders.values()}) == 4
    np.random.seed(1)  # whatever ran before
    assert all(
        Mixture([write("a", IMAGES)]).epoch_order(*key, bundle).tolist() == order
        for key, order in orders.items()
    )


def test_bundles_stand_side_by_side(write: Callable) -> None:
    mixture = Mixture([write("a", IMAGES)])
    order = mixture.epoch_order(0, 0, 4)
    images = [mixture[int(index)].images for index in order]
    runs, counts = 0, {image: images.count(image) for image in set(images) if image}
    for before, image in pairwise([(), *images]):
        runs += bool(image) and image != before
    assert runs <= sum(-(-count // 4) for count in counts.values())
    shuffled = mixture.epoch_order(0, 0, None)
    assert (
        sum(mixture[int(a)].images == mixture[int(b)].images for a, b in pairwise(shuffled))
        < len(images) / 2
    )
    other = mixture.epoch_order(0, 1, 4)

    def bundles(order: np.ndarray) -> set[frozenset[int]]:
        return {frozenset(order[start : start + 4].tolist()) for start in range(0, 40)}

    assert bundles(order) != bundles(other), "which samples keep company is chosen anew each epoch"


@pytest.mark.parametrize(
    ("options", "times"),
    [({"weight": 0.3}, 3), ({"cap": 7}, 7), ({"weight": 1.5}, 15), ({"weight": 0.01}, 1)],
)
def test_no_sample_is_shown_again_before_all_others_were(
    write: Callable, options: dict, times: int
) -> None:
    mixture = Mixture([write("a", [None] * 10, **options), write("b", [None] * 10, **options)])
    shown = np.zeros(20, dtype=int)
    parts = set()
    for epoch in range(10):
        order = mixture.epoch_order(5, epoch, None)
        assert mixture.count_sources(order) == {"a.jsonl": times, "b.jsonl": times}
        shown += np.bincount(order, minlength=20)
        assert shown.max() - shown.min() <= 1
        parts.add(tuple(sorted(order)))
    assert (shown == times).all(), "ten epochs of a tenth each are a whole"
    assert len(parts) > 1
    first, second = (mixture.epoch_order(seed, 0, None) for seed in (5, 6))
    assert (mixture.epoch_order(5, 0, None) == first).all() and sorted(first) != sorted(second)
    own = [
        {int(index) % 10 for index in first if (index < 10) == is_first}
        for is_first in (True, False)
    ]
    assert times in (1, 15) or own[0] != own[1], "data sets are drawn from apart"


@pytest.mark.parametrize(
    ("with_image", "without"), [(23, 14), (16, 8), (9, 0), (0, 9), (3, 2), (5, 1)]
)
def test_grouped_by_modality_a_step_is_of_one_kind(
    write: Callable, with_image: int, without: int
) -> None:
    """Steps of 4: cut where training cuts them, over three epochs; only what is left over of both
    kinds is mixed.
    """
    mixture = Mixture([write("a", [f"{i % 2}.png" for i in range(with_image)] + [None] * without)])
    epochs = [mixture.epoch_order(7, epoch, by_modality=4) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(with_image + without)), "every sample once"
    steps = np.concatenate(epochs)[: 3 * len(mixture) // 4 * 4].reshape(-1, 4)
    shows = [
        bool(step)
        for step in (mixture.image_keys[steps] != 0).all(axis=1)
        | (mixture.image_keys[steps] == 0).all(axis=1)
    ]
    # Of an epoch, fewer than 4 of each kind are left over; what completes the step before may take
    # one step apart.
    assert shows.count(False) <= 3 * 3
    if not with_image or not without:
        assert all(shows)
    assert (mixture.epoch_order(7, 1, by_modality=4) == epochs[1]).all(), (
        "a function of seed and epoch"
    )
    if len(mixture) > 8:
        assert (mixture.epoch_order(8, 1, by_modality=4) != epochs[1]).any()
        assert (epochs[0] != epochs[1]).any()


def test_whole_steps_of_both_kinds_are_in_random_order(write: Callable) -> None:
    mixture = Mixture([write("a", ["0.png"] * 40 + [None] * 40)])
    order = mixture.epoch_order(0, 0, by_modality=4).reshape(-1, 4)
    kinds = (mixture.image_keys[order] != 0).sum(axis=1)
    assert set(kinds) == {0, 4} and list(kinds) not in (sorted(kinds), sorted(kinds)[::-1])
    assert len({tuple(step) for step in order}) == 20
