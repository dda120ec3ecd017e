"""Your own data as WebDataset tars: files side by side under one name are a sample.

That is 0001.jpg with 0001.json or 0001.txt.

The .json is a record of any of the formats of own data, the .txt a caption; the images are the
sample's own files, in their order, and paths in the .json are not read. A tar is never unpacked: an
index says where each file begins, so it must not be compressed.

Source of the layout: https://webdataset.github.io/webdataset, a file's key ends at the first dot of
its name
"""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mipha.data.dataset import DataSet
from mipha.data.datasets._images import choose_images, image_folders, with_images
from mipha.data.datasets._records import Part, Rows, index_files, split_files
from mipha.data.datasets._shapes import READS, sample_of, shapes_of
from mipha.data.faults import RecordError
from mipha.data.images import SUFFIXES, FileSlice

_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)
_IMAGE, _JSON, _TEXT, _OTHER = 0, 1, 2, 3  # and _OTHER + n for the n-th other suffix


class TarRecords:
    """The samples of a tar; a million take about 150 MB.

    Args:
        file: An uncompressed tar.
        most: Number of samples to index; None for all.

    Raises:
        ValueError: The file is not a tar, is compressed or cut short, or holds links.
    """

    def __init__(self, file: Path, most: int | None = None) -> None:
        self.file = file
        members, starts = array("q"), array("q")
        self._keys: list[str] = []
        self._others: list[str] = []  # suffixes of files that are no part of a sample
        try:
            with tarfile.open(file, "r:") as tar:
                while (member := tar.next()) and not (most is not None and len(self._keys) > most):
                    tar.members = []  # else the tar keeps a kilobyte of each
                    kind = self._kind_of(member)
                    if kind is None:
                        continue
                    key = _NAME.fullmatch(member.name)[1]
                    if not self._keys or key != self._keys[-1]:
                        self._keys.append(key)
                        starts.append(len(members) // 3)
                    members.extend((member.offset_data, member.size, kind))
        except (tarfile.TarError, EOFError) as error:
            compressed = _is_compressed(file)
            fix = "decompress it (gunzip), keep the tar" if compressed else "is it cut short?"
            raise ValueError(f"{file} cannot be read as a tar: {error}; {fix}") from error

        # One more was read, because only then is the one before it known to be whole.
        if most is not None and len(self._keys) > most:
            del self._keys[most:]
        self._members = np.asarray(members, dtype=np.int64).reshape(-1, 3)  # (files, 3)
        starts = starts[: len(self._keys) + 1]
        bounds = np.asarray([*starts, len(self._members)], dtype=np.int64)[: len(self._keys) + 1]
        self._spans = np.stack([bounds[:-1], bounds[1:]], axis=1)  # (samples, begin and end)

        # A file by itself that is no part of a sample, such as a README, is no sample.
        kinds = self._members[:, 2]
        kept = [bool((kinds[begin:end] < _OTHER).any()) for begin, end in self._spans]
        if not all(kept):
            self._spans = self._spans[kept]
            self._keys = [key for key, keep in zip(self._keys, kept, strict=True) if keep]

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        """Return the sample's key."""
        return self._keys[index]

    def where(self, index: int) -> str:
        """Return file and key."""
        return f"{self.file}, sample {self._keys[index]}"

    def read(self, index: int) -> dict[str, Any]:
        """Read one sample as a record, its images as places in the tar.

        Raises:
            RecordError: It has no .json and no .txt, or one that is broken.
        """
        # Sort the sample's files.
        where = self.where(index)
        begin, end = self._spans[index]
        own = self._members[begin:end].tolist()
        images = [(offset, size) for offset, size, kind in own if kind == _IMAGE]
        records = [self._text(offset, size, where) for offset, size, kind in own if kind == _JSON]
        captions = [self._text(offset, size, where) for offset, size, kind in own if kind == _TEXT]
        if len(records) > 1 or len(captions) > 1:
            raise RecordError(
                f"it has {len(records)} .json and {len(captions)} .txt files",
                "wanted one of each at most",
                where,
            )
        if not records and not captions:
            raise RecordError(
                "it has no .json and no .txt beside its image",
                "add a .txt with a caption, or a .json with a record",
                where,
            )

        # Put its images instead of those that the record names.
        content = _parse(records[0], where) if records else {}
        num_named = sum(
            len(value) if isinstance(value := content[name], list) else 1
            for name in choose_images(content)
        )
        if num_named > len(images):
            raise RecordError(
                f"its .json names {num_named} images, and {len(images)} lie beside it",
                "pack all of them under one name: 0001.0.jpg, 0001.1.jpg, 0001.json",
                where,
                "missing-image",
            )
        names = [
            self._keys[index] if len(images) == 1 else f"{self._keys[index]} image {number}"
            for number in range(len(images))
        ]
        slices = [
            FileSlice(self.file, offset, size, name)
            for (offset, size), name in zip(images, names, strict=True)
        ]
        content = with_images(content, slices)

        # A .json that only says where the image came from leaves the words to the .txt.
        if captions and shapes_of(content):
            content[".txt"] = captions[0]
        elif captions:
            content["caption"] = captions[0].strip()
        others = {self._others[kind - _OTHER] for _, _, kind in own if kind >= _OTHER}
        return content | dict.fromkeys(sorted(others), "a file of the tar")

    def _kind_of(self, member: tarfile.TarInfo) -> int | None:
        """Return what a file of the tar is to its sample; None for a folder or a nameless file."""
        if member.isdir():
            return None
        if not member.isreg() or member.issparse():
            raise ValueError(
                f"{self.file} holds {member.name!r}, which is a link or no plain file; "
                "pack the files themselves"
            )
        name = _NAME.fullmatch(member.name)
        if not name:
            return None
        suffix = "." + name[2].lower().rpartition(".")[2]
        if suffix in SUFFIXES:
            return _IMAGE
        if suffix in (".json", ".txt"):
            return _JSON if suffix == ".json" else _TEXT
        if suffix not in self._others:
            self._others.append(suffix)
        return _OTHER + self._others.index(suffix)

    def _text(self, offset: int, size: int, where: str) -> str:
        try:
            return FileSlice(self.file, offset, size, where).read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError(
                f"its text is not UTF-8: {error}", "save the text as UTF-8", where
            ) from error


def load(root: Path | None, split: str, unreadable_shards: str = "fail") -> Rows:
    """Index the tars of a split.

    Args:
        root: A tar (its one split is `train`), or a folder with one or more a split:
            train-000000.tar, 000000.tar.
        split: Name of the split.
        unreadable_shards: `skip` leaves out tars that cannot be read.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No such split, or tars cannot be read; all are named.
    """
    files = split_files("webdataset", root, split, (".tar",))
    indexed, left_out = index_files(files, TarRecords, unreadable_shards == "skip")
    parts = [
        Part(f"webdataset/{name}", records, image_folders(file)) for name, file, records in indexed
    ]
    return Rows(parts, left_out)


def _parse(text: str, where: str) -> Mapping[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"its .json is not valid JSON: {error}", "write it again", where
        ) from error
    if not isinstance(content, Mapping):
        raise RecordError(f"its .json is {str(content)[:80]}", "wanted an object", where)
    return content


def _is_compressed(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


DATASET = DataSet("webdataset", load, sample_of, takes=("unreadable_shards",), reads=READS)
