"""The rows that `check` and `show` read: a data set opened, and names for its rows and images in messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipha.data.images import ImageSource
from mipha.data.mixture import load_records
from mipha.data.sample import Sample
from mipha.recipe import DataRecipe, StageRecipe


@dataclass(frozen=True)
class Source:
    """Rows to check, and how one becomes a sample.

    Args:
        name: For headings.
        records: As the data set's `load` gives them.
        to_sample: One of them to a sample; a `ValueError` says what is wrong with it.
        folder: Left out of paths in messages.
        limit: Use the first so many rows only.
        note: How its format was told, in a sentence; None where it was given.
        data: The recipe that it was opened by.
    """

    name: str
    records: Sequence[Any]
    to_sample: Callable[[Any], Sample]
    folder: Path | None = None
    limit: int | None = None
    note: str | None = None
    data: DataRecipe | None = None

    def __len__(self) -> int:
        return min(len(self.records), self.limit or len(self.records))

    def as_trained_on(self, stage: StageRecipe) -> DataRecipe | None:
        """Return the entry of the stage that names this data, else the recipe it was opened by.

        `check` and `show` open data by address alone; its weight and cap stand in the stage.
        """
        return next((data for data in stage.data if self._is_named_by(data)), self.data)

    def _is_named_by(self, data: DataRecipe) -> bool:
        if self.data is None or data.split != self.data.split:
            return False
        if data.root is None or self.data.root is None:
            return data.root is self.data.root and data.dataset == self.data.dataset
        return data.root.resolve() == self.data.root.resolve()

    def place(self, record: Any) -> str:
        """The row as its file counts, such as `train.jsonl, line 18`; empty where the record does not know it."""
        where = getattr(record, "where", None)
        return where.removeprefix(f"{self.folder}/") if isinstance(where, str) else ""

    def shortened(self, text: str) -> str:
        """A sentence whose paths begin behind the data set's own folder."""
        return (
            text
            if self.folder is None
            else re.sub(rf"(?<![\w./-]){re.escape(str(self.folder))}/", "", text)
        )

    def image_name(self, image: ImageSource) -> str:
        """An image for messages."""
        return (
            f"of {len(image):,} bytes"
            if isinstance(image, bytes)
            else str(image).removeprefix(f"{self.folder}/")
        )


def data_recipe(data: str, split: str = "train", image_root: Sequence[Path] = ()) -> DataRecipe:
    """What `check` and `show` mean by DATA: the name of a data set; or a path, with a slash or a dot in it, whose format is detected."""
    if "/" in data or "." in data:
        return DataRecipe(
            dataset="auto", root=Path(data), split=split, image_root=tuple(image_root)
        )
    return DataRecipe(dataset=data, split=split)


def open_source(data: DataRecipe) -> Source:
    """Index the records of a data set; they are read and judged one by one.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No such data set, format or split; or a file that cannot be taken apart into rows.
    """
    name = f"{data.root.name if data.root else data.dataset}" + (
        f" ({data.split})" if data.split != "train" else ""
    )
    module, records = load_records(data)
    folder = None if data.root is None else data.root if data.root.is_dir() else data.root.parent
    note = module.detect(data.root)[1] if data.root and hasattr(module, "detect") else None
    return Source(
        name,
        records,
        lambda record: module.to_sample(record, data.root),
        folder,
        data.limit,
        note,
        data,
    )
