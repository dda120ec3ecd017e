"""Every kind of image file becomes upright RGB, or one sentence that names it."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mipha.data.images import grey_image, open_image


def _bytes(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _left_red_right_blue() -> Image.Image:
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    image.paste((0, 0, 255), (4, 0, 8, 4))
    return image


def test_a_path_and_its_bytes_give_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    _left_red_right_blue().save(path)
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (8, 4))
    assert opened.tobytes() == open_image(path.read_bytes()).tobytes() == _left_red_right_blue().tobytes()


def test_transparency_is_laid_on_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 0, 128))
    opened = open_image(_bytes(half, "PNG"))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 0)) == (127, 127, 127)
    assert open_image(_bytes(Image.new("LA", (1, 1), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


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
    for number, values in enumerate([np.array([[0, 70000]], dtype=np.int32), np.array([[0.5]], dtype=np.float32)]):
        path = tmp_path / f"{number}.tiff"
        Image.fromarray(values).save(path)
        with pytest.raises(ValueError, match=rf"{number}\.tiff.*8 or 16 bits"):
            open_image(path)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    assert open_image(_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((1, 1)) == (255, 0, 0)


def test_cmyk_and_one_bit_are_converted() -> None:
    red, green, blue = open_image(_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)).getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15
    assert open_image(_bytes(Image.new("1", (2, 2), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("orientation", "size", "top_left"), [(1, (8, 4), "red"), (3, (8, 4), "blue"), (6, (4, 8), "red"), (8, (4, 8), "blue")]
)
def test_exif_orientation_is_honoured(orientation: int, size: tuple[int, int], top_left: str) -> None:
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
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
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
def test_a_file_cut_short_is_an_error_and_never_anything_but_a_value_error(format: str, tmp_path: Path) -> None:
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
    assert set(grey.get_flattened_data()) == {(127, 127, 127)}
