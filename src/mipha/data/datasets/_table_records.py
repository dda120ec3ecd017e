"""A file of comma- or tab-separated values that knows where each row begins and reads it when it is asked for.

Memory: 24 bytes a row. Nothing stays open, so the index may be copied to another process.
"""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

_BOM = b"\xef\xbb\xbf"


class TableRecords:
    """A file of comma- or tab-separated values whose first line names the columns; an empty cell is null.

    Args:
        file: UTF-8. A .csv may be separated by `;` or tabs too: whatever makes the most of its first line.
        most: Index no more than this many records; null: all.

    Raises:
        ValueError: It is not UTF-8, a quote is never closed, or two columns have one name; names file and line.
    """

    def __init__(self, file: Path, most: int | None = None) -> None:
        self.file = file
        spans, numbers = array("q"), array("q")
        with file.open("rb") as stream:
            first = stream.readline()
            self._delimiter = (
                "\t" if file.suffix.lower() == ".tsv" else chr(max(b",;\t", key=first.count))
            )
            stream.seek(len(_BOM) if first.startswith(_BOM) else 0)
            lines = _CountedLines(stream, file)
            rows = csv.reader(lines, delimiter=self._delimiter, strict=True)
            try:
                self.columns = [name.strip() for name in next(rows, [])]
                while most is None or len(numbers) < most:
                    start, number = lines.offset, lines.number + 1
                    if (cells := next(rows, None)) is None:
                        break
                    if cells:
                        spans.extend((start, lines.offset))
                        numbers.append(number)
            except csv.Error as error:
                raise ValueError(
                    f"{file}, line {lines.number} is not a row of separated values: {error}"
                ) from error
        if twice := {name for name in self.columns if self.columns.count(name) > 1}:
            raise ValueError(
                f"{file} has two columns {sorted(twice)[0]!r}: rename one in its first line"
            )
        self._spans = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        self._numbers = np.asarray(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        """Number of the record's first line, from 1 as editors count."""
        return str(self._numbers[index])

    def where(self, index: int) -> str:
        """File and line."""
        return f"{self.file}, line {self.name(index)}"

    def read(self, index: int) -> dict[str, str | None]:
        """One record, by column.

        Raises:
            ValueError: It has more or fewer cells than there are columns; names file and line.
        """
        start, end = self._spans[index]
        with self.file.open("rb") as stream:
            stream.seek(start)
            text = stream.read(end - start).decode("utf-8")
        cells = next(
            csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True)
        )
        if len(cells) != len(self.columns):
            raise ValueError(
                f"{self.where(index)} has {len(cells)} cells for {len(self.columns)} columns; put text with a {self._delimiter!r} in quotes"
            )
        return {column: cell or None for column, cell in zip(self.columns, cells, strict=True)}


class _CountedLines(Iterator[str]):
    """The lines of a stream as text; `offset` and `number` say how far it was read."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream, self._file = stream, file
        self.offset, self.number = stream.tell(), 0

    def __next__(self) -> str:
        line = self._stream.readline()
        if not line:
            raise StopIteration
        self.offset += len(line)
        self.number += 1
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._file}, line {self.number} is not UTF-8: save the table as UTF-8"
            ) from error
