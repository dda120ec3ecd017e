"""Blocks of large files, kept on this machine's disk one by one while they are in use.

A set that is larger than the disk is read through a cache of a given size. Of each file behind an
address an index is kept; a block is fetched by one request when a row of it is first read, and
stays as an Arrow file that is mapped into memory:

    file       index                                block
    parquet    its footer: a file without rows      a row group
    tar        where each sample begins             64 MiB of whole samples, each a row of bytes

    index_address("https://HOST/{000..127}.parquet")     a folder of indices
    Blocks.of(folder, cache_gb).table(file, number)      block as a mapped table

All processes of the machine share the cache: one fetches a block, the others wait. The block that
nobody read for longest goes first when the cache is full. Which samples are read never depends on
what the cache holds.

The index of a tar is that of Megatron Energon, `X.tar.idx`: offsets of 8 bytes, of each sample and
of the end. Where none lies beside the tar, the tar is read through once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mipha.data.addresses import (
    RemoteFile,
    is_kept,
    list_files,
    locked,
    note_of,
    read_range,
)
from mipha.data.faults import RecordError
from mipha.data.tars import sample_starts
from mipha.errors import import_optional
from mipha.files import cache_folder, read_json_object, write_whole
from mipha.terminal import echo

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import FileMetaData

_KINDS = (".parquet", ".tar")
_OFFSETS = np.dtype("<u8")
_INDICES_AT_A_TIME = 16
_FOOTER_BYTES = 1 << 16
"""Bytes at the end of a file that are read first; most footers fit."""

_STRETCH = 1 << 26
"""Bytes of a tar in which the samples of one block begin."""

_AHEAD = 1 << 23
"""Bytes that are fetched at once of a tar that is read through."""

_ABANDONED = 600
"""Seconds after which a half-written block is of a process that was killed."""

_MOST_OPEN = 256
"""Blocks that a process has mapped; each takes a file handle."""

_LOCKS = 256
"""Lock files of a cache, which blocks share by their hash."""


class Blocks(NamedTuple):
    """The cache of one data set.

    Args:
        folder: Folder of its blocks.
        limit: Bytes that they may take; the newest one stays whatever its size.
    """

    folder: Path
    limit: int

    @classmethod
    def of(cls, root: Path, cache_gb: float) -> Blocks:
        """Return the cache of a file or folder, of a size in gigabytes."""
        name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        return cls(cache_folder() / "blocks" / name, int(cache_gb * 1e9))

    def table(self, file: Path, group: int) -> pyarrow.Table:
        """Return a block, mapped into memory; it is fetched if it is not there.

        Args:
            file: A parquet file, or the index of a file behind an address.
            group: Number of the block: of the row group of a parquet file, of the stretch of a
                tar, whose one column `sample` holds bytes.

        Raises:
            ConnectionError: The server fails again and again.
            RecordError: The row group is damaged.
            ValueError: The file changed since its index was made.
            OSError: The disk is full.
        """
        entry = self.folder / f"{_name_of(file, group)}.arrow"
        if (kept := _open_tables.get(entry)) is not None:
            _open_tables.move_to_end(entry)
            with suppress(FileNotFoundError):  # it went, and can still be read while it is mapped
                os.utime(entry)
            return kept[0]

        # Map it, or fetch it first; another process may delete it at any moment.
        self.folder.mkdir(parents=True, exist_ok=True)
        number = int(entry.stem[:8], 16) % _LOCKS
        with locked(self.folder / f".lock-{number}"):
            try:
                os.utime(entry)  # in use: it is the last to go
                table = _map(entry)
            except FileNotFoundError:
                table = self._keep(entry, _read_group(file, group))

        # Keep it open, and close what was not used for longest.
        _open_tables[entry] = table, table.nbytes
        while len(_open_tables) > 1 and (
            len(_open_tables) > _MOST_OPEN
            or sum(size for _, size in _open_tables.values()) > self.limit // 2
        ):
            _open_tables.popitem(last=False)
        return table

    def _keep(self, entry: Path, table: pyarrow.Table) -> pyarrow.Table:
        """Write a block, and delete those that nobody read for longest; return it mapped."""
        partial = entry.with_suffix(f".{os.getpid()}.partial")
        try:
            with locked(self.folder / ".lock-space"):
                self._make_room(table.nbytes)
            _write(partial, table)
            mapped = _map(partial)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                f"{self.folder} has no room for {table.nbytes / 1e6:,.0f} MB: set a smaller "
                "cache_gb, or MIPHA_CACHE to a folder on a larger disk"
            ) from error
        os.replace(partial, entry)
        return mapped

    def _make_room(self, wanted: int) -> None:
        for path in self.folder.glob("*.partial"):  # of processes that were killed
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
        found = []
        for path in self.folder.glob("*.arrow"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        taken = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if taken + wanted <= self.limit:
                break
            path.unlink(missing_ok=True)  # whoever has it mapped can still read it
            taken -= size


_open_tables: OrderedDict[Path, tuple[pyarrow.Table, int]] = OrderedDict()
"""Blocks that this process has mapped and their bytes, the one used last at the end."""


def index_address(
    address: str, files: list[RemoteFile] | None = None, skip: bool = False
) -> tuple[Path, str | None]:
    """Return the indices of the parquet files or tars behind an address: a file, or a folder.

    They are made once; a second start asks only whether the files are still the same.

    Args:
        address: As `addresses.copy_to_cache`.
        files: Files that are meant, whose folder is returned; None: all that the address names.
        skip: Whether to leave out files that cannot be read.

    Returns:
        The file or folder; and a sentence on files left out, None where there are none.

    Raises:
        ValueError: A file is neither, or changed; files cannot be read, and `skip` is false or
            nothing is left; both kinds are mixed; or the server sends no parts of files.
        FileNotFoundError, PermissionError, ConnectionError: As `addresses.copy_to_cache`.
    """
    is_whole = files is None
    files = list_files(address) if files is None else files
    files = [file for file in files if not file.name.lower().endswith(".tar.idx")]
    kinds = {Path(file.name).suffix.lower() for file in files}
    if others := [file.name for file in files if not file.name.lower().endswith(_KINDS)]:
        raise ValueError(
            f"cache_gb reads parquet files and tars, and {address} has {others[0]}: leave it out, "
            "and the files are copied whole"
        )
    if is_whole and len(kinds) > 1:
        raise ValueError(f"{address} has parquet files and tars: give one data set for each")
    if len({file.name for file in files}) < len(files):
        raise ValueError(f"{address} names files of the same name: give one data set for each")
    folder = cache_folder() / "indices" / hashlib.sha256(address.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"), ThreadPoolExecutor(_INDICES_AT_A_TIME) as pool:
        new = [file for file in files if not is_kept(folder, file, "its index was made")]
        broken = [str(error) for error in pool.map(lambda one: _index(folder, one), new) if error]
    left_out = None
    if broken:
        listed = f"{len(broken)} of {len(files)} files {{}}: {'; '.join(broken)}"
        if not skip or len(broken) == len(files):
            more = "; train on the others with unreadable_shards=skip" if len(files) > 1 else ""
            raise ValueError(listed.format("cannot be read") + more)
        left_out = listed.format("are left out")
    if not is_whole:
        return folder, left_out

    # A file that is no longer there is no longer part of the data.
    names = {folder / file.name for file in files}
    for path in folder.rglob("*"):
        if path.suffix.lower() in _KINDS and path not in names:
            path.unlink()
    return (folder / files[0].name if len(files) == 1 else folder), left_out


def _index(folder: Path, file: RemoteFile) -> ValueError | None:
    """Keep the index of a file; return why it cannot be read."""
    path, note = folder / file.name, note_of(folder / file.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(".partial")
    try:
        (_index_tar if path.suffix.lower() == ".tar" else _index_parquet)(file, partial)
    except ValueError as error:
        return error
    os.replace(partial, path)
    write_whole(note, json.dumps(file._asdict()) + "\n")
    return None


def _index_parquet(file: RemoteFile, path: Path) -> None:
    """Write the footer of a parquet file, whose length stands in its last eight bytes."""
    parquet = import_optional("pyarrow.parquet", f"reading {file.address}", "data")
    content = read_range(file, max(file.size - _FOOTER_BYTES, 0), file.size)
    length = int.from_bytes(content[-8:-4], "little") + 8
    if content[-4:] != b"PAR1" or length > file.size:
        raise ValueError(f"{file.address} is no parquet file, or is cut short")
    if length > len(content):
        content = read_range(file, file.size - length, file.size)
    metadata = parquet.read_metadata(BytesIO(b"PAR1" + content[-length:]))
    metadata.write_metadata_file(str(path))


def _index_tar(file: RemoteFile, path: Path) -> None:
    """Write where the samples of a tar begin, as the index beside it says, or after a look."""
    try:
        (beside,) = list_files(f"{file.address}.idx")
    except (FileNotFoundError, PermissionError):
        size = f"{file.size / 1e6:,.1f} MB"
        echo(f"mipha: {file.address} has no .tar.idx, so it is read through ({size})", err=True)
        starts = sample_starts(_Ahead(file), file.address)  # type: ignore[arg-type]
    else:
        most = 8 * (file.size // 512 + 1)  # each sample takes a header at least
        content = read_range(beside, 0, beside.size) if beside.size <= most else b""
        starts = np.frombuffer(content[: len(content) // 8 * 8], _OFFSETS).astype(np.int64)
        in_order = len(starts) > 1 and starts[0] >= 0 and bool((np.diff(starts) > 0).all())
        end = int(starts[-1]) if in_order and not (starts % 512).any() else file.size
        if end + 512 > file.size or read_range(file, end, end + 512) != bytes(512):
            raise ValueError(
                f"{beside.address} is not the index of the tar beside it ({file.size:,} bytes), or "
                "the tar is cut short: get the tar again, or make the index again (energon prepare)"
            )
    starts.astype(_OFFSETS).tofile(path)


def read_starts(file: Path) -> np.ndarray:
    """Return the index of a tar: `(samples + 1,)` int64, where each begins and the last ends."""
    return np.fromfile(file, _OFFSETS).astype(np.int64)


def stretches(starts: np.ndarray) -> np.ndarray:
    """Return `(blocks,)` int64: the first sample of each block of a tar.

    Args:
        starts: As `read_starts`.
    """
    return np.unique(starts[:-1] // _STRETCH, return_index=True)[1]


def _remote(file: Path) -> RemoteFile | None:
    """Return the file that this is the index of; None for a file with its rows."""
    note = note_of(file)
    return RemoteFile(**read_json_object(note)) if note.is_file() else None


def _name_of(file: Path, group: int) -> str:
    status = file.stat()
    named = f"{file} {status.st_size} {status.st_mtime_ns} {group}"
    return hashlib.sha256(named.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _read_group(file: Path, group: int) -> pyarrow.Table:
    """Read a block, over the network by one request.

    Raises:
        RecordError: It is damaged.
    """
    pyarrow = import_optional("pyarrow", f"reading {file}", "data")
    parquet = import_optional("pyarrow.parquet", f"reading {file}", "data")
    source, remote = file, _remote(file)
    if file.suffix.lower() == ".tar":
        assert remote is not None
        return _read_stretch(file, remote, group)
    metadata = parquet.read_metadata(file)
    if remote is not None:
        begin, end = _range_of(metadata, group)
        source = _Part(begin, read_range(remote, begin, end), remote.size)

    # No threads of its own: this runs in the workers of a data loader, which are forks.
    try:
        with parquet.ParquetFile(source, metadata=metadata, page_checksum_verification=True) as one:
            return one.read_row_group(group, use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(
            f"row group {group} cannot be read: {error}", "get the file again", str(file)
        ) from error


def _read_stretch(file: Path, remote: RemoteFile, number: int) -> pyarrow.Table:
    """Read a stretch of a tar as a table with a row of bytes for each sample."""
    pyarrow = import_optional("pyarrow", f"reading {file}", "data")
    starts = read_starts(file)
    first, last = [*stretches(starts), len(starts) - 1][number : number + 2]
    own = starts[first : last + 1]
    content = read_range(remote, int(own[0]), int(own[-1]))

    buffers = [None, pyarrow.py_buffer(own - own[0]), pyarrow.py_buffer(content)]
    kind = pyarrow.large_binary()
    samples = pyarrow.Array.from_buffers(kind, len(own) - 1, buffers)
    return pyarrow.table({"sample": samples})


def _range_of(metadata: FileMetaData, group: int) -> tuple[int, int]:
    """Return the bytes of a row group: begin and end."""
    row_group = metadata.row_group(group)
    spans = []
    for number in range(row_group.num_columns):
        column = row_group.column(number)
        begins = (column.dictionary_page_offset, column.data_page_offset)
        begin = min(offset for offset in begins if offset is not None)
        spans.append((begin, begin + column.total_compressed_size))
    return min(begin for begin, _ in spans), max(end for _, end in spans)


def _write(path: Path, table: pyarrow.Table) -> None:
    pyarrow = import_optional("pyarrow", f"writing {path}", "data")
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)


def _map(path: Path) -> pyarrow.Table:
    pyarrow = import_optional("pyarrow", f"reading {path}", "data")
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()


class _Part(RawIOBase):
    """Some bytes of a file as the whole file; others must not be read.

    Args:
        begin: Place of the bytes in the file.
        content: The bytes.
        size: Size of the file.
    """

    def __init__(self, begin: int, content: bytes, size: int) -> None:
        self.begin, self.content, self.size, self.place = begin, content, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place}.get(whence, self.size)
        return self.place

    def read(self, size: int | None = -1) -> Any:
        end = self.size if size is None or size < 0 else self.place + size
        begin, self.place = self.place, end
        if not self.begin <= begin <= end <= self.begin + len(self.content):
            raise OSError(f"bytes {begin} to {end} are not part of the row group")
        return self.content[begin - self.begin : end - self.begin]


class _Ahead(_Part):
    """A file behind an address that is read from its begin to its end, megabytes at a time."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__(0, b"", file.size)
        self.file = file

    def read(self, size: int | None = -1) -> Any:
        begin, end = min(self.place, self.size), self.size
        if size is not None and size >= 0:
            end = min(begin + size, self.size)
        if not self.begin <= begin <= end <= self.begin + len(self.content):
            ahead = min(max(end, begin + _AHEAD), self.size)
            self.begin, self.content = begin, read_range(self.file, begin, ahead)
        return super().read(end - begin)
