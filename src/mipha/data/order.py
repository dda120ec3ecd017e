"""The order in which training reads the samples of a mixture."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mipha.data.mixture import Mixture


def epoch_order(
    mixture: Mixture,
    seed: int,
    epoch: int,
    samples_per_image: int | None = None,
    by_modality: int | None = None,
) -> np.ndarray:
    """The order of one epoch: a pure function of seed and epoch, whatever ran before and on how many processes.

    Args:
        samples_per_image: Null shuffles samples. A number keeps that many samples of one image side by side (in a new
            choice every epoch) and shuffles those bundles: shared-image batching then finds them in one step.
        by_modality: A step's samples: steps of samples with images, and steps of text alone, in random order. What is left over of
            both is mixed.

    Returns:
        `(mixture.num_per_epoch,)` indices.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    shown = mixture.epoch_samples(seed, epoch)
    shuffled = shown[random.permutation(len(shown))]
    if by_modality is not None:
        return _by_modality(shuffled, mixture.image_keys[shuffled] != 0, by_modality, epoch, random)
    if samples_per_image is None:
        return shuffled
    by_image: dict[int, list[int]] = {}
    keys = mixture.image_keys
    for index in shuffled.tolist():
        by_image.setdefault(int(keys[index]) or -1 - index, []).append(index)
    bundles = [
        members[start : start + samples_per_image]
        for members in by_image.values()
        for start in range(0, len(members), samples_per_image)
    ]
    random.shuffle(bundles)
    return np.fromiter(chain.from_iterable(bundles), dtype=np.int64, count=len(shuffled))


def _by_modality(
    shuffled: np.ndarray, shows: np.ndarray, size: int, epoch: int, random: np.random.Generator
) -> np.ndarray:
    """Whole steps of one modality each, in random order; what is left over of both lies where steps are cut by an epoch's end.

    Args:
        shuffled: `(samples,)`.
        shows: `(samples,)`, whether a sample has images.
        size: Samples of a step.

    Source: LLaVA's `group_by_modality_length`, whose "megabatch" is what all processes read in one optimizer step. That it sorts by
    length within it, `make_rows` does for every step.
    """
    steps, left = [], []
    for group in (shuffled[shows], shuffled[~shows]):
        whole = len(group) // size * size
        steps += list(group[:whole].reshape(-1, size))
        left.append(group[whole:])
    random.shuffle(steps)
    # The epoch before may end within a step: what completes it comes first, so that all other steps begin with one of these.
    missing = -epoch * len(shuffled) % size
    while steps and sum(map(len, left)) < missing:
        left.append(steps.pop())
    rest = random.permutation(np.concatenate(left))
    return np.concatenate([rest[:missing], *steps, rest[missing:]])


def dealt(size: int, wanted: int, seed: int, epoch: int, source: int) -> np.ndarray:
    """`(wanted,)` numbers below `size`: the epoch's part of endlessly many shuffled packs, laid one behind another."""
    if wanted % size == 0:
        return np.tile(np.arange(size), wanted // size)
    first = epoch * wanted
    packs = range(first // size, -(-(first + wanted) // size))
    # The counter's last word keeps these draws apart from those that shuffle the whole.
    streams = (np.random.Philox(key=[seed, pack], counter=[0, 0, 0, source + 1]) for pack in packs)
    laid = np.concatenate([np.random.Generator(stream).permutation(size) for stream in streams])
    return laid[first - packs[0] * size :][:wanted]
