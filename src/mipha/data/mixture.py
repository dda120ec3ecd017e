"""Several data sets as one sequence of samples, and the order in which training reads them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from mipha.data.images import grey_image
from mipha.data.sample import Sample
from mipha.lookup import did_you_mean, files_in
from mipha.recipe import DataRecipe

DATASETS = Path(__file__).parent / "datasets"


def list_datasets() -> list[str]:
    """Names of the data set modules."""
    return files_in(DATASETS, ".py")


def load_dataset_module(name: str) -> ModuleType:
    """The module of a data set.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in list_datasets():
        raise ValueError(f"no data set {name!r}: {did_you_mean(name, list_datasets())}")
    return importlib.import_module(f"mipha.data.datasets.{name}")


class Mixture(Sequence[Sample]):
    """Data sets one after another; a sample is made when it is asked for.

    Args:
        data: The recipe's data sets of one stage.

    Raises:
        ValueError, FileNotFoundError: A data set is unknown, missing, malformed or empty.
    """

    def __init__(self, data: Sequence[DataRecipe]) -> None:
        self.notes: list[str] = []
        self._sources = [self._load(recipe) for recipe in data]
        self._starts = np.cumsum([0, *(len(records) for _, records, _ in self._sources)])
        self._grey = grey_image()

    def _load(self, recipe: DataRecipe) -> tuple[ModuleType, Sequence, DataRecipe]:
        module = load_dataset_module(_detect(recipe))
        records = module.load(recipe.root, recipe.split)
        if hasattr(module, "left_out") and (note := module.left_out(recipe.split, recipe.root)):
            self.notes.append(note)
        if recipe.limit:
            records = records[: recipe.limit]
        if not len(records):
            raise ValueError(f"data set {recipe.dataset} ({recipe.root or 'packaged'}, split {recipe.split}) has no samples")
        return module, records, recipe

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        module, records, recipe = self._sources[source]
        sample = module.to_sample(records[index - int(self._starts[source])], recipe.root)
        if recipe.blind:
            return Sample(sample.id, sample.messages, (self._grey,) * len(sample.images))
        return sample


def check_samples(mixture: Mixture) -> None:
    """Make every sample and look for every image file, before hours are spent on the way to a broken one.

    Raises:
        ValueError: A record is malformed; the message names file and row.
        FileNotFoundError: Image files are missing: how many, and the first of them.
    """
    first_with = {image: sample.id for sample in mixture for image in sample.images if isinstance(image, Path)}
    missing = [image for image in first_with if not image.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(first_with)} image files are missing, for example {missing[0]} of sample {first_with[missing[0]]}: "
            "check the data's root, or remove those samples"
        )


def epoch_order(mixture: Mixture, seed: int, epoch: int, samples_per_image: int | None) -> np.ndarray:
    """The order of one epoch: a pure function of seed and epoch, whatever ran before and on how many processes.

    Args:
        samples_per_image: Null shuffles samples. A number keeps that many samples of one image side by side (in a new
            choice every epoch) and shuffles those bundles: shared-image batching then finds them in one step.

    Returns:
        `(samples,)` indices.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    shuffled = random.permutation(len(mixture))
    if samples_per_image is None:
        return shuffled
    by_image: dict[object, list[int]] = {}
    for index in shuffled:
        by_image.setdefault(mixture[int(index)].images or int(index), []).append(int(index))
    bundles = [
        members[start : start + samples_per_image] for members in by_image.values() for start in range(0, len(members), samples_per_image)
    ]
    random.shuffle(bundles)
    return np.concatenate([np.asarray(bundle) for bundle in bundles])


def _detect(recipe: DataRecipe) -> str:
    """The data set module for a bare path: a .jsonl holds messages, a .json LLaVA conversations."""
    if recipe.dataset != "auto":
        return recipe.dataset
    kinds = {".jsonl": "messages", ".json": "llava_instruct"}
    suffix = recipe.root.suffix if recipe.root else ""
    if suffix not in kinds:
        raise ValueError(
            f"data {recipe.root}: cannot tell the format from the name; give a .jsonl of messages or a LLaVA .json, or set `dataset`"
        )
    return kinds[suffix]
