"""Your own data as a folder of images: a caption beside each, or a metadata file.

Captions are cat.jpg with cat.txt; metadata is metadata.jsonl or metadata.csv (`file_name`, ...).

The folder itself, or one folder a split: train, validation, test. Sub-folders are searched. The
metadata's other columns are `text` or `caption`, `question` and `answer`, or a conversation:
whatever the other formats of own data read.

Source of the layout: https://huggingface.co/docs/datasets/image_dataset, imagefolder
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mipha.data.dataset import DataSet
from mipha.data.datasets._images import image_folders
from mipha.data.datasets._records import (
    Part,
    Rows,
    check_split,
    first_of,
    record_file,
    split_folders,
)
from mipha.data.datasets._shapes import READS, sample_of
from mipha.data.faults import RecordError
from mipha.data.images import SUFFIXES

METADATA = ("metadata.jsonl", "metadata.csv")


class CaptionedImages:
    """The images of a folder and its sub-folders, in the order of their paths.

    Each has a text file of the same name beside it. `alone` names the text files without an image.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._images: list[str] = []
        self.alone: list[str] = []
        self._in_capitals: set[str] = set()
        for place, _, names in os.walk(folder):
            images = [name for name in names if _is_image_name(name)]
            captioned = {os.path.splitext(name)[0] for name in images}
            texts = [name for name in names if name[-4:].lower() == ".txt" and name[0] != "."]
            lone = [name for name in texts if name[:-4] not in captioned]
            capitals = [name for name in texts if name.endswith(".TXT")]
            self._in_capitals.update(os.path.join(place, name) for name in capitals)
            self._images += [os.path.relpath(os.path.join(place, name), folder) for name in images]
            self.alone += [_caption_alone(place, name, names, folder) for name in lone]
        self._images.sort()
        self.alone.sort()

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """Return the image's path in the folder."""
        return Path(self._images[index]).as_posix()

    def where(self, index: int) -> str:
        """Return the image's path."""
        return str(self.folder / self._images[index])

    def caption(self, index: int) -> Path:
        """Return the text file that belongs to the image."""
        caption = (self.folder / self._images[index]).with_suffix(".txt")
        capitals = caption.with_suffix(".TXT")
        return capitals if str(capitals) in self._in_capitals else caption

    def read(self, index: int) -> dict[str, str]:
        """Read the image's path and its caption.

        Raises:
            RecordError: It has no caption, or one that is not UTF-8.
        """
        caption = self.caption(index)
        if not caption.is_file():
            raise RecordError(
                f"it has no caption {caption.name} beside it",
                "write one, or remove the image",
                self.where(index),
            )
        try:
            text = caption.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise RecordError(
                f"its caption {caption.name} is not UTF-8",
                "save the caption as UTF-8",
                self.where(index),
            ) from error
        return {"image": self._images[index], "caption": text.strip()}


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """List the images, or index the metadata, of a split.

    Args:
        root: The folder; `train` is its one split, unless it has folders named after splits.
        split: Name of the split.
        image_root: Folders that links inside the folder may lead to.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: No root, or no such split.
    """
    if root is None:
        raise ValueError(
            "image_folder has no packaged copy: set the data's root to a folder of images"
        )
    if not root.is_dir():
        raise FileNotFoundError(f"image_folder: no folder {root}; check the data's root")
    folders = split_folders(root) or {"train": root}
    if split == "train" and split not in folders:
        raise ValueError(
            f"image_folder in {root} has the folders {' and '.join(sorted(folders))} and no train: "
            "put what is to be trained on into a folder of that name, or set the data's split"
        )
    check_split(f"image_folder in {root}", split, sorted(folders))

    folder = folders[split]
    prefix = "/".join(["image_folder", *folder.relative_to(root).parts])
    if metadata := metadata_of(folder):
        allowed = image_folders(metadata, image_root, base=folder)
        return Rows([Part(prefix, record_file(metadata), allowed)])

    # A caption stands for the record file: in the hub's download cache both it and the image are
    # links into one folder.
    images = CaptionedImages(folder)
    file = images.caption(0) if len(images) else folder / "none"
    allowed = image_folders(file, image_root, base=folder)
    allowed = allowed._replace(allowed=(*allowed.allowed, os.path.realpath(folder)))
    return Rows([Part(prefix, images, allowed)])


def left_out(root: Path | None, split: str) -> str | None:
    """Return a sentence on what of a folder no split reads; None if there is nothing."""
    assert root is not None
    splits = split_folders(root)
    folder = splits.get(split, root)
    metadata = metadata_of(folder)

    # Find captions alone, further metadata, and images outside the folders of all splits.
    alone = [] if metadata else CaptionedImages(folder).alone
    others: list[str] = []
    outside: list[str] = []
    for place, _, names in os.walk(root):
        paths = [Path(place, name) for name in names if name in METADATA or _is_image_name(name)]
        if Path(place).is_relative_to(folder):
            others += [str(p.relative_to(root)) for p in paths if p.name in METADATA]
        elif not any(Path(place).is_relative_to(each) for each in splits.values()):
            outside += [str(p.relative_to(root)) for p in paths if _is_image_name(p.name)]
    if metadata:
        others.remove(str(metadata.relative_to(root)))

    said = (
        (alone, "captions have no image that can be read beside them"),
        (others, "files of metadata are not read"),
        (outside, "images are not read, because they lie in no folder of a split"),
    )
    return (
        "; ".join(
            f"{len(names)} {what}: {first_of(sorted(names))}" for names, what in said if names
        )
        or None
    )


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def _caption_alone(place: str, name: str, names: Sequence[str], folder: Path) -> str:
    """Return the path of a caption without an image, and of the file that may be meant."""
    path = os.path.relpath(os.path.join(place, name), folder)
    beside = [other for other in names if other != name and os.path.splitext(other)[0] == name[:-4]]
    return f"{path} (beside {beside[0]})" if beside else path


def metadata_of(folder: Path) -> Path | None:
    """Return the folder's metadata file, if it has one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


DATASET = DataSet(
    "image_folder", load, sample_of, takes_image_root=True, reads=READS, left_out=left_out
)
