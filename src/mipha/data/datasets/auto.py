"""Your own data, whatever it is: the format is told from the kind of file and its first records, and said.

`data.finetune=./my.jsonl` means this. Where nothing fits, or more than one format does, it is an error that shows the forms.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from mipha.data.datasets._index import LINE_SUFFIXES, TABLE_SUFFIXES, RecordFile, Rows, record_file
from mipha.data.datasets._records import Row
from mipha.data.datasets._shapes import describe, shapes_of
from mipha.data.datasets._splits import split_folders, splits_in
from mipha.data.datasets.arrow import ArrowRecords, files_of, splits_of
from mipha.data.datasets.image_folder import CaptionedPictures, metadata_of
from mipha.data.datasets.parquet import ParquetRecords
from mipha.data.datasets.webdataset import TarRecords
from mipha.data.sample import Sample

NUM_FIRST = 20
"""Records that are looked at."""

FORMS = """\
  .jsonl, .json   {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A cat."}],
                   "images": ["cat.jpg"]}
  .json, .jsonl   {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                   {"from": "gpt", "value": "A cat."}]}
  .csv, .tsv      image,question,answer   or   image,caption   (also as .jsonl, one object a line)
  folder          pictures with a .txt of the same name beside each, or with metadata.jsonl or metadata.csv (file_name, text)
  .parquet        or what `datasets` wrote with save_to_disk: a column of images beside one of the above
  .tar            0001.jpg with 0001.json or 0001.txt, not compressed"""

_CONTAINERS: dict[str, tuple[str, Any]] = {
    ".parquet": ("parquet", ParquetRecords),
    ".arrow": ("arrow", ArrowRecords),
    ".tar": ("webdataset", partial(TarRecords, most=NUM_FIRST)),
}


def detect(path: Path) -> tuple[str, str]:
    """The format of a file or folder.

    Returns:
        (name, sentence): the data set module that reads it, and what was found, for people.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No format fits, or more than one; the message shows the forms that are known.
        ModuleNotFoundError: The format needs pyarrow, which is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}: check the path")
    return _detect_folder(path) if path.is_dir() else _detect_file(path)


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """The records of a split, by the format that `detect` finds; arguments and errors as there and in `messages`."""
    if root is None:
        raise ValueError(
            "auto tells the format from the data: set the data's root to a file or folder"
        )
    return _module(detect(root)[0]).load(root, split, image_root)


def to_sample(record: Row, root: Path | None) -> Sample:
    """One record as a sample, by the format that it was read in."""
    return _module(record.dataset).to_sample(record, root)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"mipha.data.datasets.{name}")


def _detect_file(file: Path) -> tuple[str, str]:
    suffix = file.suffix.lower()
    if suffix in _CONTAINERS:
        name, reader = _CONTAINERS[suffix]
        shape, content = _shape_of(file, reader(file))
        return name, f"{file} is read as {name}: {describe(content, shape)}"
    if suffix in (*LINE_SUFFIXES, *TABLE_SUFFIXES):
        shape, content = _shape_of(file, record_file(file, NUM_FIRST))
        return shape, f"{file} is read as {shape}: {describe(content, shape)}"
    raise ValueError(
        f"{file}: the format of a {suffix or 'nameless kind of'} file is not known; wanted one of\n{FORMS}"
    )


def _detect_folder(folder: Path) -> tuple[str, str]:
    """One kind of file must speak for the folder: pictures do only where there is nothing else that describes them."""
    found: dict[str, Path] = {}
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        file = files_of(next(iter(splits_of(folder).values())))[0]
        name, sentence = _detect_file(file)
        return name, sentence.replace(str(file), f"{folder} (saved by `datasets`)", 1)
    for place in (folder, *split_folders(folder).values()):
        if metadata := metadata_of(place):
            found.setdefault("image_folder", metadata)
    for suffix in (".parquet", ".tar", *LINE_SUFFIXES, *TABLE_SUFFIXES):
        if suffix == ".json" and found:
            continue  # settings and statistics that lie beside the data
        splits = splits_in(folder, suffix)
        files = [
            file
            for name in sorted(splits, key=lambda name: name != "train")
            for file in splits[name]
        ]
        if files := [file for file in files if file.name not in ("metadata.jsonl", "metadata.csv")]:
            found[suffix] = files[0]
    if len(found) > 1:
        listed = " and ".join(str(file.relative_to(folder)) for file in found.values())
        raise ValueError(
            f"{folder} holds {listed}, which may each be the data: give that file, or set `dataset` beside `root`"
        )
    if "image_folder" in found:
        shape, content = _shape_of(
            found["image_folder"], record_file(found["image_folder"], NUM_FIRST)
        )
        return (
            "image_folder",
            f"{folder} is read as image_folder: {describe(content, shape)} in {found['image_folder'].name}",
        )
    if found:
        (file,) = found.values()
        name, sentence = _detect_file(file)
        return name, sentence.replace(str(file), f"{folder} ({file.relative_to(folder)})", 1)
    pictures = CaptionedPictures(next(iter(split_folders(folder).values()), folder))
    if not len(pictures):
        raise ValueError(f"{folder} holds no data of a known format; wanted one of\n{FORMS}")
    _shape_of(folder, pictures)
    return (
        "image_folder",
        f"{folder} is read as image_folder: pictures with a caption in a .txt beside each",
    )


def _shape_of(path: Path, records: RecordFile) -> tuple[str, dict[str, Any]]:
    """What the first records are, and the first that is one. A broken record says nothing, unless all of them are."""
    errors: list[ValueError] = []
    shapes: dict[str, dict[str, Any]] = {}
    first: Any = None
    for index in range(min(len(records), NUM_FIRST)):
        try:
            content = records.read(index)
        except ValueError as error:
            errors.append(error)
            continue
        first = content if first is None else first
        for shape in shapes_of(content):
            shapes.setdefault(shape, content)
    if "sharegpt" in shapes:
        shapes.pop("llava", None)  # its plainer records look like LLaVA's
    if len(shapes) > 1:
        raise ValueError(
            f"{path} fits more than one format, {' and '.join(shapes)}: set `dataset` to one, or put them in two files"
        )
    if shapes:
        return next(iter(shapes.items()))
    if errors:
        raise errors[0]
    held = ", ".join(map(str, first)) if isinstance(first, dict) else str(first)[:80]
    found = f"its first record holds {held or 'nothing'}" if len(records) else "it holds no record"
    raise ValueError(f"{path}: the format is not known, for {found}; wanted one of\n{FORMS}")
