"""Images are the same by content, wherever they lie; hashes are remembered, never wrongly."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from mipha.data.image_keys import ImageKeys, content_digest
from mipha.data.images import FileSlice

LARGE = bytes(70_000)


def test_copies_have_one_key_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"picture")
    (tmp_path / "b").write_bytes(b"picture")
    (tmp_path / "tar").write_bytes(b"..picture")
    copies = (b"picture", tmp_path / "a", tmp_path / "b", FileSlice(tmp_path / "tar", 2, 7, "x"))
    keys = ImageKeys(tmp_path / "keys")
    assert len({keys.of([copy]) for copy in copies}) == 1
    assert keys.of([]) == 0 != keys.of([b"a", b"b"]) != keys.of([b"b", b"a"])
    assert keys.of([b"ab", b"c"]) != keys.of([b"a", b"bc"]) != keys.of([b"abc"])


def test_pictures_that_differ_in_the_middle_differ(tmp_path: Path) -> None:
    """A bitmap's borders and size say nothing of what is between them."""
    keys = ImageKeys(tmp_path / "keys")
    assert keys.of([LARGE]) != keys.of([LARGE[:35_000] + b"x" + LARGE[35_001:]])


def test_a_file_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(LARGE)
    place = FileSlice(file, 0, 69_000, "first")
    with ImageKeys(tmp_path / "keys.sqlite") as keys:
        first, part = keys.of([file]), keys.of([place])

    read = Path.read_bytes
    looked_at: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: looked_at.append(self) or read(self))
    with ImageKeys(tmp_path / "keys.sqlite") as keys:
        assert (keys.of([file]), keys.of([place])) == (first, part)
    assert looked_at == []
    file.write_bytes(LARGE[:-1] + b"x")
    os.utime(file, (1, 1))
    with ImageKeys(tmp_path / "keys.sqlite") as keys:
        assert keys.digest(file) == content_digest(LARGE[:-1] + b"x")
    assert looked_at == [file]


def test_small_files_are_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with ImageKeys(tmp_path / "keys.sqlite") as keys:
        keys.of([tmp_path / "a"])
    assert not (tmp_path / "keys.sqlite").exists()


@pytest.mark.parametrize("content", [b"no database", None])
def test_what_cannot_be_remembered_is_read_again(content: bytes | None, tmp_path: Path) -> None:
    file, database = tmp_path / "a", tmp_path / "folder" / "keys"
    file.write_bytes(LARGE)
    if content is None:
        (tmp_path / "folder").write_bytes(b"a file where the folder should be")
    else:
        database.parent.mkdir()
        database.write_bytes(content)
    for _ in range(2):
        with ImageKeys(database) as keys:
            assert keys.digest(file) == content_digest(LARGE)


def test_a_missing_image_is_named_by_its_place(tmp_path: Path) -> None:
    keys = ImageKeys(tmp_path / "keys")
    assert keys.of([tmp_path / "a"]) != keys.of([tmp_path / "b"])


def test_two_programs_share_the_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(LARGE + name.encode())
    with ImageKeys(tmp_path / "keys") as first, ImageKeys(tmp_path / "keys") as second:
        first.of([tmp_path / "a"])
        second.of([tmp_path / "b"])
    rows = sqlite3.connect(tmp_path / "keys").execute("SELECT count(*) FROM images").fetchone()
    assert rows == (2,)
