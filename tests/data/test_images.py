"""Every kind of image file becomes upright RGB, or one sentence that names it."""

from __future__ import annotations

import io
import random
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mipha.data.images import (
    MAX_SIDE,
    ContrastWarning,
    FileSlice,
    ImageLike,
    grey_image,
    image_key,
    open_image,
    read_size,
    upright_rgb,
)


def _bytes(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _left_red_right_blue() -> Image.Image:
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    image.paste((0, 0, 255), (4, 0, 8, 4))
    return image


def test_a_path_and_its_bytes_give_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    _left_red_right_blue().save(path)
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (8, 4))
    assert (
        opened.tobytes()
        == open_image(path.read_bytes()).tobytes()
        == _left_red_right_blue().tobytes()
    )


def test_transparency_is_laid_on_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 0, 128))
    opened = open_image(_bytes(half, "PNG"))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 0)) == (127, 127, 127)
    assert open_image(_bytes(Image.new("LA", (1, 1), (0, 0)), "PNG")).getpixel((0, 0)) == (
        255,
        255,
        255,
    )


def test_a_transparent_palette_colour_is_white_and_the_others_keep_theirs() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    opened = open_image(_bytes(image, "PNG", transparency=0))
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == ((255, 255, 255), (200, 100, 50))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    opened = open_image(_bytes(Image.fromarray(values), format))
    assert [opened.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    for number, values in enumerate(
        [np.array([[0, 70000]], dtype=np.int32), np.array([[0.5]], dtype=np.float32)]
    ):
        path = tmp_path / f"{number}.tiff"
        Image.fromarray(values).save(path)
        with pytest.raises(ValueError, match=rf"{number}\.tiff.*8 or 16 bits"):
            open_image(path)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    assert open_image(_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel(
        (1, 1)
    ) == (255, 0, 0)


def test_cmyk_and_one_bit_are_converted() -> None:
    red, green, blue = open_image(
        _bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    ).getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15
    assert open_image(_bytes(Image.new("1", (2, 2), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("orientation", "size", "top_left"),
    [(1, (8, 4), "red"), (3, (8, 4), "blue"), (6, (4, 8), "red"), (8, (4, 8), "blue")],
)
def test_exif_orientation_is_honoured(
    orientation: int, size: tuple[int, int], top_left: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(_bytes(_left_red_right_blue(), "PNG", exif=exif))
    assert opened.size == size
    assert opened.getpixel((0, 0)) == {"red": (255, 0, 0), "blue": (0, 0, 255)}[top_left]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_agrees_with_pillow(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    stored = _bytes(Image.fromarray(pixels), "PNG", exif=exif)
    with Image.open(io.BytesIO(stored)) as image:
        assert open_image(stored).tobytes() == ImageOps.exif_transpose(image).tobytes()


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match=r"bomb\.png"):
        open_image(path)
    with pytest.raises(ValueError, match="8 x 4 is more than 31 pixels"):
        open_image(_bytes(_left_red_right_blue(), "PNG"), max_pixels=31)
    assert open_image(_bytes(_left_red_right_blue(), "PNG"), max_pixels=32).size == (8, 4)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        open_image(tmp_path / "gone.png")
    (tmp_path / "page.png").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.png is not an image"):
        open_image(tmp_path / "page.png")
    with pytest.raises(ValueError, match="image of 0 bytes is not an image"):
        open_image(b"")
    with pytest.raises(ValueError, match="is not an image in a known format"):
        open_image(_bytes(Image.new("RGB", (4, 4)), "EPS"))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_file_cut_short_is_an_error_and_never_anything_but_a_value_error(
    format: str, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = _bytes(Image.fromarray(noise), format)
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut"):
        open_image(tmp_path / "cut")
    chance = random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[chance.randrange(min(len(damaged), 200))] = chance.randrange(256)
        try:
            assert open_image(bytes(damaged), max_pixels=100_000).mode == "RGB"
        except ValueError as error:
            assert f"image of {len(whole)} bytes" in str(error)


def test_grey_image_is_grey() -> None:
    grey = open_image(grey_image())
    assert grey.mode == "RGB"
    assert grey.getcolors() == [(grey.width * grey.height, (127, 127, 127))]


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (5, 2000)])
def test_small_and_narrow_images_keep_their_size(size: tuple[int, int]) -> None:
    assert open_image(_bytes(Image.new("RGB", size), "PNG")).size == size


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((MAX_SIDE, 1), (MAX_SIDE, 1)),
        ((MAX_SIDE + 1, 3), (MAX_SIDE // 2 + 1, 2)),
        ((2, 40_000), (1, 8_000)),
    ],
)
def test_a_long_side_is_shrunk_for_its_square_must_fit_in_memory(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    opened = open_image(_bytes(Image.new("RGB", size, (9, 99, 199)), "PNG"))
    assert opened.size == wanted and opened.getpixel((0, 0)) == (9, 99, 199)


def test_a_phones_image_with_a_second_one_in_it_is_the_first() -> None:
    red, blue = (Image.new("RGB", (16, 8), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    two = _bytes(red, "MPO", save_all=True, append_images=[blue])
    pixel = open_image(two).getpixel((4, 4))
    assert pixel[0] > 240 and pixel[2] < 15


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_an_icon_that_hides_a_larger_image_is_refused() -> None:
    """The directory of an icon says 1 x 1; what is decoded is the PNG in it."""
    large = _bytes(Image.new("RGB", (100, 100)), "PNG")
    icon = (
        struct.pack("<HHH", 0, 1, 1)
        + struct.pack("<BBBBHHII", 1, 1, 0, 0, 1, 32, len(large), 22)
        + large
    )
    with pytest.raises(ValueError, match="100 x 100 is more than 50 pixels"):
        open_image(icon, max_pixels=50)
    assert open_image(icon, max_pixels=10_000).size == (100, 100)


def test_memory_that_is_not_there_is_no_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(self: Image.Image) -> None:
        raise MemoryError

    path = tmp_path / "large.png"
    Image.new("RGB", (4, 4)).save(path)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ValueError, match=r"large\.png asks for more memory than there is"):
        open_image(path)


def test_an_image_inside_a_larger_file(tmp_path: Path) -> None:
    content = _bytes(_left_red_right_blue(), "PNG")
    (tmp_path / "a.tar").write_bytes(b"before" + content + b"behind")
    place = FileSlice(tmp_path / "a.tar", 6, len(content), "a/b.png")
    assert open_image(place).tobytes() == _left_red_right_blue().tobytes()
    with pytest.raises(ValueError, match=r"a\.tar, a/b\.png cannot be read as an image"):
        open_image(place._replace(size=len(content) - 30))
    with pytest.raises(ValueError, match=r"gone\.tar, a/b\.png cannot be read as an image"):
        open_image(place._replace(file=tmp_path / "gone.tar"))


def test_a_key_is_of_the_content_alone(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(30_000)
    (tmp_path / "a.png").write_bytes(noise)
    (tmp_path / "tar").write_bytes(b"x" + noise + b"y")
    keys = {
        image_key(tmp_path / "a.png"),
        image_key(noise),
        image_key(FileSlice(tmp_path / "tar", 1, len(noise), "a")),
    }
    assert len(keys) == 1 and len(keys.pop()) == 16
    others = (
        noise[:-1],
        noise[1:],
        noise + b"x",
        noise[:-1] + bytes([noise[-1] ^ 1]),
        bytes([noise[0] ^ 1]) + noise[1:],
        b"",
    )
    assert len({image_key(other) for other in (noise, *others)}) == 7
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        image_key(tmp_path / "gone.png")


def _small_files() -> list[bytes]:
    """Return small images in every format and mode for which decoders have a path of their own."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    files = [_bytes(rgb, format) for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP")]
    files += [
        _bytes(rgb, "JPEG", progressive=True, exif=exif),
        _bytes(rgb.convert("CMYK"), "JPEG"),
        _bytes(rgb.convert("L"), "JPEG"),
    ]
    files += [
        _bytes(rgba, "PNG"),
        _bytes(rgb.convert("P"), "PNG", transparency=0),
        _bytes(rgb.convert("1"), "BMP"),
    ]
    files += [_bytes(rgb, format, **frames) for format in ("GIF", "WEBP", "PNG")]
    files += [_bytes(rgba, "WEBP", lossless=True)]
    return [
        *files,
        _bytes(Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG"),
        _bytes(rgb.convert("P"), "BMP"),
    ]


SMALL_FILES = _small_files()


def _opens_or_says_why(content: bytes) -> None:
    try:
        opened = open_image(content, max_pixels=100_000)
    except ValueError as error:
        assert str(error).startswith(f"image of {len(content)} bytes")
    else:
        assert opened.mode == "RGB" and 0 < opened.width * opened.height <= 100_000


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_thousand_mutated_files_are_images_or_value_errors() -> None:
    """Change, cut, double or swap bytes between files, or set numbers to their extremes."""
    chance = random.Random(0)
    extremes = (
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        b"\x7f\xff\xff\xff",
        b"\xff\xff\xff\x7f",
        b"\x00\x01\x00\x00",
    )
    for number in range(1_000):
        content = bytearray(SMALL_FILES[number % len(SMALL_FILES)])
        for _ in range(chance.randrange(1, 6)):
            start = chance.randrange(max(1, min(len(content), chance.choice((40, 10_000)))))
            end = start + chance.randrange(1, 20)
            other = chance.choice(SMALL_FILES)
            content[start:end] = chance.choice(
                (
                    chance.randbytes(end - start),
                    b"",
                    bytes(content[start:end] * 2),
                    other[start:end],
                    chance.choice(extremes),
                    bytes(byte ^ 1 << chance.randrange(8) for byte in content[start:end]),
                )
            )
        _opens_or_says_why(bytes(content))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=200)
@given(
    file=st.sampled_from(range(len(SMALL_FILES))),
    cut=st.integers(0, 2000),
    changes=st.lists(st.tuples(st.integers(0, 60), st.binary(min_size=1, max_size=8)), max_size=4),
    tail=st.binary(max_size=20),
)
def test_no_bytes_are_worse_than_a_value_error(
    file: int, cut: int, changes: list[tuple[int, bytes]], tail: bytes
) -> None:
    content = bytearray(SMALL_FILES[file][: max(cut, 8)])
    for start, new in changes:
        content[start : start + len(new)] = new
    _opens_or_says_why(bytes(content) + tail)


def _forms(path: Path) -> dict[str, ImageLike]:
    """The same image as everything that `upright_rgb` takes."""
    with Image.open(path) as opened:
        opened.load()
    return {
        "path": path,
        "name": str(path),
        "bytes": path.read_bytes(),
        "slice": FileSlice(path, 0, path.stat().st_size, "a"),
        "decoded": opened,
        "not decoded yet": Image.open(path),
    }


@pytest.mark.parametrize("size", [(8, 4), (MAX_SIDE + 1, 3)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_an_image_has_the_same_pixels_in_every_form(
    mode: str, size: tuple[int, int], tmp_path: Path
) -> None:
    width, height = size
    values = np.arange(height * width * 4, dtype=np.uint32).reshape(height, width, 4) * 57 % 251
    pixels = values.astype(np.uint8)
    image = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(pixels).convert(mode)
    )
    image.save(tmp_path / "a.png")
    forms = _forms(tmp_path / "a.png")
    if mode in ("RGB", "RGBA", "L", "I;16"):
        forms["array"] = np.asarray(image)
    wanted = open_image(tmp_path / "a.png")
    for name, form in forms.items():
        found = upright_rgb(form)
        assert (found.mode, found.size) == ("RGB", wanted.size), name
        assert found.tobytes() == wanted.tobytes(), name


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_a_rotated_image_stands_upright_in_every_form(
    orientation: int, format: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{format.lower()}"
    _left_red_right_blue().save(path, format, exif=exif)
    for name, form in _forms(path).items():
        before = form.tobytes() if isinstance(form, Image.Image) else None
        found = upright_rgb(form)
        assert found.size == ((8, 4) if orientation == 3 else (4, 8)), name
        assert found.tobytes() == open_image(path).tobytes(), name
        assert before is None or form.tobytes() == before, "the caller's image is changed"


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV"])
def test_pil_images_of_every_colour_space_are_converted(mode: str) -> None:
    image = Image.merge(
        mode, [Image.new("L", (3, 2), 90)] * len(Image.new(mode, (1, 1)).getbands())
    )
    assert upright_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_what_is_no_image_in_memory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the PIL image \(F, \(1, 1\)\) .* 8 or 16 bits"):
        upright_rgb(Image.new("F", (1, 1)))
    with pytest.raises(
        ValueError, match=r"array of float64 \(2, 2, 3\) is not an image: give uint8"
    ):
        upright_rgb(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"\(100, 100\)\) .* is more than 50 pixels"):
        upright_rgb(Image.new("RGB", (100, 100)), max_pixels=50)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (tmp_path / "cut.png").write_bytes(_bytes(Image.fromarray(noise), "PNG")[:2_000])
    with pytest.raises(ValueError, match=r"the PIL image .* cannot be read as an image"):
        upright_rgb(Image.open(tmp_path / "cut.png"))
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        upright_rgb(str(tmp_path / "gone.png"))


def _grey_16(low: int, high: int) -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 64 * 64).reshape(64, 64).astype(np.uint16))


def _white_on_nothing() -> Image.Image:
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (16, 16, 48, 48))
    return image


@pytest.mark.parametrize(
    ("image", "fix"),
    [
        (_grey_16(0, 255), "save it with 8 bits"),
        (_grey_16(0, 4000), "save it with 8 bits"),
        (_grey_16(60_000, 63_000), "save it with 8 bits"),
        (_white_on_nothing(), "save it on a darker background"),
        (_white_on_nothing().convert("LA"), "save it on a darker background"),
    ],
)
def test_an_image_that_loses_its_contrast_is_a_warning_with_the_fix(
    image: Image.Image, fix: str
) -> None:
    with pytest.warns(ContrastWarning, match=fix):
        upright_rgb(image)
    with pytest.warns(ContrastWarning, match=fix):
        open_image(_bytes(image, "PNG"))


@pytest.mark.parametrize(
    "image",
    [
        _grey_16(0, 65535),
        _grey_16(0, 8000),
        _grey_16(300, 300),
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)),
        Image.new("L", (8, 8), 9),
        Image.new("RGB", (8, 8), "white"),
    ],
)
def test_an_image_that_keeps_its_contrast_or_has_none_is_no_warning(image: Image.Image) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upright_rgb(image)


def test_sizes_of_files_are_kept_and_bytes_are_not(tmp_path: Path) -> None:
    """A file is asked once for each of its regions; bytes would fill the memory."""
    content = _bytes(_left_red_right_blue(), "PNG")
    path = tmp_path / "once.png"
    path.write_bytes(content)

    references = sys.getrefcount(content)
    assert read_size(content) == read_size(path) == ((8, 4), (8, 4), 1)
    assert sys.getrefcount(content) == references
    path.unlink()
    assert read_size(path) == ((8, 4), (8, 4), 1)
