"""Your own data as parquet: a column of images beside any of the other formats.

The images are bytes, as the `datasets` library writes them, or paths. One file, or a folder with
files a split: data/train-00000-of-00002.parquet. Needs the extra `data`. A parquet file is read by
row groups: write it with groups of about 100 rows, or every image costs the reading of a large
group. With `cache_gb` each group is read once and kept (`data/blocks.py`), and samples are shuffled
in windows of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mipha.data.blocks import Blocks
from mipha.data.dataset import DataSet
from mipha.data.datasets._columns import (
    cell_bytes,
    cell_places,
    image_columns,
    import_pyarrow,
    with_places,
)
from mipha.data.datasets._images import image_folders
from mipha.data.datasets._records import (
    Part,
    Rows,
    files_of_no_split,
    index_files,
    split_files,
)
from mipha.data.datasets._shapes import READS, sample_of
from mipha.data.faults import RecordError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile


class ParquetImage(NamedTuple):
    """One image of a parquet file.

    Args:
        file: The parquet file.
        group: Number of the row group.
        row: Number of the row in the group.
        column: Name of the column.
        position: Place in a cell that holds a list; None where the cell holds one image.
        blocks: Cache that the row group is read through; None where it is read as it lies.
    """

    file: Path
    group: int
    row: int
    column: str
    position: int | None
    blocks: Blocks | None = None

    def __str__(self) -> str:
        place = "" if self.position is None else f", image {self.position}"
        return f"{self.file}, row {self.row} of row group {self.group}{place}"

    def read(self) -> bytes:
        """Read the bytes of the image file."""
        if self.blocks is not None:
            table = self.blocks.table(self.file, self.group)
        else:
            table = _read_group(self.file, self.group, (self.column,))
        cell = table[self.column][self.row].as_py()
        return cell_bytes(cell if self.position is None else cell[self.position], str(self))


class ParquetRecords:
    """The rows of a parquet file; of each column that holds images, only where they are.

    Args:
        file: The file; with `blocks` its footer is enough.
        blocks: Cache that row groups are read through; None where they are read as they lie.

    Raises:
        MissingPackage: pyarrow is not installed.
        ValueError: The file is not a parquet file.
    """

    def __init__(self, file: Path, blocks: Blocks | None = None) -> None:
        self.file, self.blocks = file, blocks
        pyarrow = import_pyarrow(str(file))
        try:
            opened = _open(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as parquet: {error}") from error
        schema, metadata = opened.schema_arrow, opened.metadata
        self._images = image_columns(schema, str(file))
        self._columns = tuple(name for name in schema.names if name not in self._images)
        self._starts = np.cumsum(
            [0, *(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def block_starts(self) -> np.ndarray:
        """First row of each block that is read at once, for an order in windows of blocks."""
        return self._starts[:-1]

    @property
    def identity(self) -> list[Any]:
        """What tells the file from others, as its footer has it."""
        metadata = _open(self.file).metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return [self.file.name, [[one.num_rows, one.total_byte_size] for one in groups]]

    def name(self, index: int) -> str:
        """Return the number of the row, from 0."""
        return str(index)

    def where(self, index: int) -> str:
        """Return file and row."""
        return f"{self.file}, row {index}"

    def read(self, index: int) -> dict[str, Any]:
        """Read one row as a record, its images as places in the file.

        Raises:
            RecordError: The file is damaged.
        """
        pyarrow = import_pyarrow(str(self.file))
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[group])
        if self.blocks is not None:
            return self._read_block(self.blocks, group, row)
        try:
            content = {
                name: column[row].as_py()
                for name, column in _columns_of(self.file, group, self._columns)
            }
            places = {column: self._places(group, row, column) for column in self._images}
        except (pyarrow.ArrowException, OSError) as error:
            raise RecordError(
                f"it cannot be read: {error}", "get the file again", self.where(index)
            ) from error
        return with_places(content, places)

    def _read_block(self, blocks: Blocks, group: int, row: int) -> dict[str, Any]:
        table = blocks.table(self.file, group)
        content = {name: table[name][row].as_py() for name in self._columns}
        places = {
            name: cell_places(
                table[name][row],
                lambda position, name=name: ParquetImage(
                    self.file, group, row, name, position, blocks
                ),
            )
            for name in self._images
        }
        return with_places(content, places)

    def scan(self, is_wanted: Callable[[str], bool]) -> Iterator[dict[str, Any] | None]:
        """Yield the rows in order without their images, a row group at a time; see `Rows.scan`."""
        pyarrow = import_pyarrow(str(self.file))
        columns = [name for name in self._columns if is_wanted(name)]
        for group, num_rows in enumerate(np.diff(self._starts).tolist()):
            try:
                if self.blocks is not None:
                    table = self.blocks.table(self.file, group).select(columns)
                else:
                    opened = _open(self.file)
                    table = opened.read_row_group(group, columns=columns, use_threads=False)
            except (pyarrow.ArrowException, OSError, RecordError):
                yield from [None] * num_rows
                continue
            yield from (with_places(row, {}) for row in table.to_pylist())

    def _places(self, group: int, row: int, column: str) -> Any:
        """Return where the image of a cell is, or its path; a list where the cell is one."""
        cell = _image_outlines(self.file, group, column)[row]
        if isinstance(cell, list):
            return [
                ParquetImage(self.file, group, row, column, number) if part is True else part
                for number, part in enumerate(cell)
            ]
        return ParquetImage(self.file, group, row, column, None) if cell is True else cell


def load(
    root: Path | None,
    split: str,
    image_root: Sequence[Path] = (),
    unreadable_shards: str = "fail",
    cache_gb: float | None = None,
) -> Rows:
    """Index the files of a split; arguments and errors as in `messages`.

    Args:
        unreadable_shards: `skip` leaves out files that are no parquet.
        cache_gb: Size of the cache that row groups are read through; None: read as they lie.

    Raises:
        MissingPackage: Also where pyarrow is not installed.
        ValueError: Also where files cannot be read; all are named.
    """
    files = split_files("parquet", root, split, (".parquet",))
    blocks = None if cache_gb is None or root is None else Blocks.of(root, cache_gb)
    index = partial(ParquetRecords, blocks=blocks)
    indexed, left_out = index_files(files, index, unreadable_shards == "skip")
    parts = [
        Part(f"parquet/{name}", records, image_folders(file, image_root))
        for name, file, records in indexed
    ]
    others = files_of_no_split(root, split, (".parquet",))
    return Rows(parts, "; ".join(filter(None, (left_out, others))) or None)


DATASET = DataSet(
    "parquet",
    load,
    sample_of,
    takes_image_root=True,
    takes=("unreadable_shards", "cache_gb"),
    reads=(*READS, "window_rows"),
)


@lru_cache(maxsize=16)
def _open(file: Path) -> ParquetFile:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file)


@lru_cache(maxsize=4)
def _read_group(file: Path, group: int, columns: tuple[str, ...]) -> pyarrow.Table:
    # No threads of its own: this runs in the workers of a data loader, which are forks.
    return _open(file).read_row_group(group, columns=list(columns), use_threads=False)


def _columns_of(file: Path, group: int, columns: tuple[str, ...]) -> list[tuple[str, Any]]:
    table = _read_group(file, group, columns)
    return [(name, table[name]) for name in columns]


@lru_cache(maxsize=4)
def _image_outlines(file: Path, group: int, column: str) -> list[Any]:
    """Return the outline of each cell of a row group's image column, without the pixels.

    An outline is None, True or a path, or a list of these. A path stands where the cell holds no
    bytes, as `Dataset.to_parquet` writes images that lie in files.
    """
    opened = _open(file)
    leaves = [opened.schema.column(number).path for number in range(len(opened.schema))]
    of_image = {path: number for number, path in enumerate(leaves) if path.split(".")[0] == column}
    paths = [path for path in of_image if path.endswith(".path")]
    # Plain bytes, or no paths beside them: only reading the pixels tells which cells are null.
    if not paths:
        return [_outline(cell) for cell in _read_group(file, group, (column,))[column]]
    cells = _read_group(file, group, (paths[0],))[column].to_pylist()
    chunks = [
        opened.metadata.row_group(group).column(number)
        for path, number in of_image.items()
        if path.endswith(".bytes")
    ]
    without_bytes = all(
        chunk.statistics is not None and chunk.statistics.null_count == chunk.num_values
        for chunk in chunks
    )
    if without_bytes:
        return [_path_of(cell) for cell in cells]

    # Some images may lie in files, others here: more bytes are null than there are null cells.
    num_null = sum(chunk.statistics.null_count for chunk in chunks if chunk.statistics is not None)
    if num_null > sum(map(_num_null, cells)):
        return [_outline(cell) for cell in _read_group(file, group, (column,))[column]]
    return [_marks(cell) for cell in cells]


def _outline(cell: Any) -> Any:
    if not cell.is_valid:
        return None
    if hasattr(cell.type, "value_type"):
        return [_outline(part) for part in cell]
    is_path = hasattr(cell, "keys") and "path" in cell and not cell["bytes"].is_valid
    return (cell["path"].as_py() or True) if is_path else True


def _path_of(cell: Any) -> Any:
    if isinstance(cell, list):
        return [_path_of(part) for part in cell]
    return None if cell is None else cell["path"]


def _num_null(cell: Any) -> int:
    """Return how many nulls a leaf has because of this cell; an empty list is one."""
    if isinstance(cell, list):
        return sum(map(_num_null, cell)) if cell else 1
    return int(cell is None)


def _marks(cell: Any) -> Any:
    if isinstance(cell, list):
        return [_marks(part) for part in cell]
    return None if cell is None else True
