"""Official files, read with errors that name the file and the line."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def official_root(
    name: str, root: Path | None, split: str, splits: Sequence[str], source: str
) -> Path:
    """The folder with a benchmark's official files, once the split is known to be one of its own.

    Raises:
        ValueError: No such split, or no folder was given.
    """
    if split not in splits:
        raise ValueError(f"benchmark {name} has no split {split!r}: choose {' or '.join(splits)}")
    if root is None:
        raise ValueError(
            f"{name} has no packaged copy: {source}, and give its folder with --data-root"
        )
    return root


def find(root: Path, names: Sequence[str], source: str) -> Path:
    """The first of the names that is there: under the folder, or the path itself if it is a file.

    Args:
        root: A folder with official files (others may lie there too), or one official file.
        names: Paths under the folder, the usual one first.
        source: Sentence for the error: where the files are had.

    Raises:
        FileNotFoundError: None is there.
    """
    if root.is_file():
        return root
    for name in names:
        if (root / name).is_file():
            return root / name
    if not root.is_dir():
        raise FileNotFoundError(f"no {root}: give the folder with {' or '.join(names)}. {source}")
    raise FileNotFoundError(f"{root} has no {' or '.join(names)}: {source}")


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not JSON, or not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    collecting = gc.isenabled()
    gc.disable()  # millions of new objects, none of them garbage: looking for it takes as long as reading
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} line {error.lineno} is not valid JSON ({error.msg}): get the file again"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: get the file again") from error
    finally:
        if collecting:
            gc.enable()


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSON-lines file; empty lines are passed over.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    # Split at newlines only: a JSON string may hold other characters that end a line elsewhere.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path} line {number} is not valid JSON ({line[:60]!r}): mend that line"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path} line {number} is not a JSON object ({line[:60]!r}): mend that line"
            )
        yield number, row


def field(record: Any, key: str, where: str) -> Any:
    """One value of a record.

    Raises:
        ValueError: The record has no such key; names where.
    """
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"{where} has no {key!r}: this is not the official file")
    return record[key]


def image_file(path: Path, source: str) -> Path:
    """The path, if there is a file.

    Raises:
        FileNotFoundError: There is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}: {source}")
    return path
