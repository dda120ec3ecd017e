"""Your own data as `save_to_disk` of the `datasets` library leaves it: Arrow files.

One folder, or one for each split. A column of images (bytes or paths) stands beside any of the
other formats. The files are mapped into memory, so nothing is read before it is asked for. Needs
the extra `data` (pyarrow; not `datasets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mipha.data.dataset import DataSet
from mipha.data.datasets._columns import (
    cell_bytes,
    cell_places,
    image_columns,
    import_pyarrow,
    with_places,
)
from mipha.data.datasets._images import image_folders
from mipha.data.datasets._records import Part, Rows, check_split
from mipha.data.datasets._shapes import READS, sample_of
from mipha.files import read_json_object

if TYPE_CHECKING:
    import pyarrow


_SAVE_AGAIN = "save the data set again"


class ArrowImage(NamedTuple):
    """One image of an Arrow file.

    Args:
        file: The Arrow file.
        row: Number of the row.
        column: Name of the column.
        position: Place in a cell that holds a list; None where the cell holds one image.
    """

    file: Path
    row: int
    column: str
    position: int | None

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}" + (
            "" if self.position is None else f", image {self.position}"
        )

    def read(self) -> bytes:
        """Read the bytes of the image file."""
        cell = _table(self.file)[self.column][self.row].as_py()
        return cell_bytes(cell if self.position is None else cell[self.position], str(self))


class ArrowRecords:
    """The rows of an Arrow file; of the column that holds images, only where they are.

    Raises:
        MissingPackage: pyarrow is not installed.
        ValueError: The file is not an Arrow file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        pyarrow = import_pyarrow(str(file))
        try:
            table = _table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as Arrow: {error}") from error
        self._num_rows = table.num_rows
        self._images = image_columns(table.schema, str(file))
        self._columns = [name for name in table.schema.names if name not in self._images]

    def __len__(self) -> int:
        return self._num_rows

    def name(self, index: int) -> str:
        """Return the number of the row, from 0."""
        return str(index)

    def where(self, index: int) -> str:
        """Return file and row."""
        return f"{self.file}, row {index}"

    def read(self, index: int) -> dict[str, Any]:
        """Read one row as a record.

        Its images are places in the file, or paths where the file holds no bytes.
        """
        table = _table(self.file)
        content = {name: table[name][index].as_py() for name in self._columns}
        places = {
            name: cell_places(table[name][index], partial(ArrowImage, self.file, index, name))
            for name in self._images
        }
        return with_places(content, places)


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Map the files of a split.

    Args:
        root: The folder that `save_to_disk` wrote, of a `Dataset` (its one split is `train`) or a
            `DatasetDict`; or one .arrow file.
        split: Name of the split.
        image_root: Folders that images may lie in, where the rows hold paths.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: No root, no such split, or the folder or file is not what `save_to_disk`
            writes.
        MissingPackage: pyarrow is not installed.
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
    return Rows(
        [
            Part(f"{prefix}/{file.stem}", ArrowRecords(file), image_folders(file, image_root))
            for file in files_of(splits[split])
        ]
    )


def splits_of(root: Path) -> dict[str, Path]:
    """Return the folder (or file) of each split of what `save_to_disk` wrote."""
    if not (root / "dataset_dict.json").is_file():
        return {"train": root}
    names = read_json_object(root / "dataset_dict.json", _SAVE_AGAIN).get("splits")
    if (
        not isinstance(names, list)
        or not names
        or any(not isinstance(name, str) or Path(name).name != name for name in names)
    ):
        raise ValueError(
            f"arrow: {root / 'dataset_dict.json'} names no splits of this folder; {_SAVE_AGAIN}"
        )
    return {name: root / name for name in names}


def files_of(folder: Path) -> list[Path]:
    """List the Arrow files of a split, in the order of state.json; a file stands for itself.

    Raises:
        ValueError: The folder is not what `save_to_disk` writes.
    """
    if folder.is_file():
        return [folder]
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"arrow: {folder} has no state.json; give a folder that `save_to_disk` wrote, "
            "or one .arrow file"
        )
    state = read_json_object(folder / "state.json", _SAVE_AGAIN)
    if state.get("_indices_files"):
        raise ValueError(
            f"arrow: {folder} keeps an order beside its rows; "
            "call flatten_indices() before save_to_disk()"
        )
    names = [
        entry.get("filename") if isinstance(entry, dict) else None
        for entry in state.get("_data_files") or ()
    ]
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(
            f"arrow: {folder / 'state.json'} names no data files of this folder; {_SAVE_AGAIN}"
        )
    return [folder / name for name in names]


@lru_cache(maxsize=1024)
def _table(file: Path) -> pyarrow.Table:
    """Map a file into memory; `datasets` writes streams, other programs files."""
    pyarrow = import_pyarrow(file)
    mapped = pyarrow.memory_map(str(file))
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    return (
        pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
    ).read_all()


DATASET = DataSet("arrow", load, sample_of, takes_image_root=True, reads=READS)
