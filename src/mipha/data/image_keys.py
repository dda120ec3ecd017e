"""Which images are the same file by their content, whatever their name and place.

    ImageKeys.of(("a.jpg", "b.jpg")) -> 64 bits: equal for copies of the two in the same order

An image in a table, a tar or a folder is read once and hashed. The hash is remembered on this
machine by path, size and time of change, so that the next start reads only what is new.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mipha.data.images import ImageSource, StoredImage
from mipha.files import cache_folder

_WORTH_REMEMBERING = 65_536
"""Bytes: to read a smaller file again takes hardly longer than to look its hash up."""

_AT_A_TIME = 1_000
_SCHEMA = "CREATE TABLE IF NOT EXISTS images (place TEXT PRIMARY KEY, stamp TEXT, digest BLOB)"


def content_digest(content: bytes) -> bytes:
    """Return sixteen bytes that name the content of an image file."""
    return hashlib.blake2b(content, digest_size=16).digest()


class ImageKeys:
    """Keys of images by content; a context, at whose end new hashes are remembered.

    Args:
        file: Where hashes are remembered; None for `image-keys.sqlite` of the cache folder. If it
            cannot be read or written, all images are read.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file or cache_folder() / "image-keys.sqlite"
        self._database: sqlite3.Connection | None = None
        self._new: dict[str, tuple[str, bytes]] = {}
        self._stamps: dict[str, tuple[str, str]] = {}
        if self._file.is_file():
            self._open()

    def __enter__(self) -> ImageKeys:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._remember()
        if self._database is not None:
            self._database.close()

    def of(self, images: Sequence[ImageSource]) -> int:
        """Return a number below 2^64: equal for the same images in the same order, 0 for none.

        An image that cannot be read is named by its place; whoever opens it says so.
        """
        if not images:
            return 0
        digest = hashlib.blake2b(b"".join(map(self.digest, images)), digest_size=8)
        return int.from_bytes(digest.digest(), "big") or 1

    def digest(self, image: ImageSource) -> bytes:
        """Return the digest of an image file's content."""
        if isinstance(image, bytes):
            return content_digest(image)
        try:
            named = self._place(image)
            if named is not None and (known := self._known(*named)) is not None:
                return known
            content = image.read_bytes() if isinstance(image, Path) else image.read()
        except (ValueError, OSError):
            return content_digest(str(image).encode("utf-8", "surrogatepass"))
        found = content_digest(content)
        if named is not None and len(content) >= _WORTH_REMEMBERING:
            self._new[named[0]] = (named[1], found)
            if len(self._new) == _AT_A_TIME:
                self._remember()
        return found

    def _place(self, image: Path | StoredImage) -> tuple[str, str] | None:
        """Return the name of an image's place and a stamp of its file; None where it has none."""
        file = image if isinstance(image, Path) else getattr(image, "file", None)
        if not isinstance(file, Path):
            return None
        if isinstance(image, Path) or str(file) not in self._stamps:
            status = os.stat(file)
            named = os.path.abspath(file), f"{status.st_size} {status.st_mtime_ns}"
            if isinstance(image, Path):
                return named
            self._stamps[str(file)] = named  # once for all images of one table
        path, stamp = self._stamps[str(file)]
        return path + str(image).removeprefix(str(file)), stamp

    def _known(self, place: str, stamp: str) -> bytes | None:
        if place in self._new:
            return self._new[place][1]
        if self._database is None:
            return None
        try:
            row = self._database.execute(
                "SELECT digest FROM images WHERE place = ? AND stamp = ?", (place, stamp)
            ).fetchone()
        except sqlite3.Error:
            return None
        return row[0] if row else None

    def _open(self) -> None:
        try:
            self._database = sqlite3.connect(self._file, timeout=30)
            self._database.execute(_SCHEMA)
        except sqlite3.Error:
            self._database = None

    def _remember(self) -> None:
        """Write the new hashes; what cannot be written is read again another time."""
        if not self._new:
            return
        rows = [(place, *found) for place, found in self._new.items()]
        try:
            if self._database is None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._open()
            if self._database is not None:
                with self._database:
                    self._database.executemany(
                        "INSERT OR REPLACE INTO images VALUES (?, ?, ?)", rows
                    )
                self._new.clear()
        except (sqlite3.Error, OSError):
            pass
