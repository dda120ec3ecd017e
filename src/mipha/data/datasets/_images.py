"""The images that a record names: paths that may not lead out, base64, bytes, stored images."""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from mipha.data.faults import RecordError
from mipha.data.images import ImageSource, StoredImage

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
    """Where the images of a record file may be.

    Args:
        base: Folder that a relative path starts from.
        allowed: Real paths of folders; an image lies in one of them or below, after all links are
            followed.
    """

    base: Path
    allowed: tuple[str, ...]


def image_folders(
    file: Path, image_root: Sequence[Path] = (), base: Path | None = None
) -> ImageFolders:
    """Return the folders that the records of a file may read images from.

    These are the file's own folder, the recipe's `image_root`, and, where the file is a link, the
    folder that it links to: in the hub's download cache every file of a data set is a link into
    one such folder.

    Args:
        file: The record file.
        image_root: The recipe's folders; a relative path starts from the first, if there is one.
        base: Folder that a relative path starts from without an `image_root`; None for the file's
            folder.
    """
    own = (file.parent, Path(os.path.realpath(file)).parent)
    base = image_root[0] if image_root else base or file.parent
    return ImageFolders(
        base, tuple(dict.fromkeys(os.path.realpath(folder) for folder in (*own, *image_root)))
    )


def image_values(content: Mapping[str, Any], where: str) -> list[Any]:
    """Return what a record gives as its images, in order; empty for a record of text alone.

    Raises:
        RecordError: `images` is not a list.
    """
    column = next((name for name in IMAGE_COLUMNS if content.get(name) is not None), None)
    if column is None:
        return []

    value = content[column]
    if column == "images" and not isinstance(value, (list, tuple)):
        raise RecordError(f'"images" is {_short(value)}', "wanted a list of paths", where)
    return list(value) if isinstance(value, list) else [value]


def with_images(content: Mapping[str, Any], images: Sequence[ImageSource]) -> dict[str, Any]:
    """Return a record whose images are these, which lie beside it in the same file.

    What the record itself says about its images is dropped.
    """
    rest = {name: value for name, value in content.items() if name not in IMAGE_COLUMNS}
    return rest | ({"image": images[0]} if len(images) == 1 else {"images": list(images)})


def image_source(value: Any, folders: ImageFolders, where: str) -> ImageSource:
    """Return one image of a record.

    Args:
        value: A path, a `data:` address with the bytes in it, bytes, a stored image, or an object
            that holds one of these.
        folders: Where the image may be.
        where: File and line of the record.

    Raises:
        RecordError: The value is none of these, or its path leads out of the folders.
    """
    if isinstance(value, Mapping):
        keys = ("bytes", "path", "image", "url")
        value = next((value[key] for key in keys if value.get(key) is not None), None)

    if isinstance(value, bytes | StoredImage):
        return value
    if isinstance(value, str) and value.startswith("data:"):
        return _from_data_uri(value, where)
    return path_inside(folders, value, where)


def path_inside(folders: ImageFolders, path: Any, where: str) -> Path:
    """Return the file that a record names, which must lie in one of the allowed folders.

    Raises:
        RecordError: The path is not text, is empty, is an address, or leads out of the folders
            when all links are followed.
    """
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise RecordError(
            f"the image path is {_short(path)}", f"wanted a path inside {folders.base}", where
        )

    if _ADDRESS.match(path):
        raise RecordError(
            f"the image path {_short(path)} is an address",
            "nothing is downloaded, so give the path of a file",
            where,
            "missing-image",
        )

    if ("\\" in path or path[1:2] == ":") and _leads_out_on_windows(path):
        raise RecordError(
            f"the image path {path!r} leads out of {folders.base}",
            "give a relative path with / and without `..`",
            where,
            "outside-path",
        )

    file = folders.base / path
    try:
        real = _real(file)
    except (OSError, ValueError) as error:
        raise RecordError(
            f"the image path {_short(path)} cannot be followed: {error}",
            f"give a path inside {folders.base}",
            where,
        ) from error

    if not any(real.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders.allowed):
        raise RecordError(
            f"the image path {_short(path)} leads out of {folders.base}, to {real}",
            "give a path inside it, or allow the other folder with "
            f"image_root=[{folders.base}, {os.path.dirname(real)}]",
            where,
            "outside-path",
        )
    return file


def _from_data_uri(value: str, where: str) -> bytes:
    head, comma, content = value.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it does not begin with data:image/...;base64,")
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise RecordError(
            f"the image {_short(value)} is not valid base64: {error}", "encode it again", where
        ) from error


def _leads_out_on_windows(path: str) -> bool:
    """Whether a path that was written on Windows, or for it, leads out: C:\\x, \\x, a\\..\\x."""
    windows = PureWindowsPath(path)
    return bool(windows.drive or windows.root) or ".." in windows.parts


def _real(file: Path) -> str:
    """Return a path with all links followed; each folder is looked up once."""
    folder, name = os.path.split(os.path.join(os.getcwd(), file))
    real = os.path.join(_real_folder(folder), name)
    try:
        is_link = stat.S_ISLNK(os.lstat(real).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_link = False  # whoever opens the file says that it is missing
    return os.path.realpath(real) if is_link or name in ("", ".", "..") else real


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _short(value: Any) -> str:
    if value is None:
        return "None"
    return repr(value[:80] if isinstance(value, str) else str(value)[:80])
