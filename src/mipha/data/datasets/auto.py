"""Your own data: the format is detected from the kind of file and its first records.

`data.finetune=./my.jsonl` means this. Each record is then read by the format that it has itself,
wherever it stands in the file. If no format fits, the error shows the forms that are known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mipha.data.dataset import DataSet
from mipha.data.datasets._records import (
    LINE_SUFFIXES,
    TABLE_SUFFIXES,
    RecordFile,
    index_files,
    record_file,
    split_folders,
    splits_in,
)
from mipha.data.datasets._shapes import describe, sample_of, shapes_of
from mipha.data.datasets.arrow import ArrowRecords, files_of, splits_of
from mipha.data.datasets.hub import describes_configs
from mipha.data.datasets.image_folder import METADATA, CaptionedImages, metadata_of
from mipha.data.datasets.parquet import ParquetRecords
from mipha.data.datasets.webdataset import TarRecords

NUM_FIRST = 20
"""Number of records that are looked at."""

FORMS = """\
  .jsonl, .json   {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"},
                                {"role": "assistant", "content": "A cat."}],
                   "images": ["cat.jpg"]}
  .json, .jsonl   {"image": "cat.jpg",
                   "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                     {"from": "gpt", "value": "A cat."}]}
  .csv, .tsv      image,question,answer   or   image,caption   (also as .jsonl, one object a line)
                  or query,response,history or instruction,input,output or question,options,answer
  .jsonl, .json   {"images": ["cat.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat."}]}
  .jsonl, .json   {"images": [null, "cat.jpg"], "texts": ["A cat:", null]}   a document
  folder          images with a .txt of the same name beside each, or with metadata.jsonl or
                  metadata.csv (file_name, text)
  .parquet        a column of images beside one of the above; also the folder that `datasets`
                  wrote with save_to_disk
  .tar            0001.jpg with 0001.json or 0001.txt, not compressed"""

_CONTAINERS: dict[str, tuple[str, Any]] = {
    ".parquet": ("parquet", ParquetRecords),
    ".arrow": ("arrow", ArrowRecords),
    ".tar": ("webdataset", partial(TarRecords, most=NUM_FIRST)),
}

_PACKED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def detect(
    path: Path | None, complete: Callable[[Any], Any] = lambda content: content
) -> tuple[str, str]:
    """Detect the format of a file or folder.

    Args:
        path: File or folder.
        complete: Makes of a record's content what training reads.

    Returns:
        (name, sentence): the data set that reads it, and what was found, for people.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no path; or no format fits, or more than one: the message shows the
            forms that are known.
        MissingPackage: The format needs pyarrow, which is not installed.
    """
    if path is None:
        raise ValueError(
            "auto detects the format from the data: set the data's root to a file or folder"
        )
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}: check the path")
    return (_detect_folder if path.is_dir() else _detect_file)(path, complete)


def _detect_file(file: Path, complete: Callable[[Any], Any]) -> tuple[str, str]:
    suffix = file.suffix.lower()
    if suffix in _CONTAINERS:
        name, reader = _CONTAINERS[suffix]
        shape, content = _shape_of(file, reader(file), complete)
        return name, f"{file} is read as {name}: {describe(content, shape)}"
    if suffix in (*LINE_SUFFIXES, *TABLE_SUFFIXES):
        shape, content = _shape_of(file, record_file(file, NUM_FIRST), complete)
        return shape, f"{file} is read as {shape}: {describe(content, shape)}"
    wanted = "unpack it, and give what is in it" if suffix in _PACKED else "wanted one of"
    raise ValueError(
        f"{file}: the format of a {suffix or 'nameless kind of'} file is not known; "
        f"{wanted}\n{FORMS}"
    )


def _detect_folder(folder: Path, complete: Callable[[Any], Any]) -> tuple[str, str]:
    """Detect the format of a folder; exactly one kind of file must speak for it.

    Images do so only where nothing else describes them.
    """
    # What `datasets` saved says so itself.
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        file = files_of(next(iter(splits_of(folder).values())))[0]
        name, sentence = _detect_file(file, complete)
        return name, sentence.replace(str(file), f"{folder} (saved by `datasets`)", 1)

    if describes_configs(folder):
        return "hub", f"{folder} is read as hub, by the configs of its README"

    files_by_kind = _record_files(folder)
    found = {kind: files[0] for kind, files in files_by_kind.items()}
    if len(found) > 1:
        listed = " and ".join(str(file.relative_to(folder)) for file in found.values())
        raise ValueError(
            f"{folder} holds {listed}, which may each be the data: "
            "give that file, or set `dataset` beside `root`"
        )

    if metadata := found.get("image_folder"):
        shape, content = _shape_of(metadata, record_file(metadata, NUM_FIRST), complete)
        described = f"{describe(content, shape)} in {metadata.name}"
        return "image_folder", f"{folder} is read as image_folder: {described}"
    if found:
        file = _first_readable(files_by_kind[next(iter(found))])
        name, sentence = _detect_file(file, complete)
        return name, sentence.replace(str(file), f"{folder} ({file.relative_to(folder)})", 1)

    images = CaptionedImages(next(iter(split_folders(folder).values()), folder))
    if not len(images):
        packed = next((p.name for p in folder.iterdir() if p.suffix.lower() in _PACKED), None)
        wanted = f"unpack {packed}, and give what is in it" if packed else "wanted one of"
        raise ValueError(f"{folder} holds no data of a known format; {wanted}\n{FORMS}")
    _shape_of(folder, images, complete)
    described = "images with a caption in a .txt beside each"
    return "image_folder", f"{folder} is read as image_folder: {described}"


def _first_readable(files: list[Path]) -> Path:
    """Return the first file that is not damaged; whoever loads the others names them.

    Raises:
        ValueError: All are damaged; the message names all.
    """
    for file in files:
        try:
            _CONTAINERS.get(file.suffix.lower(), ("", record_file))[1](file)
        except ValueError:
            continue
        return file
    reader = _CONTAINERS.get(files[0].suffix.lower(), ("", record_file))[1]
    index_files([(file.stem, file) for file in files], reader)
    raise AssertionError("a file can be read after all")


def _record_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each kind that may hold the records of a folder, those of train first."""
    found: dict[str, list[Path]] = {}
    for place in (folder, *split_folders(folder).values()):
        if metadata := metadata_of(place):
            found.setdefault("image_folder", [metadata])

    for suffix in (".parquet", ".arrow", ".tar", *LINE_SUFFIXES, *TABLE_SUFFIXES):
        if suffix == ".json" and found:
            continue  # settings and statistics that lie beside the data
        splits = splits_in(folder, suffix)
        train_first = sorted(splits, key=lambda name: name != "train")
        files = [file for name in train_first for file in splits[name]]
        if files := [file for file in files if file.name not in METADATA]:
            found[suffix] = files
    return found


def _shape_of(
    path: Path, records: RecordFile, complete: Callable[[Any], Any]
) -> tuple[str, dict[str, Any]]:
    """Return the shape of the first records, and the first record that has it.

    A broken record says nothing, unless all of them are broken.
    """
    errors: list[ValueError] = []
    shapes: dict[str, dict[str, Any]] = {}
    unclear: list[str] = []
    first: Any = None
    for index in range(min(len(records), NUM_FIRST)):
        try:
            content = complete(records.read(index))
        except ValueError as error:
            errors.append(error)
            continue
        first = content if first is None else first
        found = shapes_of(content)
        if len(found) == 1:
            shapes.setdefault(found[0], content)
        if len(found) > 1:
            unclear = unclear or found

    if "sharegpt" in shapes:
        shapes.pop("llava", None)  # its plainer records look like LLaVA's
    if shapes:
        return next(iter(shapes.items()))
    if unclear:
        raise ValueError(
            f"{path} fits more than one format, {' and '.join(unclear)}: "
            "set `dataset` to one, or leave the other keys out"
        )

    if errors:
        raise errors[0]
    if isinstance(first, dict) and {"chosen", "rejected"} <= first.keys():
        raise ValueError(
            f"{path} holds pairs of a chosen and a rejected answer, which a dpo stage learns from: "
            "name the recipe and the stage (--recipe FILE --stage NAME), or give rows with answers"
        )
    held = ", ".join(map(str, first)) if isinstance(first, dict) else str(first)[:80]
    found = f"its first record holds {held or 'nothing'}" if len(records) else "it holds no record"
    raise ValueError(f"{path}: the format is not known, because {found}; wanted one of\n{FORMS}")


DATASET = DataSet("auto", detect=detect, to_sample=sample_of)
