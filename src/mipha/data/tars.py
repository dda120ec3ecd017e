"""The files of a tar, and which of them are one sample: those side by side under one name.

    0001.jpg  0001.json  0002.0.jpg  0002.1.jpg  0002.txt      two samples, 0001 and 0002

Source of the layout: https://webdataset.github.io/webdataset, a file's key ends at the first dot of
its name
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import BinaryIO, NamedTuple

import numpy as np

from mipha.data.images import SUFFIXES

_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)
_BLOCK = 512


class Member(NamedTuple):
    """One file of a tar.

    Args:
        key: Its name up to the first dot.
        suffix: Its last suffix in lower case, with the dot.
        header: Where it begins in the tar, in bytes.
        offset: Where its content begins.
        size: Bytes of the content.
    """

    key: str
    suffix: str
    header: int
    offset: int
    size: int


def is_part(suffix: str) -> bool:
    """Return whether a file with this suffix is read; a README, say, is no part of a sample."""
    return suffix in SUFFIXES or suffix in (".json", ".txt")


def members(stream: BinaryIO, name: str) -> Iterator[Member]:
    """Yield the files of a tar in order, without folders and names that no sample can have.

    Args:
        stream: An uncompressed tar; only headers are read.
        name: What messages call it.

    Raises:
        ValueError: It is not a tar, is compressed or cut short, or holds links.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while member := tar.next():
                tar.members = []  # else the tar keeps a kilobyte of each
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(
                        f"{name} holds {member.name!r}, which is a link or no plain file; "
                        "pack the files themselves"
                    )
                if member.offset_data + member.size >= 2**63:
                    raise tarfile.ReadError(f"{member.name!r} has {member.size:.0e} bytes")
                if found := _NAME.fullmatch(member.name):
                    suffix = "." + found[2].lower().rpartition(".")[2]
                    yield Member(found[1], suffix, member.offset, member.offset_data, member.size)

            # Behind the first header, tarfile takes damage and the end of the file for the end.
            stream.seek(tar.offset)
            if stream.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError(f"at byte {tar.offset:,} it has no header and no end mark")
            _refuse_another(stream, name)
    except (tarfile.TarError, EOFError) as error:
        stream.seek(0)
        start = stream.read(6)
        packed = start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        fix = "decompress it (gunzip), keep the tar" if packed else "is it cut short?"
        if start.startswith(b"PK\x03\x04"):
            fix = "it is a zip: pack its files as a tar"
        raise ValueError(f"{name} cannot be read as a tar: {error}; {fix}") from error


def _refuse_another(stream: BinaryIO, name: str) -> None:
    """Refuse a second tar behind the end mark of the first, whose samples nobody would read.

    Raises:
        ValueError: There is one, as after `cat a.tar b.tar`.
    """
    while block := stream.read(_BLOCK):
        if block.strip(b"\0"):
            try:
                tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
            except tarfile.HeaderError:
                return  # padding of another kind
            raise ValueError(
                f"{name} holds another tar behind its end, whose files would not be read: "
                "unpack both and pack their files as one"
            )


def sample_starts(stream: BinaryIO, name: str) -> np.ndarray:
    """Return `(samples + 1,)` int64: where each sample of a tar begins, and where the last ends.

    Arguments and errors as `members`.
    """
    starts, end = [], 0
    for _, files in groupby(members(stream, name), key=lambda member: member.key):
        sample = list(files)
        if any(is_part(member.suffix) for member in sample):
            starts.append(sample[0].header)
            end = sample[-1].offset + -(-sample[-1].size // _BLOCK) * _BLOCK
    return np.asarray([*starts, end], dtype=np.int64)
