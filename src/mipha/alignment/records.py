"""Rows of a published file: JSON, JSON lines, packed or not, or parquet."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and row, counted from 1, with the row's object.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of these, broken or empty; names the line or the row.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no data file {path}: give the published .json, .jsonl, .jsonl.xz or .parquet"
        )
    number = 0
    for number, record in enumerate(_read(path), start=1):
        where = f"{path} row {number}"
        if not isinstance(record, dict):
            raise ValueError(
                f"{where} is not an object with named fields ({str(record)[:60]!r}): is this the layout that this step reads?"
            )
        yield where, record
    if not number:
        raise ValueError(f"{path} has no rows: give a file with some")


def _read(path: Path) -> Iterable[Any]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            message = f"{path} is read with pyarrow, which is not installed: pip install 'mipha-vlm[align]'"
            raise ModuleNotFoundError(message, name="pyarrow") from error
        return parquet.read_table(path).to_pylist()
    if path.suffix not in (".json", ".jsonl", ".xz"):
        raise ValueError(f"{path} is no .json, .jsonl, .jsonl.xz or .parquet: give one of these")
    try:
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except lzma.LZMAError as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): fetch it again") from error
    text = content.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"{path} is not whole JSON ({error}): fetch it again, or mend it"
            ) from error
    return _lines(path, text)


def _lines(path: Path, text: str) -> Iterable[Any]:
    # Only a newline ends a line of JSON: other separators of Unicode may stand inside of one.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path} line {number} is not JSON ({line[:60]!r}): mend or remove that line"
                ) from error
