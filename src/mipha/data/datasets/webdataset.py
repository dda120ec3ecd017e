"""Your own data as WebDataset tars: files side by side under one name are a sample.

That is 0001.jpg with 0001.json or 0001.txt.

The .json is a record of any of the formats of own data, the .txt a caption; the images are the
sample's own files, in their order, and paths in the .json are not read. A tar is never unpacked: an
index says where each file begins, so it must not be compressed. With `cache_gb` a tar behind an
address is read in parts (`data/blocks.py`).
"""

from __future__ import annotations

import hashlib
import io
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mipha.data.addresses import note_of
from mipha.data.blocks import Blocks, read_starts, stretches
from mipha.data.dataset import DataSet
from mipha.data.datasets._images import choose_images, image_folders, with_images
from mipha.data.datasets._records import (
    Part,
    RecordFile,
    Rows,
    files_of_no_split,
    index_files,
    parse_json,
    split_files,
)
from mipha.data.datasets._shapes import READS, sample_of, shapes_of
from mipha.data.faults import RecordError
from mipha.data.images import SUFFIXES, FileSlice, StoredImage
from mipha.data.tars import Member, is_part, members


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
        found, starts = array("q"), array("q")
        self._keys: list[str] = []
        self._suffixes: list[str] = []
        with file.open("rb") as stream:
            for member in members(stream, str(file)):
                if not self._keys or member.key != self._keys[-1]:
                    if len(self._keys) == most:
                        break
                    self._keys.append(member.key)
                    starts.append(len(found) // 3)
                if member.suffix not in self._suffixes:
                    self._suffixes.append(member.suffix)
                number = self._suffixes.index(member.suffix)
                found.extend((member.offset, member.size, number))

        self._members = np.asarray(found, dtype=np.int64).reshape(-1, 3)  # (files, 3)
        bounds = np.asarray([*starts, len(self._members)], dtype=np.int64)
        self._spans = np.stack([bounds[:-1], bounds[1:]], axis=1)  # (samples, begin and end)

        # A file by itself that is no part of a sample, such as a README, is no sample.
        parts = np.asarray([is_part(suffix) for suffix in self._suffixes], dtype=bool)
        is_read = parts[self._members[:, 2]]
        kept = [bool(is_read[begin:end].any()) for begin, end in self._spans]
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
        begin, end = self._spans[index]
        own = self._members[begin:end].tolist()
        files = [(self._suffixes[number], offset, size) for offset, size, number in own]
        return _record(self._keys[index], files, self.where(index), partial(FileSlice, self.file))


class TarImage(NamedTuple):
    """One image of a tar that is read in parts.

    Args:
        file: Index of the tar; see `data/blocks.py`.
        block: Number of the block.
        row: Number of the sample in the block.
        offset: Where the image begins in its sample, in bytes.
        size: How long it is, in bytes.
        name: What messages call it.
    """

    blocks: Blocks
    file: Path
    block: int
    row: int
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}, {self.name}"

    def read(self) -> bytes:
        """Read the bytes of the image file."""
        sample = _sample(self.blocks, self.file, self.block, self.row)
        return bytes(sample[self.offset : self.offset + self.size])


class TarParts:
    """The samples of a tar behind an address, which is read in parts.

    Args:
        file: Index of the tar, as `blocks.index_address` makes it.
        blocks: Cache that the parts are read through.

    Raises:
        ValueError: The file is the tar itself.
    """

    def __init__(self, file: Path, blocks: Blocks) -> None:
        if not note_of(file).is_file():
            raise ValueError(
                f"{file} lies on this machine, and a tar is read where it lies: leave cache_gb out"
            )
        self.file, self.blocks = file, blocks
        starts = read_starts(file)
        self._num_samples = len(starts) - 1
        self.block_starts = stretches(starts)
        """First sample of each block that is read at once, for an order in windows of blocks."""
        self.identity = [file.name, hashlib.sha256(starts.tobytes()).hexdigest()]
        """What tells the file from others, as its index has it."""

    def __len__(self) -> int:
        return self._num_samples

    def name(self, index: int) -> str:
        """Return the sample's key."""
        return self._files(index)[0].key

    def where(self, index: int) -> str:
        """Return file and number of the sample, from 0."""
        return f"{self.file}, sample number {index}"

    def read(self, index: int) -> dict[str, Any]:
        """Read one sample as a record, its images as places in the tar; as `TarRecords.read`."""
        own = self._files(index)
        files = [(member.suffix, member.offset, member.size) for member in own]
        place = partial(TarImage, self.blocks, self.file, *self._place(index))
        return _record(own[0].key, files, self.where(index), place)

    def _place(self, index: int) -> tuple[int, int]:
        """Return block and row in it."""
        block = int(np.searchsorted(self.block_starts, index, side="right")) - 1
        return block, index - int(self.block_starts[block])

    def _files(self, index: int) -> tuple[Member, ...]:
        try:
            return _files_of(self.blocks, self.file, *self._place(index))
        except ValueError as error:
            fix = "get the tar again, or make its .tar.idx again"
            raise RecordError(str(error), fix, self.where(index)) from error


def _sample(blocks: Blocks, file: Path, block: int, row: int) -> memoryview:
    """Return the bytes of a sample: a piece of a tar."""
    return memoryview(blocks.table(file, block)["sample"][row].as_buffer())


@lru_cache(maxsize=4)
def _files_of(blocks: Blocks, file: Path, block: int, row: int) -> tuple[Member, ...]:
    """Return the files of a sample; one behind it that is no part of any is left out."""
    end_mark = bytes(512)
    content = io.BytesIO(bytes(_sample(blocks, file, block, row)) + end_mark)
    found = list(members(content, f"its part of {file.name}"))
    if not found:
        raise ValueError(f"its part of {file.name} holds no file")
    return tuple(member for member in found if member.key == found[0].key)


_ONE_NAME = "its files lie side by side, and the name that they share ends at its first dot"


def _record(
    key: str,
    files: Sequence[tuple[str, int, int]],
    where: str,
    place: Callable[[int, int, str], StoredImage],
) -> dict[str, Any]:
    """Return the files of one sample as a record.

    Args:
        key: Name of the sample.
        files: Suffix, offset and size of each.
        where: File and sample, for messages.
        place: Makes a place of offset, size and name.

    Raises:
        RecordError: It has no .json and no .txt, or one that is broken.
    """
    # Sort the sample's files.
    images = [(offset, size) for suffix, offset, size in files if suffix in SUFFIXES]
    records, captions = (
        [_text(place(offset, size, where), where) for own, offset, size in files if own == suffix]
        for suffix in (".json", ".txt")
    )
    if len(records) > 1 or len(captions) > 1:
        raise RecordError(
            f"it has {len(records)} .json and {len(captions)} .txt files",
            f"wanted one of each at most; {_ONE_NAME}",
            where,
        )
    if not records and not captions:
        raise RecordError(
            "it has no .json and no .txt beside its image",
            f"add a .txt with a caption, or a .json with a record; {_ONE_NAME}",
            where,
        )
    if not records and not images:
        raise RecordError("it has a .txt and no image", f"add the image; {_ONE_NAME}", where)

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
    names = [key if len(images) == 1 else f"{key} image {number}" for number in range(len(images))]
    places = [place(offset, size, name) for (offset, size), name in zip(images, names, strict=True)]
    content = with_images(content, places)

    # A .json that only says where the image came from leaves the words to the .txt.
    if captions and shapes_of(content):
        content[".txt"] = captions[0]
    elif captions:
        content["caption"] = captions[0].strip()
    others = {suffix for suffix, _, _ in files if not is_part(suffix)}
    return content | dict.fromkeys(sorted(others), "a file of the tar")


def _text(place: StoredImage, where: str) -> str:
    try:
        return place.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"its text is not UTF-8: {error}", "save the text as UTF-8", where
        ) from error


def load(
    root: Path | None,
    split: str,
    unreadable_shards: str = "fail",
    cache_gb: float | None = None,
) -> Rows:
    """Index the tars of a split.

    Args:
        root: A tar (its one split is `train`), or a folder with one or more a split:
            train-000000.tar, 000000.tar.
        split: Name of the split.
        unreadable_shards: `skip` leaves out tars that cannot be read.
        cache_gb: Size of the cache that tars behind an address are read through; None: they lie
            here.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No such split, or tars cannot be read; all are named.
    """
    files = split_files("webdataset", root, split, (".tar",))
    index: Callable[[Path], RecordFile] = TarRecords
    if cache_gb is not None and root is not None:
        index = partial(TarParts, blocks=Blocks.of(root, cache_gb))
    indexed, left_out = index_files(files, index, unreadable_shards == "skip")
    parts = [
        Part(f"webdataset/{name}", records, image_folders(file)) for name, file, records in indexed
    ]
    others = files_of_no_split(root, split, (".tar",))
    return Rows(parts, "; ".join(filter(None, (left_out, others))) or None)


def _parse(text: str, where: str) -> Mapping[str, Any]:
    try:
        content = parse_json(text)
    except RecordError as error:
        raise error.at(where) from error
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"its .json is not valid JSON: {error}", "write it again", where
        ) from error
    if not isinstance(content, Mapping):
        raise RecordError(f"its .json is {str(content)[:80]}", "wanted an object", where)
    return content


DATASET = DataSet(
    "webdataset",
    load,
    sample_of,
    takes=("unreadable_shards", "cache_gb"),
    reads=(*READS, "window_rows"),
)
