"""Files of records, indexed: JSON lines, JSON lists, tables; each record knows file and line.

    split_files --> JsonRecords, TableRecords, ... --Rows--> Row --to_sample of a format--> Sample

An index holds where each record begins, 16 to 24 bytes a record whatever the records hold; a
record is read when it is asked for. No file stays open, so an index may be copied to another
process.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import mmap
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from mipha.data.datasets._images import ImageFolders, image_folders, image_source
from mipha.data.datasets._keys import DEEPEST, TURNS, Keys, is_deep, parse_list
from mipha.data.datasets._regions import place_regions
from mipha.data.faults import FaultKind, RecordError
from mipha.data.images import ImageSource
from mipha.data.regions import Region
from mipha.data.sample import IMAGE, Message, Sample
from mipha.files import table_reader
from mipha.recipe import ReadingRecipe

TABLE_SUFFIXES = (".csv", ".tsv")
LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")

# Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits, the equivalent words
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")

_BOM = b"\xef\xbb\xbf"
# The next bracket or comma, past text and strings. Possessive: a broken file fails at once,
# whatever its length.
_NEXT = re.compile(rb'(?:[^][{},"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+[][{},]', re.DOTALL)
_REST = re.compile(rb"\s*+\Z")
_KEY = re.compile(rb"\s*(\"(?:[^\"\\]|\\.)*\")\s*:", re.DOTALL)
_RECORD_LISTS = ("messages", "conversations", "texts", "prompt", "completion")
"""Keys whose lists make an object a record, and not a wrapper around a list of records."""

_LISTS_IN_RECORDS = {
    *("images", "image", "history", "options", "choices", "tools", "answers", "points"),
}
"""Keys of records that may hold lists of objects, and do not make a wrapper."""


# One record, and the records of several files as one sequence.


class Row(NamedTuple):
    """One record of own data, whatever it was read from.

    Args:
        id: Beginning of the sample's id.
        where: File and line, for messages.
        content: The record as it stands in the file.
        folders: Where its images may be.
        reading: What the recipe says about reading it.
    """

    id: str
    where: str
    content: Any
    folders: ImageFolders
    reading: ReadingRecipe = ReadingRecipe()

    def fault(self, what: str, fix: str, kind: FaultKind = "malformed") -> RecordError:
        """Return the error that says what is wrong with this record."""
        return RecordError(what, fix, self.where, kind)

    def keys(self) -> Keys:
        """Return the record's keys, none of them read yet."""
        return Keys(self.content, self.folders, self.where)

    def sources(self, images: Sequence[Any]) -> tuple[ImageSource, ...]:
        """Return the images of the record, as it gives them, as they can be read.

        Raises:
            RecordError: One is no image, or leads out of the folders.
        """
        return tuple(image_source(image, self.folders, self.where) for image in images)

    def sample(
        self,
        messages: Sequence[Message],
        images: Sequence[Any],
        keys: Keys,
        regions: tuple[Region, ...] | None = None,
    ) -> Sample:
        """Return the record as a sample.

        Args:
            messages: Its turns.
            images: Its images, as the record gives them.
            keys: Keys of the record, those marked that were read.
            regions: Its regions, whose markers are in the turns; None where those of `objects`
                belong to placeholders.

        Raises:
            RecordError: An image, the markers or the roles do not fit.
        """
        sources = self.sources(images)
        if regions is None:
            messages, regions = place_regions(keys, self.reading, messages, sources)
        name = self.content.get("id")
        # Published ids repeat, rows do not.
        sample_id = self.id + (f"/{name}" if isinstance(name, str | int) else "")
        try:
            remarks = keys.remarks(messages, sources)
            return Sample(sample_id, tuple(messages), sources, remarks, regions=regions)
        except RecordError as error:
            raise error.at(self.where) from error


class RecordFile(Protocol):
    """A file, or a folder, of records."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """Read one record."""
        ...

    def name(self, index: int) -> str:
        """Return what tells the record from others of the file, for the sample's id."""
        ...

    def where(self, index: int) -> str:
        """Return file and row, for messages."""
        ...


class Part(NamedTuple):
    """One of the files of a data set; `prefix` begins the ids of its samples."""

    prefix: str
    file: RecordFile
    folders: ImageFolders


class Rows(Sequence[Row]):
    """The records of one or more files, one file after another.

    Args:
        parts: The files.
        left_out: Sentence on files that are left out; None where there are none.
        commit: Commit of the set on the hub; None for any other place.
    """

    def __init__(
        self, parts: Sequence[Part], left_out: str | None = None, commit: str | None = None
    ) -> None:
        self.parts, self.left_out, self.commit = parts, left_out, commit
        self.reading = ReadingRecipe()
        self._kept: np.ndarray | None = None
        self._starts = np.cumsum([0, *(len(part.file) for part in parts)])

    def read_by(self, reading: ReadingRecipe) -> Rows:
        """Return the same records, read as a recipe says."""
        rows = copy.copy(self)
        rows.reading = reading
        return rows

    def keep(self, places: np.ndarray) -> Rows:
        """Return some of the records.

        Args:
            places: `(kept,)` numbers below the number of records, in order.
        """
        rows = copy.copy(self)
        rows._kept = places
        return rows

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> Row:
        prefix, file, folders, index = self._find(index)
        where, content = file.where(index), file.read(index)
        return Row(f"{prefix}/{file.name(index)}", where, content, folders, self.reading)

    def scan(self, is_wanted: Callable[[str], bool]) -> Iterator[Any]:
        """Yield the content of every record in order, faster than one by one; None if it is broken.

        Args:
            is_wanted: Whether a key is looked at; others may be left out.
        """
        assert self._kept is None, "some of the records are left out"
        for part in self.parts:
            scan = getattr(part.file, "scan", None)
            if scan is not None:
                yield from scan(is_wanted)
                continue
            for index in range(len(part.file)):
                try:
                    yield part.file.read(index)
                except RecordError:
                    yield None

    def blocks_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of the block that each record is read with.

        Args:
            indices: `(samples,)` numbers of records. A file without blocks is one.
        """
        starts = [
            start + np.asarray(getattr(part.file, "block_starts", (0,)))
            for start, part in zip(self._starts[:-1], self.parts, strict=True)
            if len(part.file)
        ]
        places = indices if self._kept is None else self._kept[indices]
        return np.searchsorted(np.concatenate(starts), places, side="right") - 1

    @property
    def identity(self) -> list[Any]:
        """What tells the files from others without their records being read."""
        return [getattr(part.file, "identity", part.prefix) for part in self.parts]

    def file_of(self, index: int) -> Path | None:
        """Return the file that holds a record; None where each record is a file."""
        file = self._find(index)[1]
        return getattr(file, "file", None)

    def _find(self, index: int) -> tuple[str, RecordFile, ImageFolders, int]:
        """Return the part that holds a record, and the record's place in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        if self._kept is not None:
            index = int(self._kept[index])
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return *self.parts[number], index - int(self._starts[number])


def index_files(
    files: Sequence[tuple[str, Path]], index: Callable[[Path], RecordFile], skip: bool = False
) -> tuple[list[tuple[str, Path, RecordFile]], str | None]:
    """Index files that may be damaged, such as parquet files and tars.

    Args:
        files: Names and paths.
        index: Makes the index of one; a `ValueError` says that it cannot be read.
        skip: Whether to leave out those that cannot be read.

    Returns:
        Name, path and index of each; and a sentence on those left out, None where there are none.

    Raises:
        ValueError: Files cannot be read, and `skip` is false or nothing is left; all are named.
    """
    indexed, broken = [], []
    for name, file in files:
        try:
            indexed.append((name, file, index(file)))
        except ValueError as error:
            broken.append((file, str(error)))
    if not broken:
        return indexed, None
    if len(files) == 1:
        raise ValueError(broken[0][1])

    listed = "; ".join(reason.rstrip(".") for _, reason in broken)
    if not skip or not indexed:
        raise ValueError(
            f"{len(broken)} of {len(files)} files cannot be read: {listed}: get them again, "
            "or train on the others with unreadable_shards=skip"
        )
    return indexed, f"{len(broken)} of {len(files)} files are left out: {listed}"


def record_rows(
    dataset: str, root: Path | None, split: str, suffixes: Sequence[str], image_root: Sequence[Path]
) -> Rows:
    """Index the JSON or table files of a split.

    Raises:
        FileNotFoundError: As `split_files`.
        ValueError: As `split_files`, and where a file is not what its name says.
    """
    parts = [
        Part(f"{dataset}/{name}", record_file(file), image_folders(file, image_root))
        for name, file in split_files(dataset, root, split, suffixes)
    ]
    beside = sorted({name for part in parts for name in getattr(part.file, "beside", ())})
    keys = f"nothing reads the keys beside the list: {', '.join(beside)}" if beside else None
    others = files_of_no_split(root, split, suffixes)
    return Rows(parts, "; ".join(filter(None, (keys, others))) or None)


def record_file(file: Path, most: int | None = None) -> JsonRecords | TableRecords:
    """Index one file by its suffix; no more than `most` records, None for all."""
    return (TableRecords if file.suffix.lower() in TABLE_SUFFIXES else JsonRecords)(file, most)


def put_images_first(messages: Sequence[Message], num_images: int) -> Sequence[Message]:
    """Put image markers, a line each, at the front of the first user turn, if no turn has one."""
    if num_images == 0 or any(IMAGE in message.text for message in messages):
        return messages
    for number, message in enumerate(messages):
        if message.role == "user":
            marked = replace(message, text=f"{IMAGE}\n" * num_images + message.text)
            return [*messages[:number], marked, *messages[number + 1 :]]
    return messages


# The files of a split.


def check_split(dataset: str, split: str, splits: Sequence[str]) -> None:
    """Raise a `ValueError` that names the splits, unless `split` is one of them."""
    if split not in splits:
        known = " or ".join(splits) or "a folder that holds one"
        raise ValueError(f"{dataset} has no split {split!r}: use {known}")


def split_files(
    dataset: str, root: Path | None, split: str, suffixes: Sequence[str]
) -> list[tuple[str, Path]]:
    """List the files of one split, in the order of their names.

    Args:
        dataset: Name for messages.
        root: One file, whose one split is `train`, or a folder as `splits_in` reads it.
        split: Name of the split; `val` and `dev` are `validation`.
        suffixes: Suffixes to look for; the first that the folder has a file of counts.

    Returns:
        (name, file) pairs: the name is the file's path in the folder without its suffix, for the
        ids of samples.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no root, or no such split.
    """
    if root is None:
        raise ValueError(
            f"{dataset} has no packaged copy: set the data's root to a {suffixes[0]} file, "
            f"or a folder with train{suffixes[0]}"
        )
    if not root.exists():
        raise FileNotFoundError(f"{dataset}: no file or folder {root}; check the data's root")
    if not root.is_dir():
        check_split(f"{dataset} in {root}", split, ("train",))
        return [(root.stem, root)]

    splits = _splits_of(root, suffixes)
    wanted = split if split in splits else _SPLIT_WORDS.get(split.lower(), split)
    if splits and wanted not in splits:
        file = next(iter(splits.values()))[0]
        named = [name or "that of names without a word" for name in sorted(splits)]
        raise ValueError(
            f"{dataset} in {root} has no split {wanted!r}, only {' and '.join(named)}: "
            f"give one file, such as {file}, or set the data's split in a recipe"
        )
    check_split(f"{dataset} in {root}", wanted, sorted(splits))
    return [(file.relative_to(root).with_suffix("").as_posix(), file) for file in splits[wanted]]


def files_of_no_split(root: Path | None, split: str, suffixes: Sequence[str]) -> str | None:
    """Return a sentence on the files that no usual split reads; None if there are none.

    Arguments as for `split_files`.
    """
    if root is None or not root.is_dir():
        return None
    splits = _splits_of(root, suffixes)
    usual = set(_SPLIT_WORDS.values())
    others = [
        str(file.relative_to(root))
        for name, files in splits.items()
        for file in files
        if name not in usual and split.lower() in _SPLIT_WORDS
    ]
    if not others:
        return None
    return (
        f"{len(others)} files are not read, because their names are of no split such as train: "
        f"{first_of(others)}"
    )


def first_of(names: Sequence[str], most: int = 10) -> str:
    """Return the first names with commas, and dots where there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _splits_of(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    return next((found for suffix in suffixes if (found := splits_in(folder, suffix))), {})


def splits_in(folder: Path, suffix: str) -> dict[str, list[Path]]:
    """List the files of each split of a folder, in the order of their names.

    Files lie in the folder, in its `data`, or in a folder that is named after a split. A split's
    name is a word of the file's name (train-00000-of-00002, my_dev_set) or the folder's. Files
    without such a word are a split by their name without the number of the shard; if there is no
    other, they are `train`.
    """
    own = [folder, folder / "data"]
    splits: dict[str, list[Path]] = {}
    for place in (*own, *split_folders(folder).values()):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            hidden = file.name.startswith((".", "_"))
            if file.suffix.lower() == suffix and file.is_file() and not hidden:
                splits.setdefault(_split_of(file, place not in own), []).append(file)

    if len(splits) == 1 and not set(splits) & set(_SPLIT_WORDS.values()):
        return {"train": next(iter(splits.values()))}
    return splits


def split_folders(folder: Path) -> dict[str, Path]:
    """Return each split's sub-folder, where one is named after it."""
    return {
        _SPLIT_WORDS[path.name.lower()]: path
        for path in sorted(folder.iterdir())
        if path.name.lower() in _SPLIT_WORDS and path.is_dir()
    }


def _split_of(file: Path, in_split_folder: bool) -> str:
    if in_split_folder:
        return _SPLIT_WORDS[file.parent.name.lower()]
    words = re.split(r"[^a-z]+", file.stem.lower())
    named = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)
    return named or _SHARD.sub("", file.stem)


# The files themselves.


class JsonRecords:
    """A file of JSON lines, of one JSON list, of an object with one list, or of several objects.

    Args:
        file: A UTF-8 file.
        most: Number of records to index; None for all.

    Raises:
        ValueError: A list is not closed, or something follows it; the file is one object without a
            list of records, or with several; or it is not UTF-8.
    """

    def __init__(self, file: Path, most: int | None = None) -> None:
        self.file = file
        with file.open("rb") as stream:
            begin = _begin_of_text(stream, file)
            stream.seek(begin)
            first = next((line for line in stream if line.strip()), b"").strip()
            is_one_line = not any(line.strip() for line in stream)

            spans: array[int] | None = None
            self.beside: list[str] = []
            """Keys that stand beside the list of an object, which nobody reads."""
            if first[:1] == b"[" or (first[:1] == b"{" and (is_one_line or not _is_json(first))):
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    if first[:1] == b"[":
                        spans = _list_spans(content, begin, most, file)
                    else:
                        spans = _object_spans(content, begin, most, file, self.beside)
            self.is_list = spans is not None

            numbers = None
            if spans is None:
                stream.seek(begin)
                spans, numbers = _line_spans(stream, begin, most)
        self._spans = np.asarray(spans, dtype=np.int64).reshape(-1, 2)  # (records, begin and end)
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        """Return the number of the line, from 1; or of the row of a list, from 0."""
        return str(index if self._numbers is None else self._numbers[index])

    def where(self, index: int) -> str:
        """Return file and line, or file and row."""
        return f"{self.file}, {'row' if self.is_list else 'line'} {self.name(index)}"

    def read(self, index: int) -> Any:
        """Read one record.

        Raises:
            RecordError: It is not valid JSON in UTF-8.
        """
        start, end = self._spans[index]
        with self.file.open("rb") as stream:
            stream.seek(start)
            text = stream.read(end - start)
        try:
            return parse_json(text.removeprefix(_BOM).decode("utf-8"))
        except RecordError as error:
            raise error.at(self.where(index)) from error
        except UnicodeDecodeError as error:
            raise RecordError(
                f"this is not UTF-8: byte {text[error.start]:#04x} after "
                f"{text[max(0, error.start - 20) : error.start]!r}",
                "save the file as UTF-8",
                self.where(index),
            ) from error
        except (ValueError, RecursionError) as error:
            raise RecordError(
                f"this is not valid JSON: {error}",
                "write it again, or remove it",
                self.where(index),
            ) from error


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; NaN, which Python writes for a missing value, is None.

    Raises:
        RecordError: An object has a key twice, of which one would be lost, or it is nested too
            deeply.
        ValueError, RecursionError: It is not valid JSON.
    """
    value = _DECODER.decode(text)
    if is_deep(text, value):
        raise RecordError(f"it is nested more than {DEEPEST} deep", "remove what is nested so")
    return value


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordError(f"an object has the key {twice!r} twice", "keep one of them")
    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_as_object,
    parse_constant=lambda name: None if name == "NaN" else float(name),
)


def _begin_of_text(stream: BinaryIO, file: Path) -> int:
    """Return where the text of a file begins, after its byte order mark.

    Raises:
        ValueError: It is UTF-16 or UTF-32, or compressed.
    """
    head = stream.read(4)
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        raise ValueError(f"{file} is UTF-16 or UTF-32: save it as UTF-8")
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        raise ValueError(f"{file} is compressed: decompress it")
    if b"\x00" in head:
        raise ValueError(f"{file} is no text in UTF-8, it begins with {head!r}: save it as UTF-8")
    return len(_BOM) if head.startswith(_BOM) else 0


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _object_spans(
    content: mmap.mmap, start: int, most: int | None, file: Path, beside: list[str]
) -> array[int] | None:
    """Find the records of a file that begins with an object which ends on another line, or is all.

    Args:
        content: File.
        start: Place of the object.
        most: Number of records to find; None for all.
        file: Name for messages.
        beside: List that receives the object's keys beside its list of records.

    Returns:
        Begin and end of each record: of the elements of the object's one list of objects, or of the
        objects if there are several; None where the file is to be read line by line.

    Raises:
        ValueError: It is one object, and no or several keys hold a list of objects.
    """
    # Find the objects of the file.
    objects: array[int] = array("q")
    position, depth, begin, mark = start, 0, start, 0
    while match := _NEXT.match(content, position):
        position = match.end()
        mark = content[position - 1]
        if depth == 0 and mark not in b"[{":
            return None
        if depth == 0:
            begin = position - 1
        depth += 1 if mark in b"[{" else -1 if mark in b"]}" else 0
        if depth == 0:
            objects.extend((begin, position))
            text = content[begin:position] if len(objects) == 2 else b""
            if text and b"\n" not in text and not _is_json(text):
                return None  # a broken line among others
    if depth or not objects or not _REST.match(content, position):
        return None
    if len(objects) > 2:
        return objects if most is None else objects[: 2 * most]

    # It is one object: a record, or a wrapper around the one list of records.
    text = content[objects[0] : objects[1]]
    is_long = b"\n" in text
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not is_long:
            return None
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    lists = {
        key: value
        for key, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    is_record = any(isinstance(whole.get(key), list) for key in _RECORD_LISTS)
    is_index = is_long and len(whole) > 1 and all(isinstance(v, dict) for v in whole.values())
    if is_record or not (set(lists) - _LISTS_IN_RECORDS or is_index):
        return objects if is_long else None
    if len(lists) != 1:
        named = ", ".join(f"{key} ({len(value)})" for key, value in lists.items())
        held = f"the lists {named}" if lists else f"objects under {', '.join(whole)[:80]}"
        fix = "save the one list of records by itself"
        if {"images", "annotations"} <= lists.keys():
            fix = "for COCO's captions give their folder as --root to the data set coco_captions"
        raise ValueError(f"{file} holds one object with {held}: {fix}")
    (key,) = lists
    beside += [name for name, value in whole.items() if name != key and value]
    return _list_spans(content, _begin_of_value(content, objects[0], key), most, file, alone=False)


def _begin_of_value(content: mmap.mmap, start: int, wanted: str) -> int:
    """Return where the value of a key of an object begins.

    Args:
        content: File.
        start: Place of the object's bracket.
        wanted: Key; the last one of this name counts, as for `json.loads`.
    """
    position, depth, begin, place = start, 0, start + 1, start
    while match := _NEXT.match(content, position):
        position = match.end()
        mark = content[position - 1]
        key = _KEY.match(content, begin) if depth == 1 and mark == ord("[") else None
        if key and json.loads(key[1]) == wanted:
            place = position - 1
        if depth == 1 and mark == ord(","):
            begin = position
        depth += 1 if mark in b"[{" else -1 if mark in b"]}" else 0
        if depth == 0:
            break
    return place


def _line_spans(stream: BinaryIO, start: int, most: int | None) -> tuple[array[int], np.ndarray]:
    """Find where each line that is not blank begins and ends, and its number."""
    spans, numbers = array("q"), array("q")
    for number, line in enumerate(stream, start=1):
        if len(numbers) == most:
            break
        if not line.isspace():
            spans.extend((start, start + len(line)))
            numbers.append(number)
        start += len(line)
    return spans, np.asarray(numbers, dtype=np.int64)


def _list_spans(
    content: mmap.mmap, start: int, most: int | None, file: Path, alone: bool = True
) -> array[int]:
    """Find where each element of a JSON list begins and ends.

    That is between the commas and brackets that stand in no other bracket and in no string.

    Args:
        content: File.
        start: Place before the list.
        most: Number of elements to find; None for all.
        file: Name for messages.
        alone: Whether nothing may follow the list.
    """
    spans: array[int] = array("q")
    position, begin, depth, mark = start, start, 0, 0
    while (most is None or len(spans) < 2 * most) and (match := _NEXT.match(content, position)):
        position = match.end()
        mark = content[position - 1]

        # A comma of the list, or its end, ends an element; an empty list has none.
        if (
            depth == 1
            and mark in b",]"
            and (mark == ord(",") or spans or content[begin : position - 1].strip())
        ):
            spans.extend((begin, position - 1))

        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        if depth == 1 and mark in b"[,":
            begin = position
        if depth == 0:
            break

    if most is not None and len(spans) == 2 * most:
        return spans
    if depth != 0 or mark != ord("]") or (alone and not _REST.match(content, position)):
        raise ValueError(
            f"{file} is not valid JSON: its list is not closed, or does not end the file; "
            "is it cut short?"
        )
    return spans


class TableRecords:
    """A file of comma- or tab-separated values whose first line names the columns.

    Args:
        file: A UTF-8 file. A .csv may be separated by `;` or tabs too: the mark that its first
            line has most of. An empty cell is None.
        most: Number of records to index; None for all.

    Raises:
        ValueError: The file is not UTF-8, a quote is never closed, or two columns have one name.
    """

    def __init__(self, file: Path, most: int | None = None) -> None:
        self.file = file
        spans, numbers = array("q"), array("q")
        with file.open("rb") as stream:
            begin = _begin_of_text(stream, file)
            stream.seek(0)
            first = stream.readline()
            is_tsv = file.suffix.lower() == ".tsv"
            self._delimiter = "\t" if is_tsv else chr(max(b",;\t", key=first.count))
            stream.seek(begin)

            lines = _CountedLines(stream, file)
            rows = table_reader(lines, self._delimiter, strict=True)
            number = 1
            try:
                self.columns = [name.strip() for name in next(rows, [])]
                while most is None or len(numbers) < most:
                    start, number = lines.offset, lines.number + 1
                    if (cells := next(rows, None)) is None:
                        break
                    if cells:
                        spans.extend((start, lines.offset))
                        numbers.append(number)
            except csv.Error as error:
                cause, fix = str(error), "write a cell with a quote in quotes, and that quote twice"
                if "new-line" in cause:
                    cause, fix = "it ends with CR alone", "end lines with LF or CRLF"
                raise ValueError(
                    f"{file}, line {number} is not a row of separated values: {cause}; {fix}"
                ) from error

        if twice := {name for name in self.columns if self.columns.count(name) > 1}:
            raise ValueError(
                f"{file} has two columns {sorted(twice)[0]!r}: rename one in its first line"
            )
        self._spans = np.asarray(spans, dtype=np.int64).reshape(-1, 2)  # (records, begin and end)
        self._numbers = np.asarray(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        """Return the number of the record's first line, from 1 as editors count."""
        return str(self._numbers[index])

    def where(self, index: int) -> str:
        """Return file and line."""
        return f"{self.file}, line {self.name(index)}"

    def read(self, index: int) -> dict[str, Any]:
        """Read one record, by column.

        Raises:
            RecordError: It has more or fewer cells than there are columns.
        """
        start, end = self._spans[index]
        with self.file.open("rb") as stream:
            stream.seek(start)
            text = stream.read(end - start).decode("utf-8")

        lines = io.StringIO(text, newline="")
        cells = next(table_reader(lines, self._delimiter, strict=True))
        if len(cells) != len(self.columns):
            raise RecordError(
                f"it has {len(cells)} cells for {len(self.columns)} columns",
                f"put text with a {self._delimiter!r} in quotes",
                self.where(index),
            )
        return {
            column: (parse_list(cell) if column in TURNS else cell) or None
            for column, cell in zip(self.columns, cells, strict=True)
        }


class _CountedLines(Iterator[str]):
    """The lines of a stream as text; `offset` and `number` say how far it was read."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream, self._file = stream, file
        self.offset, self.number = stream.tell(), 0

    def __next__(self) -> str:
        line = self._stream.readline()
        if not line:
            raise StopIteration
        self.offset += len(line)
        self.number += 1
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._file}, line {self.number} is not UTF-8: save the table as UTF-8"
            ) from error
