"""What the readers of record files share: one row, the images it names, and paths that stay where they belong."""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from mipha.data.images import ImageSource, StoredImage
from mipha.data.sample import IMAGE, Message, Sample

IMAGE_COLUMNS = (
    "images",
    "image",
    "image_path",
    "image_file",
    "file_name",
    "filename",
    "img",
    "picture",
    "path",
)
"""Names under which a record gives its images; the first that is there and not empty counts."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


class ImageFolders(NamedTuple):
    """Where a record file's images may be.

    Args:
        base: A relative path starts here.
        allowed: An image lies in one of these or below, when all links are followed; real paths.
    """

    base: Path
    allowed: tuple[str, ...]


class Row(NamedTuple):
    """One record of own data, whatever it was read from.

    Args:
        dataset: Module that reads it.
        id: Names the sample.
        where: Names file and row in messages.
        content: The record as it stands in the file.
        folders: Where its images may be.
    """

    dataset: str
    id: str
    where: str
    content: Any
    folders: ImageFolders


def check_split(dataset: str, split: str, splits: Sequence[str]) -> None:
    """Raise a `ValueError` that names the splits, unless `split` is one of them."""
    if split not in splits:
        raise ValueError(
            f"{dataset} has no split {split!r}: use {' or '.join(splits) or 'a folder that holds one'}"
        )


def image_folders(
    file: Path, image_root: Sequence[Path] = (), base: Path | None = None
) -> ImageFolders:
    """The folders that the records of a file may read images from.

    The file's own folder, the recipe's `image_root`, and, where the file is a link, the folder that it links to: in the hub's
    download cache every file of a data set is a link into one such folder.

    Args:
        file: The record file.
        image_root: The recipe's; a relative path starts from the first, where there is one.
        base: Where a relative path starts without an `image_root`; null: the file's folder.
    """
    own = (file.parent, Path(os.path.realpath(file)).parent)
    base = image_root[0] if image_root else base or file.parent
    return ImageFolders(
        base, tuple(dict.fromkeys(os.path.realpath(folder) for folder in (*own, *image_root)))
    )


def path_inside(folders: ImageFolders, path: Any, where: str) -> Path:
    """The file that a record names, which must lie in one of the allowed folders when all links are followed.

    Raises:
        ValueError: The path is no text, is empty, is an address, or leads out; `where` names file and row.
    """
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ValueError(
            f"{where}: the image path is {_short(path)}; wanted a path inside {folders.base}"
        )
    if _ADDRESS.match(path):
        raise ValueError(
            f"{where}: the image path {_short(path)} is an address; nothing is downloaded, so give the path of a file"
        )
    if ("\\" in path or path[1:2] == ":") and _leads_out_on_windows(path):
        raise ValueError(
            f"{where}: the image path {path!r} leads out of {folders.base}; give a relative path with / and without `..`"
        )
    file = folders.base / path
    try:
        real = _real(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{where}: the image path {_short(path)} cannot be followed: {error}"
        ) from error
    if not any(real.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders.allowed):
        raise ValueError(
            f"{where}: the image path {_short(path)} leads out of {folders.base}, to {real}; "
            f"give a path inside it, or allow the other folder with image_root=[{folders.base}, {os.path.dirname(real)}]"
        )
    return file


def image_source(value: Any, folders: ImageFolders, where: str) -> ImageSource:
    """What a record gives as one image: a path, a `data:` address with the bytes in it, or an object that holds one of these.

    Raises:
        ValueError: It is nothing of the kind, or its path leads out; `where` names file and row.
    """
    if isinstance(value, Mapping):
        value = next(
            (value[key] for key in ("bytes", "path", "image", "url") if value.get(key) is not None),
            None,
        )
    if isinstance(value, str):
        return (
            _from_data_uri(value, where)
            if value.startswith("data:")
            else path_inside(folders, value, where)
        )
    if isinstance(value, bytes | StoredImage):
        return value
    return path_inside(folders, value, where)


def image_values(content: Mapping[str, Any], where: str) -> list[Any]:
    """What a record gives as its images, in order; empty for a record that is text alone.

    Raises:
        ValueError: `images` is not a list; `where` names file and row.
    """
    column = next((name for name in IMAGE_COLUMNS if content.get(name) is not None), None)
    if column is None:
        return []
    value = content[column]
    if column == "images" and not isinstance(value, (list, tuple)):
        raise ValueError(f'{where}: "images" is {_short(value)}; wanted a list of paths')
    return list(value) if isinstance(value, list) else [value]


def with_images(content: Mapping[str, Any], images: Sequence[ImageSource]) -> dict[str, Any]:
    """A record whose images are these, whatever it says itself: they lie beside it in the same file."""
    rest = {name: value for name, value in content.items() if name not in IMAGE_COLUMNS}
    return rest | ({"image": images[0]} if len(images) == 1 else {"images": list(images)})


def make_sample(row: Row, messages: Sequence[Message], images: Sequence[Any]) -> Sample:
    """A row's turns and images as a sample.

    Raises:
        ValueError: An image, the markers or the roles do not fit; the message names file and row.
    """
    sources = tuple(image_source(image, row.folders, row.where) for image in images)
    name = row.content.get("id")
    sample_id = row.id + (
        f"/{name}" if isinstance(name, str | int) else ""
    )  # published ids repeat, rows do not
    try:
        return Sample(sample_id, tuple(messages), sources)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def images_first(messages: Sequence[Message], num_images: int) -> Sequence[Message]:
    """The turns with all images, a line each, at the front of the first user turn, unless some turn says where they go."""
    if num_images == 0 or any(IMAGE in message.text for message in messages):
        return messages
    for number, message in enumerate(messages):
        if message.role == "user":
            return [
                *messages[:number],
                Message("user", f"{IMAGE}\n" * num_images + message.text),
                *messages[number + 1 :],
            ]
    return messages


def _from_data_uri(value: str, where: str) -> bytes:
    head, comma, content = value.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it does not begin with data:image/...;base64,")
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise ValueError(
            f"{where}: the image {_short(value)} is not valid base64: {error}"
        ) from error


def _leads_out_on_windows(path: str) -> bool:
    """A record may have been written on Windows, or for it: C:\\x, \\x, a\\..\\x."""
    windows = PureWindowsPath(path)
    return bool(windows.drive or windows.root) or ".." in windows.parts


def _real(file: Path) -> str:
    """A path with all links followed; folders are looked up once, for there are few of them."""
    folder, name = os.path.split(os.path.join(os.getcwd(), file))
    real = os.path.join(_real_folder(folder), name)
    try:
        is_link = stat.S_ISLNK(os.lstat(real).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_link = False  # whoever opens it says that it is missing
    return os.path.realpath(real) if is_link or name in ("", ".", "..") else real


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _short(value: Any) -> str:
    return repr(
        value[:80] if isinstance(value, str) else str(value)[:80] if value is not None else None
    )
