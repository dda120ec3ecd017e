"""Several data sets as one sequence of samples."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mipha.data.dataset import load_data
from mipha.data.datasets._records import Rows
from mipha.data.faults import RecordError
from mipha.data.held_out import Side, side_of
from mipha.data.image_keys import ImageKeys
from mipha.data.images import grey_image, why_missing
from mipha.data.order import (
    draw_samples,
    epoch_order,
    merge_orders,
    samples_shown,
    shuffled_order,
    window_order,
)
from mipha.data.sample import ImageSource, Sample
from mipha.recipe import DataRecipe

_SIDES: tuple[Side | None, ...] = ("train", "validation", None)

WINDOW_ROWS = 16_384
"""Samples that are shuffled together where a data set is read in blocks."""

_FEW_BLOCKS = 64
"""Blocks of a window below which samples that lie side by side meet often."""

_MOST_REMARKS = 20
"""Notes on rows that are said one by one."""


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Args:
        name: Names it in metrics; different from the others'.
        rows: Which of the records are used.
    """

    name: str
    recipe: DataRecipe
    to_sample: Callable[[Any], Sample]
    records: Sequence[Any]
    rows: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> Sample:
        """Return one sample, with its own images.

        Raises:
            RecordError: The record is at fault; names the command that finds all that are.
        """
        try:
            return self.to_sample(self.records[int(self.rows[index])])
        except RecordError as error:
            fix = f"{error.fix}; {self.check_command} shows every such row".removeprefix("; ")
            raise RecordError(error.what, fix, error.where, error.kind) from error

    @property
    def check_command(self) -> str:
        """The command that checks every row of this data set."""
        root = self.recipe.root
        place = "" if root is None else f" --root {root}"
        if root is not None and self.recipe.dataset == "auto":
            return f"`mipha check {root if '/' in str(root) else f'./{root}'}`"
        return f"`mipha check {self.recipe.dataset}{place}`"

    @property
    def window_rows(self) -> int | None:
        """Samples that are shuffled together; None: all of them."""
        if self.recipe.cache_gb is None:
            return None
        return self.recipe.window_rows or WINDOW_ROWS

    def blocks_of(self, samples: np.ndarray) -> np.ndarray:
        """Return the number of the block that each of these samples is read with."""
        assert isinstance(self.records, Rows)
        return self.records.blocks_of(np.asarray(self.rows)[samples])

    @property
    def num_per_epoch(self) -> int:
        """Count its samples that one epoch shows; some may be shown twice."""
        return samples_shown(len(self), self.recipe.weight, self.recipe.cap)


class Mixture(Sequence[Sample]):
    """Data sets one after another; a sample is made when it is asked for.

    As a sequence it holds each sample once; `epoch_order` says how often an epoch shows it. Memory
    does not grow with the contents of samples: beside the data sets' own indices, it takes at most
    16 bytes a sample.

    Args:
        data: The recipe's data sets of one stage.
        held_out: Share of the images that is kept out of training, for validation.
        side: Which of the two this is; `side_of` has the rule.

    Raises:
        ValueError, FileNotFoundError: A data set is unknown, missing, malformed or empty.
    """

    def __init__(
        self, data: Sequence[DataRecipe], held_out: float = 0.0, side: Side = "train"
    ) -> None:
        assert 0 <= held_out < 1 and (held_out or side == "train"), (held_out, side)
        self.notes: list[str] = []
        self._held_out = held_out
        self._whole = [
            self._load(recipe, name) for recipe, name in zip(data, _names(data), strict=True)
        ]
        self._sides = [self._sides_of(source) for source in self._whole] if held_out else []
        self._grey = grey_image()
        self._take(side)

    def on_side(self, side: Side) -> Mixture:
        """Return the samples of another side of the split; nothing is read again for it."""
        other = copy.copy(self)
        for made in ("_behind", "image_keys", "shows_image"):
            other.__dict__.pop(made, None)
        other._take(side)
        return other

    def _take(self, side: Side) -> None:
        """Use the samples of one side of the split."""
        self.sources = tuple(self._whole)
        if self._held_out:
            self.sources = tuple(
                replace(source, rows=np.asarray(source.rows)[sides == _SIDES.index(side)])
                for source, sides in zip(self._whole, self._sides, strict=True)
            )
        self._starts = np.cumsum([0, *(len(source) for source in self.sources)])
        if not len(self):
            raise ValueError(
                f"held_out={self._held_out} leaves no sample for {side}: "
                "choose another share, or give more images"
            )

    def _load(self, recipe: DataRecipe, name: str) -> Source:
        data = load_data(recipe)
        self.notes += [note for note in (data.format, data.left_out) if note]
        if not len(data):
            raise ValueError(
                f"data set {recipe.dataset} ({recipe.root or 'packaged'}, split {recipe.split}) "
                "has no samples"
            )
        source = Source(name, recipe, data.to_sample, data.records, range(len(data)))
        if source.window_rows:
            self.notes.append(_describe_windows(source))
        return source if recipe.max_images is None else self._with_few_images(source)

    def _with_few_images(self, source: Source) -> Source:
        """Return a data set without the samples that show too many images; it is read for that."""
        most = source.recipe.max_images
        assert most is not None
        shown = np.fromiter(
            (len(source.sample(index).images) for index in range(len(source))),
            dtype=np.int64,
            count=len(source),
        )
        rows = np.flatnonzero(shown <= most)
        left_out = len(shown) - len(rows)
        if not len(rows):
            raise ValueError(
                f"every sample of {source.name} shows more than max_images={most} images: "
                f"raise it to {int(shown.min())} at least"
            )
        if left_out:
            self.notes.append(
                f"{source.name}: {left_out} of {len(shown)} samples are left out: "
                f"they show more than max_images={most} images (up to {int(shown.max())})"
            )
        return replace(source, rows=rows)

    def _sides_of(self, source: Source) -> np.ndarray:
        """Return `(samples,)` int8: which of `_SIDES` each sample is on; every image is read."""
        sides = np.fromiter(
            (
                _SIDES.index(side_of(source.sample(index), self._held_out))
                for index in range(len(source))
            ),
            dtype=np.int8,
            count=len(source),
        )
        if torn := int((sides == _SIDES.index(None)).sum()):
            self.notes.append(
                f"{source.name}: {torn} of {len(source)} samples are used on neither side, "
                "because they show images of both"
            )
        return sides

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = self._source_of(index)
        source = self.sources[number]
        place = index - int(self._starts[number])
        sample = source.sample(place)

        if source.recipe.images == "own" or not sample.images:
            return sample
        if source.recipe.images == "grey":
            images: Sequence[ImageSource] = [self._grey] * len(sample.images)
        else:
            images = self._images_of_others(number, place, len(sample.images))
        return replace(sample, images=tuple(images))

    def _images_of_others(self, number: int, place: int, wanted: int) -> list[ImageSource]:
        """Return images of the samples that follow this one in a fixed shuffle of its data set."""
        images: list[ImageSource] = []
        while len(images) < wanted:
            place = int(self._behind[number][place])
            images += self.sources[number].sample(place).images
        return images[:wanted]

    @cached_property
    def _behind(self) -> dict[int, np.ndarray]:
        """Map each data set with shuffled images to the sample that follows each of its samples.

        To follow them leads through all samples of the data set once.
        """
        behind = {}
        for number, source in enumerate(self.sources):
            if source.recipe.images == "shuffled":
                round_trip = np.random.Generator(np.random.Philox(key=[0, number])).permutation(
                    len(source)
                )
                behind[number] = np.empty_like(round_trip)
                behind[number][round_trip] = np.roll(round_trip, -1)
        return behind

    @property
    def num_per_epoch(self) -> int:
        """Count the samples that one epoch shows, by the weights and caps of the recipe."""
        return sum(source.num_per_epoch for source in self.sources)

    @property
    def commits(self) -> dict[str, str]:
        """The commit that each address of the hub was resolved to."""
        return {
            str(source.recipe.root): source.records.commit
            for source in self.sources
            if isinstance(source.records, Rows) and source.records.commit
        }

    def count_sources(self, indices: Sequence[int] | np.ndarray) -> dict[str, int]:
        """Count these samples by data set, for metrics."""
        numbers = np.searchsorted(self._starts, np.asarray(indices), side="right") - 1
        counts = np.bincount(numbers, minlength=len(self.sources))
        return {source.name: int(count) for source, count in zip(self.sources, counts, strict=True)}

    @cached_property
    def image_keys(self) -> np.ndarray:
        """Tell which samples show the same images, by their content; read once.

        Shape `(samples,)`, uint64: equal for samples that show the same images in the same order,
        0 for text alone. An image that cannot be read is named by its place.
        """
        with ImageKeys() as keys:
            return np.fromiter(
                (keys.of(sample.images) for sample in self), dtype=np.uint64, count=len(self)
            )

    @cached_property
    def shows_image(self) -> np.ndarray:
        """Tell which samples show an image: `(samples,)` booleans; read once."""
        return np.fromiter((bool(sample.images) for sample in self), dtype=bool, count=len(self))

    def epoch_samples(self, seed: int, epoch: int) -> np.ndarray:
        """Return `(num_per_epoch,)` indices of the samples of an epoch, data set after data set."""
        return np.concatenate(self._samples_by_source(seed, epoch))

    def _samples_by_source(self, seed: int, epoch: int) -> list[np.ndarray]:
        return [
            start + draw_samples(len(source), source.num_per_epoch, seed, epoch, number)
            if len(source)
            else np.zeros(0, dtype=np.int64)
            for number, (start, source) in enumerate(
                zip(self._starts[:-1], self.sources, strict=True)
            )
        ]

    def _order_of(self, number: int, shown: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return the samples of one data set in the order of an epoch."""
        source = self.sources[number]
        if not source.window_rows or not len(shown):
            return shuffled_order(shown, seed, epoch, number)
        blocks = source.blocks_of(shown - int(self._starts[number]))
        return window_order(shown, blocks, source.window_rows, seed, epoch, number)

    def epoch_order(
        self, seed: int, epoch: int, bundle: int | None = None, by_modality: int | None = None
    ) -> np.ndarray:
        """Return `(num_per_epoch,)` indices in the order of an epoch; see `order.epoch_order`.

        With a data set that is read in blocks, that one goes by `order.window_order`.
        """
        if any(source.window_rows for source in self.sources):
            assert bundle is None and by_modality is None, "the recipe refuses these"
            orders = [
                self._order_of(number, shown, seed, epoch)
                for number, shown in enumerate(self._samples_by_source(seed, epoch))
            ]
            return merge_orders(orders, seed, epoch)

        # To make them reads every sample, and for a bundle every image.
        keys = None
        if by_modality is not None:
            keys = self.shows_image
        elif bundle is not None:
            keys = self.image_keys
        return epoch_order(self.epoch_samples(seed, epoch), seed, epoch, keys, bundle, by_modality)

    def check(self) -> str:
        """Make every sample and look for every image file, before a run spends hours on the rest.

        Data sets that are read in blocks are not read for it: their indices stand for them.
        Remarks of the readers are counted, and added to the notes.

        Returns:
            SHA-256 over all texts and the names of all images, in order: it identifies the
            training data, wherever they lie.

        Raises:
            ValueError: A record is malformed; the message names file and row.
            FileNotFoundError: Image files are missing: how many, and the first of them.
        """
        shows_image = np.zeros(len(self), dtype=bool)
        missing: dict[Path, tuple[str, Source]] = {}
        seen: set[int] = set()
        digest = hashlib.sha256()
        remarks: Counter[tuple[int, str]] = Counter()

        for source in self.sources:
            if source.window_rows:
                assert isinstance(source.records, Rows)
                facts = [source.records.identity, len(source)]
                digest.update(json.dumps(facts).encode() + b"\n")
        for index in self._checked():
            sample = self[index]
            if sample.remarks:
                number = self._source_of(index)
                remarks.update((number, remark.about) for remark in sample.remarks)
            shows_image[index] = bool(sample.images)
            digest.update(_described(sample))
            for image in sample.images:
                if isinstance(image, Path) and (key := hash(image)) not in seen:
                    seen.add(key)
                    if not image.is_file():
                        missing[image] = sample.id, self.sources[self._source_of(index)]
        for (number, about), count in remarks.most_common(_MOST_REMARKS):
            source = self.sources[number]
            self.notes.append(f"{source.name}: {about} ({count} of {len(source)} samples)")
        if len(remarks) > _MOST_REMARKS:
            more = len(remarks) - _MOST_REMARKS
            self.notes.append(f"{more} more remarks on the data: run `mipha check` on them")
        if not any(source.window_rows for source in self.sources):
            self.shows_image = shows_image  # else grouping by modality would read everything again

        if missing:
            image, (sample_id, source) = next(iter(missing.items()))
            raise FileNotFoundError(
                f"{len(missing)} of {len(seen)} image files are missing, for example {image} of "
                f"sample {sample_id}{f' ({why})' if (why := why_missing(image)) else ''}: "
                "check the data's root and image_root, or remove those samples; "
                f"{source.check_command} shows every such row"
            )
        return digest.hexdigest()

    def _checked(self) -> Iterator[int]:
        """Yield the samples that are read before training: all but those that are read in blocks.

        These may be more than the disk holds.
        """
        for start, source in zip(self._starts[:-1].tolist(), self.sources, strict=True):
            if not source.window_rows:
                yield from range(start, start + len(source))

    def _source_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1


def _describe_windows(source: Source) -> str:
    """Say how a data set that is read in blocks is shuffled."""
    size, window = len(source), source.window_rows or 1
    num_blocks = len(np.unique(source.blocks_of(np.arange(size))))
    num_windows = -(-size // window)
    each = num_blocks / num_windows
    said = (
        f"{source.name}: {num_blocks:,} blocks are read in {num_windows:,} windows of about "
        f"{min(window, size):,} samples; rows are checked as they are read, and `mipha check` "
        "reads all before"
    )
    if num_windows > 1 and each < _FEW_BLOCKS:
        said += f"; a window mixes {each:.0f} blocks: raise window_rows if the files are sorted"
    return said


def _names(data: Sequence[DataRecipe]) -> list[str]:
    """Return a name for each data set, with a number after it where two have the same."""
    names = [recipe.root_name or recipe.dataset for recipe in data]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]


def _described(sample: Sample) -> bytes:
    texts = [
        [message.role, message.text, *([] if message.learned else ["not learned"])]
        for message in sample.messages
    ]
    images = [
        hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else Path(str(image)).name
        for image in sample.images
    ]
    regions = [[list(region.numbers) for region in sample.regions]] if sample.regions else []
    return json.dumps([texts, images, *regions]).encode() + b"\n"
