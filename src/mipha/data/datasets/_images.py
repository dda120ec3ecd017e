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
from urllib.parse import unquote

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
"""Names under which a record gives its images; the first counts that is not None or []."""

# image_1, image2, img_b, picture 3; left_image; image_after: several columns of one image each.
_KIND = r"(?:image|img|picture|photo|pic)s?"
_PLACE = r"(?:left|right|first|second|third|before|after|top|bottom|reference|target|query)"
_SERIES = re.compile(
    rf"{_KIND}[_ -]?(?:path|file)?[_ -]?(?P<number>\d{{1,2}}|[a-d])(?:_(?:path|file))?"
    rf"|{_PLACE}[_ -]{_KIND}(?:_(?:path|file))?|{_KIND}[_ -]{_PLACE}",
    re.IGNORECASE,
)

_BASE64_IMAGES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""How base64 of a JPEG, PNG, GIF or WebP begins."""

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


def choose_images(content: Mapping[str, Any]) -> list[str]:
    """Return the keys that hold a record's images, in order; none for a record of text alone.

    That is the first usual name, and then every column of a series, such as image_1 and image_2,
    or left_image and right_image.
    """
    names = [name for name in IMAGE_COLUMNS if content.get(name) not in (None, [])][:1]
    series = [
        name
        for name, value in content.items()
        if isinstance(name, str) and _place_in_series(name) is not None and _may_be_image(value)
    ]
    if not series:
        return names
    if series and names and names[0] in ("file_name", "filename", "path"):
        names = []  # a path beside the images says where the row comes from
    return [*names, *sorted(series, key=lambda name: _place_in_series(name) or 0)]


def _may_be_image(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, bytes | Mapping | StoredImage)


@lru_cache(maxsize=4096)
def _place_in_series(name: str) -> int | None:
    """Return the number or letter of image_2 as a number, 0 for left and right; None for others."""
    found = _SERIES.fullmatch(name.strip())
    if found is None:
        return None
    number = found["number"]
    return 0 if number is None else int(number) if number.isdigit() else ord(number.lower())


def with_images(content: Mapping[str, Any], images: Sequence[ImageSource]) -> dict[str, Any]:
    """Return a record whose images are these, which lie beside it in the same file.

    What the record itself says about its images is dropped.
    """
    named = {*IMAGE_COLUMNS, *choose_images(content)}
    rest = {name: value for name, value in content.items() if name not in named}
    return rest | ({"image": images[0]} if len(images) == 1 else {"images": list(images)})


def image_source(value: Any, folders: ImageFolders, where: str) -> ImageSource:
    """Return one image of a record.

    Args:
        value: A path, a `data:` address with the bytes in it, base64 alone, bytes, a stored image,
            or an object that holds one of these.
        folders: Where the image may be.
        where: File and line of the record.

    Raises:
        RecordError: The value is none of these, or its path leads out of the folders.
    """
    if isinstance(value, Mapping):
        keys = ("bytes", "path", "image", "url")
        value = next((value[key] for key in keys if value.get(key) is not None), None)

    if isinstance(value, str):  # first, because the other question takes longer
        if value[:5].lower() == "data:":
            return _from_data_uri(value, where)
        if is_base64_image(value):
            return _from_data_uri(f"data:image;base64,{value}", where)
        return path_inside(folders, value, where)
    if isinstance(value, bytes | StoredImage):
        return value
    return path_inside(folders, value, where)


def is_base64_image(value: str) -> bool:
    """Return whether a text is the base64 of an image, as far as its beginning tells."""
    return len(value) > 200 and value.startswith(_BASE64_IMAGES)


def file_path(value: str) -> str:
    """Return the path that a `file://` address names; any other text as it is."""
    if value[:5].lower() != "file:":
        return value
    path = value[5:]
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        path = slash + rest if host.lower() in ("", "localhost") else path[2:]
    return unquote(path)


def path_inside(folders: ImageFolders, path: Any, where: str) -> Path:
    """Return the file that a record names, which must lie in one of the allowed folders.

    Raises:
        RecordError: The path is not text, is empty, is an address, or leads out of the folders
            when all links are followed.
    """
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise RecordError(
            f"the image path is {short(path)}", f"wanted a path inside {folders.base}", where
        )

    path = file_path(path)
    if _ADDRESS.match(path):
        raise RecordError(
            f"the image path {short(path)} is an address",
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
        if "\\" in path and not file.exists():  # written on Windows
            file = folders.base / path.replace("\\", "/")
        real = _real(file)
    except (OSError, ValueError) as error:
        raise RecordError(
            f"the image path {short(path)} cannot be followed: "
            f"{getattr(error, 'strerror', None) or error}",
            f"give a path inside {folders.base}",
            where,
        ) from error

    if not any(real.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders.allowed):
        fix = (
            "give a path inside it, or allow the other folder with "
            f"image_root=[{folders.base}, {os.path.dirname(real)}]"
            if os.path.exists(real)
            else f"there is no such file, so give the path of a file inside {folders.base}"
        )
        raise RecordError(
            f"the image path {short(path)} leads out of {folders.base}, to {real}",
            fix,
            where,
            "outside-path",
        )
    return file


def _from_data_uri(value: str, where: str) -> bytes:
    head, comma, content = value.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it does not begin with data:image/...;base64,")
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        raise RecordError(
            f"the image {short(value)} is not valid base64: {error}", "encode it again", where
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


def is_list(value: Any) -> bool:
    """Return whether a value is a list; a stored image is a tuple with names, and no list."""
    return isinstance(value, list) or type(value) is tuple


def short(value: Any) -> str:
    if value is None:
        return "None"
    return repr(value[:80] if isinstance(value, str) else str(value)[:80])
