"""Record files as sequences that know where each record begins and read it when it is asked for.

Memory: 16 to 24 bytes a record, whatever the records hold. Nothing stays open, so a reader may be copied to another process.
"""

from __future__ import annotations

import csv
import io
import json
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from mipha.data.datasets._records import ImageFolders, Row, image_folders
from mipha.data.datasets._splits import split_files

TABLE_SUFFIXES = (".csv", ".tsv")
LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")

_BOM = b"\xef\xbb\xbf"
# The next bracket or comma, past text and strings. Possessive: a broken file fails at once, whatever its length.
_NEXT = re.compile(rb'(?:[^][{},"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+[][{},]', re.DOTALL)
_REST = re.compile(rb"\s*+\Z")


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
        return Row(self.dataset, f"{prefix}/{file.name(index)}", file.where(index), file.read(index), folders)


class JsonRecords:
    """A file of JSON lines, or of one JSON list; which of the two, its first character says.

    Args:
        file: UTF-8.
        most: Index no more than this many records; null: all.

    Raises:
        ValueError: A list is not closed, or something follows it.
    """

    def __init__(self, file: Path, most: int | None = None) -> None:
        self.file = file
        with file.open("rb") as stream:
            begin = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
            stream.seek(begin)
            self.is_list = next((line.lstrip()[:1] == b"[" for line in stream if line.strip()), False)
            stream.seek(begin)
            if self.is_list:
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    spans, numbers = _list_spans(content, begin, most, file), None
            else:
                spans, numbers = _line_spans(stream, begin, most)
        self._spans = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        """Number of the line, from 1 as editors count; or of the row of a list, from 0."""
        return str(index if self._numbers is None else self._numbers[index])

    def where(self, index: int) -> str:
        """File and line, or file and row."""
        return f"{self.file}, {'row' if self.is_list else 'line'} {self.name(index)}"

    def read(self, index: int) -> Any:
        """One record.

        Raises:
            ValueError: It is not valid JSON in UTF-8; names file and line.
        """
        start, end = self._spans[index]
        with self.file.open("rb") as stream:
            stream.seek(start)
            text = stream.read(end - start)
        try:
            return json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where(index)} is not valid JSON: {error}") from error


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
            self._delimiter = "\t" if file.suffix.lower() == ".tsv" else chr(max(b",;\t", key=first.count))
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
                raise ValueError(f"{file}, line {lines.number} is not a row of separated values: {error}") from error
        if twice := {name for name in self.columns if self.columns.count(name) > 1}:
            raise ValueError(f"{file} has two columns {sorted(twice)[0]!r}: rename one in its first line")
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
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True))
        if len(cells) != len(self.columns):
            raise ValueError(
                f"{self.where(index)} has {len(cells)} cells for {len(self.columns)} columns; put text with a {self._delimiter!r} in quotes"
            )
        return {column: cell or None for column, cell in zip(self.columns, cells, strict=True)}


def record_rows(
    dataset: str, root: Path | None, split: str, suffixes: Sequence[str], image_root: Sequence[Path], most: int | None = None
) -> Rows:
    """The records of a split's JSON or table files.

    Raises:
        FileNotFoundError, ValueError: As `split_files`, and of a file that is not what its name says.
    """
    return Rows(
        dataset,
        [
            Part(f"{dataset}/{name}", record_file(file, most), image_folders(file, image_root))
            for name, file in split_files(dataset, root, split, suffixes)
        ],
    )


def record_file(file: Path, most: int | None = None) -> JsonRecords | TableRecords:
    """The index of one file, by its suffix."""
    return (TableRecords if file.suffix.lower() in TABLE_SUFFIXES else JsonRecords)(file, most)


def _line_spans(stream: BinaryIO, start: int, most: int | None) -> tuple[array[int], np.ndarray]:
    """Where each line that is not blank begins and ends, and its number."""
    spans, numbers = array("q"), array("q")
    for number, line in enumerate(stream, start=1):
        if len(numbers) == most:
            break
        if not line.isspace():
            spans.extend((start, start + len(line)))
            numbers.append(number)
        start += len(line)
    return spans, np.asarray(numbers, dtype=np.int64)


def _list_spans(content: mmap.mmap, start: int, most: int | None, file: Path) -> array[int]:
    """Where each element of a JSON list begins and ends: between the commas and brackets that are in no other bracket or string."""
    spans: array[int] = array("q")
    position, begin, depth, mark = start, start, 0, 0
    while (most is None or len(spans) < 2 * most) and (match := _NEXT.match(content, position)):
        position = match.end()
        mark = content[position - 1]
        if depth == 1 and mark in b",]" and (mark == ord(",") or spans or content[begin : position - 1].strip()):
            spans.extend((begin, position - 1))
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        if depth == 1 and mark in b"[,":
            begin = position
        if depth == 0:
            break
    if most is not None and len(spans) == 2 * most:
        return spans
    if depth != 0 or mark != ord("]") or not _REST.match(content, position):
        raise ValueError(f"{file} is not valid JSON: its list is not closed, or does not end the file; is it cut short?")
    return spans


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
            raise ValueError(f"{self._file}, line {self.number} is not UTF-8: save the table as UTF-8") from error
