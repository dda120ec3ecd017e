"""Your own data as a folder of pictures: a caption beside each (cat.jpg, cat.txt), or metadata.jsonl / metadata.csv (`file_name`, ...).

The folder itself, or one folder a split: train, validation, test. Sub-folders are looked through. The metadata's other columns are
`text` or `caption`, `question` and `answer`, or a conversation: whatever the other formats of own data read.
Source of the layout: https://huggingface.co/docs/datasets/image_dataset, imagefolder
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mipha.data.datasets._index import Part, Rows, record_file
from mipha.data.datasets._records import Row, check_split, image_folders
from mipha.data.datasets._shapes import sample_of
from mipha.data.datasets._splits import split_folders
from mipha.data.images import SUFFIXES
from mipha.data.sample import Sample

METADATA = ("metadata.jsonl", "metadata.csv")


class CaptionedPictures:
    """The pictures of a folder, and its sub-folders, in the order of their paths; each with a text file of the same name beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pictures = sorted(
            os.path.relpath(os.path.join(place, name), folder)
            for place, folders, names in os.walk(folder)
            for name in names
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        )

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, index: int) -> str:
        """The picture's path in the folder."""
        return Path(self._pictures[index]).as_posix()

    def where(self, index: int) -> str:
        """The picture's path."""
        return str(self.folder / self._pictures[index])

    def caption(self, index: int) -> Path:
        """The text file that belongs to the picture."""
        return (self.folder / self._pictures[index]).with_suffix(".txt")

    def read(self, index: int) -> dict[str, str]:
        """The picture and its caption.

        Raises:
            ValueError: It has no caption, or one that is not UTF-8.
        """
        caption = self.caption(index)
        if not caption.is_file():
            raise ValueError(
                f"{self.where(index)} has no caption {caption.name} beside it: write one, or remove the picture"
            )
        try:
            return {
                "image": self._pictures[index],
                "caption": caption.read_bytes().decode("utf-8-sig").strip(),
            }
        except UnicodeDecodeError as error:
            raise ValueError(f"{caption} is not UTF-8: save the caption as UTF-8") from error


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """List the pictures, or index the metadata, of a split.

    Args:
        root: The folder; `train` is its one split, unless it has folders named after splits.
        split: Which.
        image_root: Folders that links inside the folder may lead to.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: No root, or no such split.
    """
    if root is None:
        raise ValueError(
            "image_folder has no packaged copy: set the data's root to a folder of pictures"
        )
    if not root.is_dir():
        raise FileNotFoundError(f"image_folder: no folder {root}; check the data's root")
    folders = split_folders(root) or {"train": root}
    check_split(f"image_folder in {root}", split, sorted(folders))
    folder = folders[split]
    prefix = "/".join(["image_folder", *folder.relative_to(root).parts])
    if metadata := metadata_of(folder):
        return Rows(
            "image_folder",
            [Part(prefix, record_file(metadata), image_folders(metadata, image_root, base=folder))],
        )
    pictures = CaptionedPictures(folder)
    # A caption stands for the record file: in the hub's download cache both it and the picture are links into one folder.
    folders = (
        image_folders(pictures.caption(0), image_root, base=folder)
        if len(pictures)
        else image_folders(folder / "none")
    )
    return Rows(
        "image_folder",
        [
            Part(
                prefix,
                pictures,
                folders._replace(allowed=(*folders.allowed, os.path.realpath(folder))),
            )
        ],
    )


def to_sample(record: Row, root: Path | None) -> Sample:
    """One picture and what is said about it; the record knows its file, so `root` is not read.

    Raises:
        ValueError: The record is broken, or leads out of the folder; the message names file and row.
    """
    return sample_of(record)


def metadata_of(folder: Path) -> Path | None:
    """The folder's metadata file, if it has one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)
