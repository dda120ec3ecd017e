"""Your own data as the `datasets` library's `save_to_disk` leaves it: Arrow files, one folder a split where there are several.

A column of images (bytes or paths) beside any of the other formats. The files are mapped into memory, so nothing is read before it is
asked for. Needs the extra `data` (pyarrow; not `datasets`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mipha.data.datasets._columns import byte_columns, cell_bytes, image_column, import_pyarrow
from mipha.data.datasets._index import Part, Rows
from mipha.data.datasets._records import Row, check_split, image_folders, with_images
from mipha.data.datasets._shapes import sample_of
from mipha.data.sample import Sample

if TYPE_CHECKING:
    import pyarrow


class ArrowImage(NamedTuple):
    """One image of an Arrow file; `position` counts in a cell that holds a list, null where it holds one image."""

    file: Path
    row: int
    column: str
    position: int | None

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}" + (
            "" if self.position is None else f", image {self.position}"
        )

    def read(self) -> bytes:
        """The bytes of the image file."""
        cell = _table(self.file)[self.column][self.row].as_py()
        return cell_bytes(cell if self.position is None else cell[self.position], str(self))


class ArrowRecords:
    """The rows of an Arrow file; of the column that holds images, only where they are.

    Raises:
        ValueError: It is no Arrow file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        pyarrow = import_pyarrow(str(file))
        try:
            table = _table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as Arrow: {error}") from error
        self._num_rows = table.num_rows
        self._image = image_column(table.schema, str(file))
        self._columns = [
            name for name in table.schema.names if name not in byte_columns(table.schema)
        ]

    def __len__(self) -> int:
        return self._num_rows

    def name(self, index: int) -> str:
        """Number of the row, from 0."""
        return str(index)

    def where(self, index: int) -> str:
        """File and row."""
        return f"{self.file}, row {index}"

    def read(self, index: int) -> dict[str, Any]:
        """One row as a record, its images as places in the file, or as paths where the file holds no bytes."""
        table = _table(self.file)
        content = {name: table[name][index].as_py() for name in self._columns}
        if self._image is None:
            return content
        cell = table[self._image][index]
        if not cell.is_valid:
            return with_images(content, [])
        listed = hasattr(cell.type, "value_type")
        cells = list(cell) if listed else [cell]
        images = [
            _image_in(part, ArrowImage(self.file, index, self._image, i if listed else None))
            for i, part in enumerate(cells)
        ]
        return with_images(content, images)


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Map the files of a split.

    Args:
        root: The folder that `save_to_disk` wrote, of a `Dataset` (its one split is `train`) or a `DatasetDict`; or one .arrow file.
        split: Which.
        image_root: Folders that images may lie in, where the rows hold paths.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No root, no such split, or a folder or file that is not what `save_to_disk` writes.
        ModuleNotFoundError: pyarrow is not installed.
    """
    if root is None:
        raise ValueError(
            "arrow has no packaged copy: set the data's root to a folder that `save_to_disk` wrote"
        )
    if not root.exists():
        raise FileNotFoundError(f"arrow: no file or folder {root}; check the data's root")
    splits = splits_of(root)
    check_split(f"arrow in {root}", split, list(splits))
    prefix = "/".join(["arrow", *splits[split].relative_to(root).parts])
    files = files_of(splits[split])
    return Rows(
        "arrow",
        [
            Part(f"{prefix}/{file.stem}", ArrowRecords(file), image_folders(file, image_root))
            for file in files
        ],
    )


def to_sample(record: Row, root: Path | None) -> Sample:
    """One row; the record knows its file, so `root` is not read.

    Raises:
        ValueError: The row fits no format, or is broken; the message names file and row.
    """
    return sample_of(record)


def splits_of(root: Path) -> dict[str, Path]:
    """Split -> its folder, or file, of what `save_to_disk` wrote."""
    if not (root / "dataset_dict.json").is_file():
        return {"train": root}
    names = _read_json(root / "dataset_dict.json").get("splits")
    if (
        not isinstance(names, list)
        or not names
        or any(not isinstance(name, str) or Path(name).name != name for name in names)
    ):
        raise ValueError(
            f"arrow: {root / 'dataset_dict.json'} names no splits of this folder; save the data set again"
        )
    return {name: root / name for name in names}


def files_of(folder: Path) -> list[Path]:
    """The Arrow files of one split, in the order that state.json gives; a file stands for itself.

    Raises:
        ValueError: The folder is not what `save_to_disk` writes.
    """
    if folder.is_file():
        return [folder]
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"arrow: {folder} has no state.json; give a folder that `save_to_disk` wrote"
        )
    state = _read_json(folder / "state.json")
    if state.get("_indices_files"):
        raise ValueError(
            f"arrow: {folder} keeps an order beside its rows; call flatten_indices() before save_to_disk()"
        )
    names = [
        entry.get("filename") if isinstance(entry, dict) else None
        for entry in state.get("_data_files") or ()
    ]
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(
            f"arrow: {folder / 'state.json'} names no data files of this folder; save the data set again"
        )
    return [folder / name for name in names]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; save the data set again")
    return content


@lru_cache(maxsize=1024)
def _table(file: Path) -> pyarrow.Table:
    """A file as a table in mapped memory; the library writes streams, other programs files."""
    import pyarrow

    mapped = pyarrow.memory_map(str(file))
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    return (
        pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
    ).read_all()


def _image_in(cell: Any, place: ArrowImage) -> ArrowImage | str | None:
    """Where an image is: in this cell, or in the file whose path the cell holds instead of bytes."""
    if not cell.is_valid:
        return None
    if hasattr(cell, "keys") and not cell["bytes"].is_valid:
        return cell["path"].as_py() if "path" in cell else None
    return place
