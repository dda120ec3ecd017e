"""Image files to upright RGB pictures, by one stated rule.

Padding and resizing are the processor's; here an image keeps its size, unless a side is longer than `MAX_SIDE`. Colour profiles are
not applied.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

from PIL import Image

MAX_PIXELS = 80_000_000
"""About 240 MB as RGB; below the size at which Pillow itself begins to warn."""

MAX_SIDE = 8_944
"""Pixels; padded to a square, a picture with this side has `MAX_PIXELS`. A strip of 80,000,000 x 1 would ask for petabytes."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
"""What is read. Left out on purpose: EPS, which hands the file to another program."""

SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    }
    | {".jp2", ".j2k", ".avif", ".ico", ".heic", ".heif"}
)
"""Names that say a file is a picture; those of a phone (.heic) are counted in, so that they are refused and not overlooked."""

_KEY_BYTES = 4096
_WHITE = (255, 255, 255)
_GREY = (127, 127, 127)
_ORIENTATION_TAG = 0x0112
# Source: Exif 2.32, tag Orientation: what turns the stored rows into the upright picture
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@runtime_checkable
class StoredImage(Protocol):
    """An image inside a larger file, read when it is asked for: hashable, small, and named by `str`."""

    def read(self) -> bytes:
        """The bytes of the image file."""
        ...


ImageSource = Path | bytes | StoredImage
"""What a picture is read from: a file, the bytes of one, or a place in a larger file."""


class FileSlice(NamedTuple):
    """An image that lies in one piece inside a larger file, such as a tar.

    Args:
        offset: Where it begins, in bytes.
        size: How long it is, in bytes.
        name: What messages call it.
    """

    file: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}, {self.name}"

    def read(self) -> bytes:
        """The bytes of the image file."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read one image completely: upright (EXIF), first frame, RGB.

    Transparency is laid on white; 16-bit grey is scaled to 8; palette, CMYK and grey are converted. Where a side is longer than
    `MAX_SIDE` pixels, squares of equal size are averaged to one pixel each, just large enough for it to fit.

    Args:
        source: A file, the bytes of one, or a place in a larger file.
        max_pixels: The largest width x height that is decoded, in pixels: a small file can ask for gigabytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image in one of `FORMATS`, is damaged, or is larger than `max_pixels`; the message names the file.
    """
    name = image_name(source)
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"no image file {source}: check the data set's root")
    try:
        with Image.open(
            source if isinstance(source, Path) else io.BytesIO(_bytes(source)), formats=FORMATS
        ) as image:
            _check_size(image, max_pixels)
            image.load()  # all of it: a file cut short must fail here, not be grey at the bottom
            _check_size(image, max_pixels)  # an icon's directory and the picture in it may disagree
            return _bounded(_to_rgb(_upright(image)))
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is not an image in a known format: use one of {', '.join(FORMATS)}"
        ) from error
    except MemoryError as error:
        raise ValueError(
            f"{name} asks for more memory than there is: make it smaller, or remove it"
        ) from error
    except Exception as error:  # decoders answer damage with nearly every kind of exception
        raise ValueError(
            f"{name} cannot be read as an image: {error or type(error).__name__}"
        ) from error


def is_readable(source: ImageSource) -> bool:
    """Whether `open_image` reads it: it is tried."""
    try:
        open_image(source)
    except (ValueError, FileNotFoundError):
        return False
    return True


def image_key(source: ImageSource) -> bytes:
    """Sixteen bytes that are the same for the same image file, whatever its name.

    Made of its length and its first and last 4,096 bytes, so that a million files are told apart without reading them. Different
    files may in theory share a key; what is kept together by key is then merely kept together.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise FileNotFoundError(f"no image file {source}: check the data set's root")
        with source.open("rb") as file:
            return _key(file)
    return _key(io.BytesIO(_bytes(source)))


def grey_image() -> bytes:
    """A mid grey square as the bytes of a PNG: what a blind model sees."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), _GREY).save(buffer, format="PNG")
    return buffer.getvalue()


def image_name(source: ImageSource) -> str:
    """What messages call an image."""
    return f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _bytes(source: bytes | StoredImage) -> bytes:
    return source if isinstance(source, bytes) else source.read()


def _key(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(_KEY_BYTES)
    file.seek(max(0, size - _KEY_BYTES))
    return hashlib.blake2b(
        size.to_bytes(8, "big") + head + file.read(_KEY_BYTES), digest_size=16
    ).digest()


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"{image.width} x {image.height} is more than {max_pixels} pixels; make it smaller"
        )


def _bounded(image: Image.Image) -> Image.Image:
    factor = -(-max(image.size) // MAX_SIDE)
    return image.reduce(factor) if factor > 1 else image


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a broken EXIF block does not break the picture; viewers show it as stored
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating point numbers of unknown range; save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*_WHITE, 255)), layer).convert(
            "RGB"
        )
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale by 1/257, so that 65535 becomes 255; Pillow's own conversion clips everything above 255 to white."""
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its pixels reach from {values.min()} to {values.max()}, beyond 16 bits; save it with 8 or 16 bits"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
