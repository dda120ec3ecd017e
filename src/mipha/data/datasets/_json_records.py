"""A file of JSON lines, or of one JSON list, that knows where each record begins and reads it when it is asked for.

Memory: 16 to 24 bytes a record, whatever the records hold. Nothing stays open, so the index may be copied to another process.
"""

from __future__ import annotations

import json
import mmap
import re
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_BOM = b"\xef\xbb\xbf"
# The next bracket or comma, past text and strings. Possessive: a broken file fails at once, whatever its length.
_NEXT = re.compile(rb'(?:[^][{},"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+[][{},]', re.DOTALL)
_REST = re.compile(rb"\s*+\Z")


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
            self.is_list = next(
                (line.lstrip()[:1] == b"[" for line in stream if line.strip()), False
            )
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
        if (
            depth == 1
            and mark in b",]"
            and (mark == ord(",") or spans or content[begin : position - 1].strip())
        ):
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
        raise ValueError(
            f"{file} is not valid JSON: its list is not closed, or does not end the file; is it cut short?"
        )
    return spans
