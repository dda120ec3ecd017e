"""What a data set is, which there are, and how one is loaded.

A file in `datasets/` is a data set: its module declares `DATASET`, and the file's name is the data
set's name.

    recipe's data --load_data--> LoadedData: records --to_sample--> Sample
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipha.data.datasets._ratings import Rated, keep_rated
from mipha.data.datasets._records import Rows, splits_in
from mipha.data.images import ImageSource
from mipha.data.sample import Sample
from mipha.lookup import did_you_mean, files_in, read_yaml
from mipha.recipe import DataRecipe, StageRecipe
from mipha.validation import validated

HUB = "hf://"
"""Begins addresses of the hub, which has a cache of its own."""

DATASETS = Path(__file__).parent / "datasets"


@dataclass(frozen=True)
class DataSet:
    """How one data set, or one format of own data, is read.

    Args:
        name: Name of its module.
        load: `load(root, split)`, or `load(root, split, image_root)` where `takes_image_root`:
            the records of a split, indexed and not yet read. `root` is None where the recipe
            gives none.
        to_sample: One of those records as a sample. Raises `RecordError` where the record is at
            fault. A record that has a text `where` (file and line) is named with it in reports.
        takes_image_root: Whether `load` takes the folders that images may lie in.
        takes: Further keys of the recipe that `load` takes by name.
        reads: Keys of `ReadingRecipe` that `to_sample` heeds; `Rows` hand them to it.
        left_out: `left_out(root, split)`: a sentence on the records that `load` leaves out, None
            where there are none.
        detect: `detect(root, complete)`: the name of the data set that reads this place, and a
            sentence on the format; see `load_data`. A data set with `detect` hands over to that
            one, whose records its own `to_sample` reads, each by the format that it has.
    """

    name: str
    load: Callable[..., Sequence[Any]] | None = None
    to_sample: Callable[[Any], Sample] | None = None
    takes_image_root: bool = False
    takes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    left_out: Callable[[Path | None, str], str | None] | None = None
    detect: Callable[[Path | None, Callable[[Any], Any]], tuple[str, str]] | None = None

    def __post_init__(self) -> None:
        finds_one_way = (self.load is None) != (self.detect is None)
        assert self.to_sample and finds_one_way, f"{self.name}: to_sample, and load or detect"


@dataclass(frozen=True)
class LoadedData:
    """The records of one data set, and their names in messages.

    Args:
        name: Name for headings.
        records: As the data set's `load` gives them; each is read when it is asked for.
        to_sample: As `DataSet.to_sample`.
        folder: Folder that is left out of paths in messages.
        limit: Number of records that are used, from the first; None for all.
        format: How the format was detected, in a sentence; None where it was given.
        left_out: Which records were left out, in a sentence; None where none were.
        recipe: The recipe that it was loaded by; None where there is none.
        rated: What `min_ratings` left out; None where the recipe does not have it.
        rejected: Of pairs of answers: one of those records as a sample with the rejected answer,
            where `to_sample` has the chosen one. None for all other data.
    """

    name: str
    records: Sequence[Any]
    to_sample: Callable[[Any], Sample]
    folder: Path | None = None
    limit: int | None = None
    format: str | None = None
    left_out: str | None = None
    recipe: DataRecipe | None = None
    rated: Rated | None = None
    rejected: Callable[[Any], Sample] | None = None

    def __len__(self) -> int:
        return min(len(self.records), self.limit or len(self.records))

    def as_trained_on(self, stage: StageRecipe) -> DataRecipe | None:
        """Return the entry of the stage that names this data, else the recipe it was loaded by.

        `check` and `show` load data by address alone; its weight and cap stand in the stage.
        """
        return next((entry for entry in stage.data if self._is_named_by(entry)), self.recipe)

    def _is_named_by(self, entry: DataRecipe) -> bool:
        own = self.recipe
        if own is None or entry.split != own.split:
            return False
        if entry.root is None or own.root is None:
            return entry.root is own.root and entry.dataset == own.dataset
        if isinstance(entry.root, str) or isinstance(own.root, str):
            return (entry.root, entry.config) == (own.root, own.config)
        return entry.root.resolve() == own.root.resolve() and entry.config == own.config

    def place(self, record: Any) -> str:
        """Return the record's place, such as `train.jsonl, line 18`; empty where unknown."""
        where = getattr(record, "where", None)
        return where.removeprefix(f"{self.folder}/") if isinstance(where, str) else ""

    def file_of(self, row: int) -> str:
        """Return the file that a row lies in, without the data's folder; empty where unknown."""
        find = getattr(self.records, "file_of", None)
        return self.shorten(str(find(row) or "")) if find else ""

    def shorten(self, text: str) -> str:
        """Return a sentence without the data's own folder in front of its paths."""
        if self.folder is None:
            return text
        return re.sub(rf"(?<![\w./-]){re.escape(str(self.folder))}/", "", text)

    def image_name(self, image: ImageSource) -> str:
        """Return what messages call an image."""
        if isinstance(image, bytes):
            return f"of {len(image):,} bytes"
        return str(image).removeprefix(f"{self.folder}/")


def list_datasets() -> list[str]:
    """Return the names of all data sets."""
    return files_in(DATASETS, ".py")


def load_dataset(name: str) -> DataSet:
    """Return the data set of this name.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in list_datasets():
        hint = f"; for the data in that place write ./{name}" if Path(name).exists() else ""
        raise ValueError(f"no data set {name!r}: {did_you_mean(name, list_datasets())}{hint}")
    return importlib.import_module(f"mipha.data.datasets.{name}").DATASET


def load_data(
    recipe: DataRecipe, complete: Callable[[Any], Any] = lambda content: content
) -> LoadedData:
    """Index the records of a split; they are read and judged one by one.

    `weight`, `cap` and the other keys on what an epoch shows are the mixture's.

    Args:
        recipe: Place and format of the data.
        complete: Makes of a record's content what training reads, before its format is detected.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no such data set, format or split; the data are a pipe or a device; a
            file cannot be divided into records; or the data set does not read `image_root`.
        MissingPackage: The format needs a package that is not installed.
    """
    place = recipe.root
    if isinstance(place, Path) and place.exists() and not (place.is_file() or place.is_dir()):
        raise ValueError(
            f"{place} is a pipe or a device, and data are read several times: write them to a file"
        )

    # Copy what lies behind an address, and find the data set that reads it.
    dataset, found = load_dataset(recipe.dataset), None
    broken: str | None = None
    to_sample = dataset.to_sample
    in_parts = recipe.cache_gb is not None
    if isinstance(place, str) and not place.startswith(HUB):
        from mipha.data.addresses import copy_to_cache
        from mipha.data.blocks import index_address

        if in_parts:
            place, broken = index_address(place, skip=recipe.unreadable_shards == "skip")
        else:
            place = copy_to_cache(place)
    if dataset.detect is not None:
        if recipe.config is not None or isinstance(place, str):
            name, found = (
                "hub",
                f"{recipe.root} is read as hub, config {recipe.config or 'default'}",
            )
        elif in_parts:
            name = _format_in_parts(place)
            found = f"{recipe.root} is read as {name}, a block at a time"
        else:
            name, found = dataset.detect(place, _with_columns(recipe, complete))
        dataset = load_dataset(name)
    assert dataset.load is not None and to_sample is not None
    if isinstance(place, str) and dataset.name != "hub":
        raise ValueError(f"{place} is read by the data set hub or auto, not {dataset.name}")

    # Index the records.
    if recipe.image_root and not dataset.takes_image_root:
        raise ValueError(f"image_root has no effect with the data set {dataset.name}: remove it")
    idle = [key for key in recipe.set_keys() if key not in (*dataset.reads, *dataset.takes)]
    if idle and not found:
        raise ValueError(f"{idle[0]} has no effect with the data set {dataset.name}: remove it")
    more = (recipe.image_root,) if dataset.takes_image_root else ()
    named = {key: getattr(recipe, key) for key in dataset.takes}
    records = dataset.load(place, recipe.split, *more, **named)
    for key in idle:  # own data may hold rows of several formats
        if not _heeds(records, key):
            raise ValueError(f"{key} has no effect with the data set {dataset.name}: remove it")

    # Leave out what the recipe says.
    left_out = [broken, dataset.left_out(place, recipe.split) if dataset.left_out else None]
    rated = None
    if isinstance(records, Rows):
        left_out.append(records.left_out)
        records = records.read_by(recipe)
        if recipe.min_ratings:
            records, rated = keep_rated(records)
            left_out.append(rated.sentence)

    name = "/".join(filter(None, (recipe.root_name or recipe.dataset, recipe.config)))
    return LoadedData(
        name=name if recipe.split == "train" else f"{name} ({recipe.split})",
        records=records,
        to_sample=to_sample,
        folder=_folder_of(place, records),
        limit=recipe.limit,
        format=found,
        left_out="; ".join(filter(None, left_out)) or None,
        recipe=recipe,
        rated=rated,
    )


def _heeds(records: Sequence[Any], key: str) -> bool:
    """Return whether a record of own data has a format that heeds a key of `ReadingRecipe`."""
    from mipha.data.datasets._shapes import READS, shapes_of

    for index in range(len(records) if key in READS else 0):
        try:
            content = records[index].content
        except ValueError:
            continue
        if any(key in load_dataset(name).reads for name in shapes_of(content)):
            return True
    return False


def _with_columns(recipe: DataRecipe, complete: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `complete` that also gives the columns of a table the names that are read."""
    from mipha.data.datasets.table import by_name, plain_name

    def with_columns(content: Any) -> Any:
        content = complete(content)
        if not recipe.columns or not isinstance(content, Mapping):
            return content
        named = by_name(content)
        meant = {key: named.get(plain_name(name)) for key, name in recipe.columns.items()}
        return {**content, **meant}

    return with_columns


def _format_in_parts(place: Path | None) -> str:
    """Return the data set that reads a place in blocks: tars, or else parquet files."""
    if place is None or not place.is_dir():
        return "webdataset" if place and place.suffix.lower() == ".tar" else "parquet"
    return "webdataset" if splits_in(place, ".tar") else "parquet"


def _folder_of(place: Path | str | None, records: Sequence[Any]) -> Path | None:
    """Return the folder that messages leave out of paths."""
    if isinstance(place, str):  # of the hub: its cache
        files = [part.file for part in records.parts] if isinstance(records, Rows) else []
        return Path(os.path.commonpath([getattr(file, "file", "/") for file in files])).parent
    return place if place is None or place.is_dir() else place.parent


def data_recipe(
    data: str,
    root: Path | str | None = None,
    image_root: Sequence[Path] = (),
    split: str = "train",
    settings: Sequence[str] = (),
) -> DataRecipe:
    """Return what a command means by DATA.

    Args:
        data: A path or address, with a slash or a dot in it, whose format is detected; or the
            name of a data set.
        root: Where a named data set lies; None for its packaged copy.
        image_root: Folders that images may lie in.
        split: Name of the split.
        settings: Further keys of the data set's recipe, `key=value` each.

    Raises:
        ValueError: A root beside a path, or a setting that is not known.
    """
    more = {"split": split, "image_root": tuple(image_root)} | _tree_of(settings)
    if "/" not in data and "." not in data:
        tree = {"dataset": data, "root": root, **more}
        return validated(DataRecipe, tree, f"the data set {data}", "data set")
    if root is not None:
        raise ValueError(
            f"--root {root} is for the name of a data set, and {data} is a path: leave one out"
        )
    tree = {"dataset": "auto", "root": data, **more}
    return validated(DataRecipe, tree, "DATA", "data set")


def _tree_of(settings: Sequence[str]) -> dict[str, Any]:
    """Return `key=value` and `key.path=value` as a tree."""
    tree: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} has no `=`: write key=value, for example split=test")
        *groups, last = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = read_yaml(text, f"{key}: the value")
    return tree
