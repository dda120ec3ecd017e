"""Records of one or more files as one sequence: each knows its file and row, and is read when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mipha.data.datasets._json_records import JsonRecords
from mipha.data.datasets._records import ImageFolders, Row, image_folders
from mipha.data.datasets._splits import split_files
from mipha.data.datasets._table_records import TableRecords

TABLE_SUFFIXES = (".csv", ".tsv")
LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")


class RecordFile(Protocol):
    """A file, or a folder, of records."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """One record."""
        ...

    def name(self, index: int) -> str:
        """What tells the record from others of the file, for the sample's id."""
        ...

    def where(self, index: int) -> str:
        """File and row, for messages."""
        ...


class Part(NamedTuple):
    """One of the files of a data set; `prefix` begins the ids of its samples."""

    prefix: str
    file: RecordFile
    folders: ImageFolders


class Rows(Sequence[Row]):
    """The records of one or more files, one after another."""

    def __init__(self, dataset: str, parts: Sequence[Part]) -> None:
        self.dataset, self.parts = dataset, parts
        self._starts = np.cumsum([0, *(len(part.file) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        prefix, file, folders = self.parts[number]
        index -= int(self._starts[number])
        return Row(
            self.dataset,
            f"{prefix}/{file.name(index)}",
            file.where(index),
            file.read(index),
            folders,
        )


def record_rows(
    dataset: str, root: Path | None, split: str, suffixes: Sequence[str], image_root: Sequence[Path]
) -> Rows:
    """The records of a split's JSON or table files.

    Raises:
        FileNotFoundError, ValueError: As `split_files`, and of a file that is not what its name says.
    """
    files = split_files(dataset, root, split, suffixes)
    return Rows(
        dataset,
        [
            Part(f"{dataset}/{name}", record_file(file), image_folders(file, image_root))
            for name, file in files
        ],
    )


def record_file(file: Path, most: int | None = None) -> JsonRecords | TableRecords:
    """The index of one file, by its suffix."""
    return (TableRecords if file.suffix.lower() in TABLE_SUFFIXES else JsonRecords)(file, most)
