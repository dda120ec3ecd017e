"""What the readers of record files share: splits, and paths that stay where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def check_split(dataset: str, split: str, splits: Sequence[str]) -> None:
    """Raise a `ValueError` that names the splits, unless `split` is one of them."""
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}: use {' or '.join(splits) or 'a folder that holds one'}")


def path_inside(folder: Path, relative: Any, where: str) -> Path:
    """The file that a record names, under the folder it is meant to be in.

    Links inside the folder are followed: its owner made them, a record did not.

    Raises:
        ValueError: The path is no text, is empty, absolute, or climbs out; `where` names file and row.
    """
    if not isinstance(relative, str) or not relative.strip() or "\0" in relative:
        raise ValueError(f"{where}: the image path is {relative!r}; wanted a path inside {folder}")
    posix, windows = PurePosixPath(relative), PureWindowsPath(relative)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"{where}: the image path {relative!r} leads out of {folder}; give a relative path without `..`")
    return folder / posix
