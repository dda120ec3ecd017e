"""COCO's captions of 2017: about five sentences by people for each of 118,287 images.

    images[]       {"id": 9, "file_name": "000000000009.jpg"}
    annotations[]  {"image_id": 9, "id": 661611, "caption": "Some food on a tray."}

One sample a caption, in the order of `annotations`; it answers the request of `table`. The files
are `captions_train2017.json` and `captions_val2017.json`, in the root or its `annotations`; the
images lie in `train2017` and `val2017`.

Source: https://cocodataset.org/#download, "2017 Train/Val annotations", and its data format
"Image Captioning"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mipha.data.dataset import DataSet
from mipha.data.datasets import table
from mipha.data.datasets._images import image_folders
from mipha.data.datasets._records import Part, Rows, check_split
from mipha.data.faults import RecordError
from mipha.files import read_json

PARTS = {"train": "train2017", "validation": "val2017"}
"""Split to its name in COCO's files and folders."""
_LISTS = ("images", "annotations")


class CocoCaptions:
    """The captions of one file, each with the name of its image.

    Raises:
        ValueError: The file is not JSON, or lacks one of its two lists.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        content = read_json(file)
        lists = [content.get(key) if isinstance(content, dict) else None for key in _LISTS]
        if not all(isinstance(rows, list) for rows in lists):
            raise ValueError(
                f"{file} has no lists of {' and '.join(_LISTS)}: get COCO's captions file"
            )
        images, self._annotations = lists
        self._names = dict(_name_image(file, number, image) for number, image in enumerate(images))

    def __len__(self) -> int:
        return len(self._annotations)

    def name(self, index: int) -> str:
        """Return the number of the annotation, from 0."""
        return str(index)

    def where(self, index: int) -> str:
        """Return file and annotation."""
        return f"{self.file}, annotation {index}"

    def read(self, index: int) -> Any:
        """Return an annotation as a row of a table: id, image and caption.

        Raises:
            RecordError: `images` does not list its image.
        """
        row = self._annotations[index]
        if not isinstance(row, Mapping):
            return row
        image_id = row.get("image_id")
        name = self._names.get(image_id) if isinstance(image_id, int) else None
        if name is None:
            raise RecordError(
                f"its image_id is {image_id!r:.80}, which no image of the file has",
                "remove the annotation, or list its image",
                self.where(index),
            )
        return {"id": row.get("id"), "image": name, "caption": row.get("caption")}


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the captions of a split.

    Args:
        root: Folder with the captions files (or `annotations` with them) and the images' folders.
        split: `train` or `validation`.
        image_root: Folders that images may lie in, in place of the root's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another split, no root, or not a captions file.
    """
    check_split("coco_captions", split, tuple(PARTS))
    filename = f"captions_{PARTS[split]}.json"
    if root is None:
        raise ValueError(
            "coco_captions has no packaged copy: set the data's root to the folder with "
            f"{filename} and {PARTS[split]}"
        )
    places = (root / filename, root / "annotations" / filename)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"coco_captions: no file {places[0]} or {places[1]}; get it from cocodataset.org or "
            "set the data's root to where it is"
        )
    folders = image_folders(file, image_root or (root / PARTS[split],))
    return Rows([Part(f"coco_captions/{PARTS[split]}", CocoCaptions(file), folders)])


def _name_image(file: Path, number: int, image: Any) -> tuple[int, str]:
    """Return id and file name of an entry of `images`."""
    if (
        not isinstance(image, Mapping)
        or not isinstance(image.get("id"), int)
        or not isinstance(image.get("file_name"), str)
    ):
        raise ValueError(
            f'{file}, image {number} is not {{"id": number, "file_name": text}}: {str(image)[:80]}'
        )
    return image["id"], image["file_name"]


DATASET = DataSet("coco_captions", load, table.to_sample, takes_image_root=True)
