"""Which samples an epoch shows, in which order, and in how many steps: pure functions of numbers.

Training, its plan and the data check all count and order with these:

    samples_shown   weight and cap of a data set -> samples of it in one epoch
    draw_samples    which ones they are
    epoch_order     the samples of all data sets -> the order of one epoch
    window_order    the samples of one data set that is read in blocks -> its order, in windows
    merge_orders    orders of several data sets -> the order of one epoch
    count_steps     samples of an epoch -> optimizer steps of the stage
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import ceil

import numpy as np

from mipha.recipe import StageRecipe


def samples_shown(size: int, weight: float = 1.0, cap: int | None = None) -> int:
    """Return how many samples of a data set one epoch shows; some may be shown twice.

    Args:
        size: Samples of the data set.
        weight: Times that an epoch shows each, on average.
        cap: Most samples of an epoch.
    """
    shown = max(round(weight * size), 1) if size else 0
    return min(shown, cap or shown)


def count_steps(stage: StageRecipe, num_per_epoch: int) -> tuple[int, int]:
    """Return the optimizer steps of a stage, and the samples that they read.

    Args:
        num_per_epoch: Samples that one epoch shows, all data sets together.
    """
    total = max(round(stage.epochs * num_per_epoch), 1)
    steps = min(ceil(total / stage.batch_size), stage.max_steps or total)
    return steps, min(steps * stage.batch_size, total)


def draw_samples(size: int, wanted: int, seed: int, epoch: int, source: int) -> np.ndarray:
    """Return which samples of a data set an epoch shows.

    A data set whose weight is not a whole number, or that is capped, is dealt out like a pack of
    cards that is shuffled anew whenever it is used up: no sample is shown again before all others
    were.

    Args:
        size: Samples of the data set.
        wanted: Samples that an epoch shows.
        source: Number of the data set in its mixture; data sets are drawn from independently.

    Returns:
        `(wanted,)` numbers below `size`.
    """
    if wanted % size == 0:
        return np.tile(np.arange(size), wanted // size)

    # The epoch's part of endlessly many shuffled packs, laid one behind another.
    first = epoch * wanted
    packs = range(first // size, -(-(first + wanted) // size))
    # The counter's last word keeps these draws apart from those that shuffle the whole.
    streams = (np.random.Philox(key=[seed, pack], counter=[0, 0, 0, source + 1]) for pack in packs)
    laid = np.concatenate([np.random.Generator(stream).permutation(size) for stream in streams])
    return laid[first - packs[0] * size :][:wanted]


def epoch_order(
    shown: np.ndarray,
    seed: int,
    epoch: int,
    image_keys: np.ndarray | None = None,
    bundle: int | None = None,
    by_modality: int | None = None,
) -> np.ndarray:
    """Return the order of one epoch: a function of its arguments alone.

    Args:
        shown: `(samples,)` indices of the samples that the epoch shows.
        image_keys: `(all samples,)` integers: equal where samples show the same images, 0 for text
            alone. Needed with `bundle` and `by_modality`.
        bundle: None shuffles samples. A number keeps that many samples of one image side by side
            (in a new choice every epoch) and shuffles those bundles: shared-image batching then
            finds them in one step.
        by_modality: Samples of a step: steps of samples with images, and steps of text alone, in
            random order. The remainders of both are mixed.

    Returns:
        `(samples,)` indices: `shown`, in order.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    shuffled = shown[random.permutation(len(shown))]

    if by_modality is not None:
        assert image_keys is not None
        return _order_by_modality(shuffled, image_keys[shuffled] != 0, by_modality, epoch, random)
    if bundle is None:
        return shuffled

    # Samples of one image, in the order of the shuffle; a sample without an image is by itself.
    assert image_keys is not None
    by_image: dict[int, list[int]] = {}
    for index in shuffled.tolist():
        by_image.setdefault(int(image_keys[index]) or -1 - index, []).append(index)

    bundles = [
        members[start : start + bundle]
        for members in by_image.values()
        for start in range(0, len(members), bundle)
    ]
    random.shuffle(bundles)
    return np.fromiter(chain.from_iterable(bundles), dtype=np.int64, count=len(shuffled))


def window_order(
    shown: np.ndarray, blocks: np.ndarray, window_rows: int, seed: int, epoch: int, source: int
) -> np.ndarray:
    """Return the order of a data set that is read in blocks: windows of blocks, shuffled.

    The blocks are shuffled, and laid one behind another; the samples of a window, which are those
    of the blocks that begin in it, are shuffled among themselves. So a block is read in one window
    only, and a window takes no longer to find than the epoch.

    Args:
        shown: `(samples,)` indices of the samples that the epoch shows.
        blocks: `(samples,)` number of the block that each of them lies in.
        window_rows: Samples of a window, more or less.
        source: Number of the data set in its mixture; data sets are shuffled independently.

    Returns:
        `(samples,)` indices: `shown`, in order.
    """
    _, block, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
    laid = _random(seed, epoch, 1, source).permutation(len(sizes))
    begins = np.empty(len(sizes), dtype=np.int64)
    begins[laid] = np.cumsum(sizes[laid]) - sizes[laid]  # first place of each block

    within = _random(seed, epoch, 2, source).random(len(shown))
    return shown[np.lexsort((within, (begins // window_rows)[block]))]


def merge_orders(orders: Sequence[np.ndarray], seed: int, epoch: int) -> np.ndarray:
    """Return several orders as one: each keeps its own, and all are spread evenly."""
    places = [
        np.sort(_random(seed, epoch, 3, source).random(len(order)))
        for source, order in enumerate(orders)
    ]
    return np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")]


def shuffled_order(shown: np.ndarray, seed: int, epoch: int, source: int) -> np.ndarray:
    """Return the samples of one data set in any order, as `window_order` of a single window."""
    return shown[_random(seed, epoch, 2, source).permutation(len(shown))]


def _random(seed: int, epoch: int, purpose: int, source: int) -> np.random.Generator:
    # The counter's upper words keep these draws apart from one another and from all others.
    stream = np.random.Philox(key=[seed, epoch], counter=[0, 0, purpose, source + 1])
    return np.random.Generator(stream)


def _order_by_modality(
    shuffled: np.ndarray,
    has_image: np.ndarray,
    step_size: int,
    epoch: int,
    random: np.random.Generator,
) -> np.ndarray:
    """Return whole steps of one modality each, in random order, with the remainders at the ends.

    Args:
        shuffled: `(samples,)` indices.
        has_image: `(samples,)` booleans.
        step_size: Samples of a step.

    Source: LLaVA's `group_by_modality_length`, whose "megabatch" is what all processes read in one
    optimizer step. LLaVA also sorts by length within it; here `make_rows` does that for every step.
    """
    steps, left = [], []
    for group in (shuffled[has_image], shuffled[~has_image]):
        whole = len(group) // step_size * step_size
        steps += list(group[:whole].reshape(-1, step_size))
        left.append(group[whole:])
    random.shuffle(steps)

    # The epoch before may end within a step. The samples that complete that step come first, so
    # that all other steps begin with one of these.
    missing = -epoch * len(shuffled) % step_size
    while steps and sum(map(len, left)) < missing:
        left.append(steps.pop())
    rest = random.permutation(np.concatenate(left))
    return np.concatenate([rest[:missing], *steps, rest[missing:]])
