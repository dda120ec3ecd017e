"""One image file at a time: what is said of it, and what makes two of them the same picture."""

from __future__ import annotations

import io
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mipha.data.check.images import image_facts, image_reader
from mipha.data.datasets._images import image_folders, path_inside
from mipha.data.images import FileSlice, open_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def _kinds(source: Path | bytes | FileSlice) -> list[str]:
    return [kind for kind, _ in image_facts(source, "a picture").problems]


def _bytes(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG"} | options)
    return buffer.getvalue()


def test_one_picture_has_one_digest_however_it_is_stored(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    PICTURE.save(tmp_path / "a.bmp")
    tar = tmp_path / "a.tar"
    tar.write_bytes(b"head" + _bytes(PICTURE) + b"tail")
    stored = [
        tmp_path / "a.bmp",
        _bytes(PICTURE),
        _bytes(PICTURE, compress_level=0),
        _bytes(PICTURE, format="WEBP", lossless=True),
        _bytes(PICTURE.convert("RGBA")),
        _bytes(PICTURE.transpose(Image.Transpose.ROTATE_90), exif=turned),
        FileSlice(tar, 4, len(_bytes(PICTURE)), "a picture in a tar"),
    ]
    assert len({image_facts(source, "").digest for source in stored}) == 1
    others = [
        PICTURE.transpose(Image.Transpose.ROTATE_90),
        PICTURE.crop((0, 0, 39, 30)),
        PICTURE.point(lambda value: value ^ 1),
    ]
    assert len({image_facts(_bytes(image), "").digest for image in (PICTURE, *others)}) == 4


def test_a_sound_picture_has_its_size_and_no_problem() -> None:
    facts = image_facts(_bytes(PICTURE), "a picture")
    assert (facts.width, facts.height, facts.problems) == (40, 30, ())


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_ordinary_kinds_of_pictures_are_no_news(mode: str) -> None:
    assert _kinds(_bytes(PICTURE.convert(mode))) == []


@pytest.mark.parametrize("position", range(40, 3000, 237))
def test_a_png_with_one_wrong_byte_is_damaged(position: int) -> None:
    """Decoding alone gives wrong pixels for some of them, without a word."""
    content = bytearray(_bytes(PICTURE))
    content[position] ^= 0x10
    assert _kinds(bytes(content)) == ["truncated-image"]


@pytest.mark.parametrize("size", [0, 1, 11, 60, 400])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_file_cut_short_is_never_sound(kind: str, size: int) -> None:
    assert _kinds(_bytes(PICTURE, format=kind)[:size]) in (
        ["truncated-image"],
        ["unreadable-image"],
    )


@pytest.mark.parametrize(
    ("size", "kinds"),
    [
        ((16, 16), []),
        ((15, 16), ["tiny-image"]),
        ((200, 20), []),
        ((201, 20), ["extreme-aspect"]),
        ((20, 201), ["extreme-aspect"]),
        ((1, 1), ["tiny-image", "blank-image"]),
    ],
)
def test_where_tiny_and_long_begin(size: tuple[int, int], kinds: list[str]) -> None:
    assert _kinds(_bytes(PICTURE.resize(size))) == kinds


@pytest.mark.parametrize(("high", "flat"), [(4, True), (5, False)])
def test_where_flat_begins(high: int, flat: bool) -> None:
    values = np.full((20, 20, 3), 100, dtype=np.uint8)
    values[3, 3, 1] += high
    assert _kinds(_bytes(Image.fromarray(values))) == (["blank-image"] if flat else [])


def test_a_small_file_may_not_ask_for_gigabytes() -> None:
    for size in (
        (10_000, 9_000),
        (30_000, 30_000),
    ):  # below and above the size at which Pillow itself refuses
        facts = image_facts(_bytes(Image.new("1", size)), "a picture")
        assert ([kind for kind, _ in facts.problems], facts.digest) == (["oversized-image"], None)


def test_missing_files_are_named_with_what_is_there_instead(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "Cat.PNG")
    [(kind, said)] = image_facts(tmp_path / "cat.jpg", "cat.jpg").problems
    assert (kind, said) == ("missing-image", "there is no file 'cat.jpg'; there is Cat.PNG")
    [(_, said)] = image_facts(tmp_path / "dog.jpg", "dog.jpg").problems
    assert said == "there is no file 'dog.jpg'"

    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("gone.jpg")
    PICTURE.save(tmp_path / "my cat.png")
    (tmp_path / "mac").mkdir()
    PICTURE.save(tmp_path / "mac" / unicodedata.normalize("NFD", "é.png"))
    for name, cause in (
        ("folder.jpg", "it is a folder"),
        ("pipe.jpg", "it is a pipe or a device"),
        ("link.jpg", "it is a link to gone.jpg, which does not exist"),
        ("my%20cat.png", "there is my cat.png, so write it without the % signs"),
        ("my cat.png ", "there is my cat.png, so write it without the space"),
        (
            "mac/é.png",
            f"there is {unicodedata.normalize('NFD', 'é.png')}, so write it with its accents",
        ),
        ("images/cat.jpg", f"there is no folder {tmp_path / 'images'}"),
    ):
        [(kind, said)] = image_facts(tmp_path / name, name).problems
        assert kind == "missing-image" and f"; {cause}" in said
        with pytest.raises(FileNotFoundError, match=re.escape(cause)):
            open_image(tmp_path / name)


def test_a_path_written_on_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    PICTURE.save(tmp_path / "images/cat.png")
    found = path_inside(image_folders(tmp_path / "a.jsonl"), "images\\cat.png", "here")
    assert image_facts(found, "cat").problems == ()


def test_a_picture_of_many_rows_is_read_once(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    read = image_reader()
    first = read(tmp_path / "a.png", "a.png")
    (tmp_path / "a.png").unlink()
    assert read(tmp_path / "a.png", "a.png") == first
    assert read(tmp_path / "b.png", "b.png").problems[0][0] == "missing-image"


def test_an_image_that_is_flat_as_rgb_alone_is_found_with_the_fix() -> None:
    values = np.linspace(0, 4000, 64 * 64).reshape(64, 64).astype(np.uint16)
    problems = dict(image_facts(_bytes(Image.fromarray(values)), "scan.png").problems)
    text = problems["blank-image"]
    assert "loses its contrast" in text and "save it with 8 bits" in text
