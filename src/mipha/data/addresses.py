"""Data behind an address, copied into this machine's cache before they are read.

    https://HOST/train.parquet            one file
    https://HOST/shards/{000..127}.tar    128 files
    s3://BUCKET/FOLDER, gs://, ...        a file or a folder of any file system that fsspec has
    hf://datasets/OWNER/NAME              files of a config and split of a set on the hub

Everything behind this reads plain local files, so the order of samples, resuming and the number of
processes are as for local data. A copy is whole or not there: a download that was cut goes on
where it ended. All processes of a machine share the copy; one makes it, the others wait. For data
that are larger than the disk, `blocks` reads parts of the files instead.

Credentials are read from the environment by the libraries, never from an address.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx

from mipha.errors import import_optional
from mipha.files import cache_folder, read_json_object, write_whole
from mipha.terminal import echo

TRIES = 6
"""Times that a transfer is begun without any byte in between before it is given up."""

FIRST_WAIT = 0.5
"""Seconds before the second try; each later wait is twice as long."""

_CHUNK = 1 << 20
_TIMEOUT = httpx.Timeout(30, connect=10)
_NO_RETRY = {
    401: "the server wants a login: download the files yourself and give their folder",
    403: "the server does not let you read it: check the address, or ask for access",
    404: "there is no such file: check the address",
    410: "there is no such file any more: check the address",
}
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_T = TypeVar("_T")


class RemoteFile(NamedTuple):
    """One file behind an address.

    Args:
        address: Its own address.
        name: Path in the cache's folder of the data.
        size: Bytes.
        etag: What the server calls this content; empty where it does not say.
    """

    address: str
    name: str
    size: int
    etag: str


def copy_to_cache(address: str) -> Path:
    """Return the local copy of what an address names: a file, or a folder of files.

    Raises:
        FileNotFoundError: There is no such file.
        PermissionError: The server does not let it be read.
        ConnectionError: The server fails again and again.
        ValueError: The content changed since it was copied.
        OSError: The disk is too small.
        MissingPackage: fsspec, or its file system for such addresses, is not installed.
    """
    folder = cache_folder() / "addresses" / hashlib.sha256(address.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        files = list_files(address)
        wanted = [file for file in files if not is_kept(folder, file)]
        if wanted:
            _check_disk(folder, wanted)
            size = sum(file.size for file in wanted)
            echo(
                f"mipha: copying {len(wanted)} files ({size / 1e6:,.1f} MB) of {address} "
                f"into {folder}",
                err=True,
            )
        for file in wanted:
            _copy(folder, file)
    return folder / files[0].name if len(files) == 1 else folder


def list_files(address: str) -> list[RemoteFile]:
    """Return the files behind an address, their sizes as the server gives them; as `copy_to_cache`.

    Nothing but their names and sizes is read.
    """
    if not address.startswith(("http://", "https://")):
        return _list_file_system(address)
    with _client() as client:
        return [_look(client, one) for one in _expand(address)]


def read_range(file: RemoteFile, begin: int, end: int) -> bytes:
    """Return some bytes of a file behind an address, as `list_files` describes it.

    Raises:
        ConnectionError: The server fails again and again.
        ValueError: The content changed, or the server sends no parts of files.
        FileNotFoundError, PermissionError: As `copy_to_cache`.
    """
    get = _get_range if file.address.startswith(("http://", "https://")) else _cat_range

    def transfer() -> bytes:
        content = get(file, begin, end)
        if len(content) != end - begin:
            raise _Failing(f"it sent {len(content):,} bytes of {end - begin:,}")
        return content

    return _retry(transfer, lambda: f"{file.address}, bytes {begin:,} to {end:,},")


def _expand(address: str) -> list[str]:
    """Return the addresses that `{000..127}` stands for."""
    found = _BRACES.search(address)
    if found is None:
        return [address]
    first, last = found.groups()
    head, tail = address[: found.start()], address[found.end() :]
    return [f"{head}{n:0{len(first)}d}{tail}" for n in range(int(first), int(last) + 1)]


# Copies.


def is_kept(folder: Path, file: RemoteFile, since: str = "it was copied") -> bool:
    """Return whether a copy of a file, or what was made of it, is in a folder.

    Args:
        since: When that was, for the message.

    Raises:
        ValueError: It is, but the server has another now.
    """
    path, note = folder / file.name, note_of(folder / file.name)
    if not path.is_file() or not note.is_file():
        return False
    known = read_json_object(note, f"delete {folder}")
    if (known.get("size"), known.get("etag")) != (file.size, file.etag):
        raise ValueError(
            f"{file.address} changed since {since}: give the address of one revision, or delete "
            f"{folder} to read it anew"
        )
    return True


def _copy(folder: Path, file: RemoteFile) -> None:
    """Copy one file; what an earlier try left is gone on with, if it is of the same content."""
    path, note = folder / file.name, note_of(folder / file.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(f".{hashlib.sha256(repr(file).encode()).hexdigest()[:8]}.partial")

    def done() -> int:
        return partial.stat().st_size if partial.is_file() else 0

    def transfer() -> None:
        with partial.open("ab") as stream:
            if done() < file.size:
                for chunk in _read_from(file, done(), stream):
                    stream.write(chunk)

    _retry(transfer, lambda: f"{file.address}, byte {done():,} of {file.size:,},", done)
    if (size := partial.stat().st_size) != file.size:
        partial.unlink()
        raise ConnectionError(f"{file.address} gave {size:,} bytes of {file.size:,}: try again")
    os.replace(partial, path)
    write_whole(note, json.dumps(file._asdict()) + "\n")


def note_of(path: Path) -> Path:
    """Return where it is written what a copy, or an index, is of; hidden, so that it is no data."""
    return path.with_name(f".{path.name}.json")


def _check_disk(folder: Path, files: Sequence[RemoteFile]) -> None:
    wanted, free = sum(file.size for file in files), shutil.disk_usage(folder).free
    if wanted > free:
        raise OSError(
            f"{folder} has {free / 1e9:,.1f} GB free and the data take {wanted / 1e9:,.1f} GB: "
            "set MIPHA_CACHE to a folder on a larger disk"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which other processes wait for."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Transfers.


class _Failing(Exception):
    """A transfer that may succeed when it is tried again."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def _retry(
    transfer: Callable[[], _T], name: Callable[[], str], progress: Callable[[], int] = lambda: 0
) -> _T:
    """Return the result of a transfer, which is begun again until `TRIES` in a row bring nothing.

    Args:
        transfer: Raises `_Failing` or an error of httpx's transport where another try may succeed.
        name: What is transferred, for the message.
        progress: Bytes that are there; more of them make the next failure the first again.

    Raises:
        ConnectionError: It fails again and again.
    """
    failures, done = 0, progress()
    while True:
        try:
            return transfer()
        except (_Failing, httpx.TransportError) as error:
            before, done = done, progress()
            failures = 1 if done > before else failures + 1
            if failures == TRIES:
                raise ConnectionError(
                    f"{name()} failed {TRIES} times: {str(error) or type(error).__name__}; "
                    "run the same command again to go on"
                ) from error

            given = error.wait if isinstance(error, _Failing) else None
            drawn = FIRST_WAIT * 2 ** (failures - 1) * random.uniform(1, 1.5)
            time.sleep(drawn if given is None else given)


def _client() -> httpx.Client:
    # Compressed transfers have other sizes and offsets.
    headers = {"accept-encoding": "identity"}
    return httpx.Client(follow_redirects=True, timeout=_TIMEOUT, headers=headers)


@lru_cache(maxsize=1)
def _shared_client(process: int) -> httpx.Client:
    """Return a client that keeps its connections; a forked process needs one of its own."""
    return _client()


def _look(client: httpx.Client, address: str) -> RemoteFile:
    """Ask a server for size and name of a content."""

    def ask() -> httpx.Response:
        response = client.head(address)
        if response.status_code in (405, 501):
            with client.stream("GET", address) as response:
                pass
        _check_status(response, address)
        return response

    response = _retry(ask, lambda: address)
    if "content-length" not in response.headers:
        raise ValueError(
            f"{address} does not say its size: download it yourself and give its folder"
        )
    name = response.request.url.path.rpartition("/")[2] if not response.history else ""
    name = name or httpx.URL(address).path.rpartition("/")[2]
    return RemoteFile(
        address, name, int(response.headers["content-length"]), response.headers.get("etag", "")
    )


def _check_status(response: httpx.Response, address: str) -> None:
    code = response.status_code
    if code in _NO_RETRY:
        kind = PermissionError if code in (401, 403) else FileNotFoundError
        raise kind(f"{address} answers {code}: {_NO_RETRY[code]}")
    if code == 429 or code >= 500:
        wait = response.headers.get("retry-after", "")
        raise _Failing(f"it answers {code}", float(wait) if wait.isdecimal() else None)
    if code >= 400:
        raise ValueError(f"{address} answers {code}: check the address")


def _read_from(file: RemoteFile, done: int, stream: Any) -> Iterator[bytes]:
    """Yield a file's content from a byte on; the stream is emptied where it comes from the start.

    Raises:
        _Failing, httpx.TransportError: The transfer ended early.
        ValueError: The content is another one by now.
    """
    if not file.address.startswith(("http://", "https://")):
        yield from _read_file_system(file, done)
        return
    headers = {"range": f"bytes={done}-"} if done else {}
    with _client() as client, client.stream("GET", file.address, headers=headers) as response:
        if done and response.status_code == 416:
            raise ValueError(f"{file.address} is shorter than it was: run the command again")
        _check_status(response, file.address)
        etag = response.headers.get("etag", "")
        length = int(response.headers.get("content-length", file.size - done))
        begins_at = done if response.status_code == 206 else 0
        if (etag and file.etag and etag != file.etag) or begins_at + length != file.size:
            raise ValueError(
                f"{file.address} changed while it was copied: give the address of one revision"
            )
        if done and response.status_code != 206:
            stream.truncate(0)  # the server sends no ranges
        yield from response.iter_raw()  # as it comes, so that a cut loses nothing


def _get_range(file: RemoteFile, begin: int, end: int) -> bytes:
    client = _shared_client(os.getpid())
    response = client.get(file.address, headers={"range": f"bytes={begin}-{end - 1}"})
    _check_status(response, file.address)
    etag = response.headers.get("etag", "")
    size = response.headers.get("content-range", "").rpartition("/")[2]
    if (etag and file.etag and etag != file.etag) or (size.isdecimal() and int(size) != file.size):
        raise _changed(file)
    if response.status_code != 206:
        raise ValueError(
            f"{file.address} is on a server that sends no parts of files: leave cache_gb out, and "
            "the files are copied whole"
        )
    return response.content


def _cat_range(file: RemoteFile, begin: int, end: int) -> bytes:
    system, path = _file_system(file.address)
    try:
        facts = system.info(path)
        if (int(facts["size"]), _etag_of(facts)) != (file.size, file.etag):
            raise _changed(file)
        content: bytes = system.cat_file(path, start=begin, end=end)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        raise _Failing(str(error) or type(error).__name__) from error
    return content


def _changed(file: RemoteFile) -> ValueError:
    return ValueError(
        f"{file.address} changed since its index was made: give the address of one revision"
    )


def _etag_of(facts: dict[str, Any]) -> str:
    return next((str(facts[key]) for key in ("ETag", "etag", "mtime") if facts.get(key)), "")


def _file_system(address: str) -> tuple[Any, str]:
    fsspec = import_optional("fsspec", f"reading {address}", "data")
    protocol = address.partition("://")[0]
    try:
        return fsspec.filesystem(protocol), address
    except (ImportError, ValueError) as error:
        raise ValueError(f"{address} cannot be read: {error}") from error


def _list_file_system(address: str) -> list[RemoteFile]:
    system, path = _file_system(address)
    found: list[RemoteFile] = []
    for one in _expand(path):
        if not system.exists(one):
            raise FileNotFoundError(f"{one}: there is no such file or folder; check the address")
        files = system.find(one) if system.isdir(one) else [one]
        root = system._strip_protocol(one)
        for name in files:
            facts = system.info(name)
            own = system._strip_protocol(name)
            inside = own.removeprefix(root).strip("/") or own.rpartition("/")[2]
            found.append(
                RemoteFile(
                    system.unstrip_protocol(name), inside, int(facts["size"]), _etag_of(facts)
                )
            )
    if not found:
        raise FileNotFoundError(f"{address}: the folder is empty; check the address")
    return found


def _read_file_system(file: RemoteFile, done: int) -> Iterator[bytes]:
    system, path = _file_system(file.address)
    try:
        with system.open(path, "rb") as stream:
            stream.seek(done)
            while chunk := stream.read(_CHUNK):
                yield chunk
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        raise _Failing(str(error) or type(error).__name__) from error
