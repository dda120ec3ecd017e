"""Which files of a folder belong to which split, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mipha.data.datasets._records import check_split

# Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits, the words that are equivalent
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")


def split_files(
    dataset: str, root: Path | None, split: str, suffixes: Sequence[str]
) -> list[tuple[str, Path]]:
    """The files of one split, in the order of their names.

    Args:
        dataset: Name for messages.
        root: One file, whose one split is `train`, or a folder as `splits_in` reads it.
        split: Which; `val` and `dev` are `validation`.
        suffixes: What is looked for; the first suffix that the folder has a file of.

    Returns:
        (name, file) pairs: the name is the file's path in the folder without its suffix, for the ids of samples.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No root, or no such split.
    """
    if root is None:
        raise ValueError(
            f"{dataset} has no packaged copy: set the data's root to a {suffixes[0]} file, or a folder with train{suffixes[0]}"
        )
    if not root.exists():
        raise FileNotFoundError(f"{dataset}: no file or folder {root}; check the data's root")
    if not root.is_dir():
        check_split(f"{dataset} in {root}", split, ("train",))
        return [(root.stem, root)]
    splits = next((found for suffix in suffixes if (found := splits_in(root, suffix))), {})
    wanted = split if split in splits else _WORDS.get(split.lower(), split)
    check_split(f"{dataset} in {root}", wanted, sorted(splits))
    return [(file.relative_to(root).with_suffix("").as_posix(), file) for file in splits[wanted]]


def splits_in(folder: Path, suffix: str) -> dict[str, list[Path]]:
    """Split -> its files, in the order of their names.

    Files lie in the folder, in its `data`, or in a folder that is named after a split. A split's name is a word of the file's name
    (train-00000-of-00002, my_dev_set) or the folder's. Files without such a word are a split by their name less the number of the
    shard; where there is no other, they are `train`.
    """
    folders = [folder, folder / "data", *split_folders(folder).values()]
    splits: dict[str, list[Path]] = {}
    for place in folders:
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if (
                file.suffix.lower() == suffix
                and file.is_file()
                and not file.name.startswith((".", "_"))
            ):
                splits.setdefault(_split_of(file, is_split_folder=place in folders[2:]), []).append(
                    file
                )
    if len(splits) == 1 and not set(splits) & set(_WORDS.values()):
        return {"train": next(iter(splits.values()))}
    return splits


def split_folders(folder: Path) -> dict[str, Path]:
    """Split -> the sub-folder that is named after it."""
    return {
        _WORDS[path.name.lower()]: path
        for path in sorted(folder.iterdir())
        if path.name.lower() in _WORDS and path.is_dir()
    }


def _split_of(file: Path, is_split_folder: bool) -> str:
    if is_split_folder:
        return _WORDS[file.parent.name.lower()]
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), _SHARD.sub("", file.stem))
