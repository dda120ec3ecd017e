"""Images in any form to upright RGB images, by one stated rule.

The processor pads and resizes. Here an image keeps its size, unless a side is longer than
`MAX_SIDE`. Colour profiles are not applied.
"""

from __future__ import annotations

import hashlib
import io
import os
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, Union, runtime_checkable
from urllib.parse import unquote

from PIL import ExifTags, Image, ImageOps

if TYPE_CHECKING:
    import numpy as np

MAX_PIXELS = 80_000_000
"""About 240 MB as RGB; below the size at which Pillow itself begins to warn."""

MAX_SIDE = 8_944
"""Pixels; padded to a square, an image with this side has `MAX_PIXELS`.

A strip of 80,000,000 x 1 would ask for petabytes.
"""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
"""File formats that are read. EPS is left out on purpose: Pillow hands it to another program."""

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
"""Suffixes of image files. A phone's .heic counts too, so that it is refused and not overlooked."""

LOW_CONTRAST = 20
"""Levels of 256 below which an image is nearly flat; 12 bits of grey kept as 16 leave 17."""

GREY_SIZE = (64, 64)
"""Pixels of the grey image that stands for one of unknown size."""

_CONTENT = 64
"""Levels of 16-bit grey, or of transparency, from which an image shows something."""

_KEY_BYTES = 4096
_CHECK_ROOT = "check the data set's root"
_WHITE = (255, 255, 255)
_GREY = (127, 127, 127)


@runtime_checkable
class StoredImage(Protocol):
    """An image inside a larger file, read when asked for: hashable, small, and named by `str`."""

    def read(self) -> bytes:
        """Return the bytes of the image file."""
        ...


ImageSource = Path | bytes | StoredImage
"""An encoded image: a file, the bytes of one, or a place in a larger file."""

ImageLike = Union[ImageSource, str, Image.Image, "np.ndarray"]
"""An image in any form: a path, encoded bytes, a PIL image, or an array of 0..255.

Shape of an array: (height, width, 3) or 4 with transparency, or (height, width) for grey.
"""


def image_list(shown: Any) -> tuple[Any, ...]:
    """Return the images of a question as a tuple.

    Args:
        shown: One image in any form, a list or tuple of several, or None.
    """
    if shown is None:
        return ()
    is_several = isinstance(shown, (list, tuple)) and not isinstance(shown, StoredImage)
    return tuple(shown) if is_several else (shown,)


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
        """Return the bytes of the image file."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def upright_rgb(image: ImageLike, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an image in any form as an upright RGB image; the same image gives the same pixels.

    EXIF decides what is upright. Transparency is laid on white; 16-bit grey is scaled to 8 bits;
    other modes (palette, CMYK, YCbCr, LAB, HSV, grey) are converted. Where a side is longer than
    `MAX_SIDE` pixels, squares of equal size are averaged to one pixel each, just large enough for
    the image to fit.

    Args:
        image: Image in any form; it is not changed.
        max_pixels: Largest width x height that is decoded, in pixels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not an image in one of `FORMATS`, the image is damaged or larger
            than `max_pixels`, or the array holds no image; the message names the image.
    """
    if isinstance(image, Image.Image):
        return _converted(image, f"the PIL image ({image.mode}, {image.size})", max_pixels)

    if isinstance(image, str):
        image = Path(image)
    if isinstance(image, (Path, bytes, StoredImage)):
        return open_image(image, max_pixels=max_pixels)

    try:
        decoded = Image.fromarray(image)
    except (TypeError, ValueError, AttributeError) as error:
        kind = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
        raise ValueError(
            f"an array of {kind.strip()} is not an image: give uint8 of (height, width, 3)"
        ) from error
    return _converted(decoded, f"the array of {decoded.size} pixels", max_pixels)


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read one image file completely and return its first frame; see `upright_rgb`.

    Args:
        source: File, the bytes of one, or a place in a larger file.
        max_pixels: Largest width x height that is decoded, in pixels, because a small file can ask
            for gigabytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not an image in one of `FORMATS`, is damaged, or is larger than
            `max_pixels`; the message names the file.
    """
    with _opened(source) as image:
        return _converted(image, image_name(source), max_pixels, in_place=True)


def read_size(source: ImageSource) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Return what an image's header says: width and height upright and as stored, orientation.

    The orientation is EXIF's, 1 where there is none. Errors as in `open_image`; pixels are not
    read.
    """
    return _read_size(source) if isinstance(source, bytes) else _known_size(source)


def is_readable(source: ImageSource) -> bool:
    """Return whether `open_image` can read the image, by reading it."""
    try:
        open_image(source)
    except (ValueError, FileNotFoundError):
        return False
    return True


def why_missing(path: Path) -> str:
    """Return why a path is no file, where that can be told; empty where it is just not there.

    Args:
        path: Path for which `is_file` is false.
    """
    if "://" in path.as_posix() or ":/" in path.as_posix():
        return "it is an address, so download it first"
    if os.path.isdir(path):
        return "it is a folder, so give the path of a file in it"
    if os.path.exists(path):
        return "it is a pipe or a device, so give the path of a file"
    if os.path.islink(path):
        return f"it is a link to {os.readlink(path)}, which does not exist"
    try:
        os.stat(path)
    except PermissionError:
        return "it lies in a folder that may not be read, so change its permissions"
    except (OSError, ValueError):
        pass

    # A name that differs in how it is written.
    text, folder = str(path), path.parent
    for other, reason in (
        (unquote(text), "without the % signs of a web address"),
        (text.strip(), "without the space around it"),
        (text.replace("\\", "/"), "with / instead of \\"),
        *(
            (unicodedata.normalize(form, text), f"with its accents in Unicode's form {form}")
            for form in ("NFC", "NFD")
        ),
    ):
        if other != text and os.path.isfile(other):
            return f"there is {os.path.basename(other)}, so write it {reason}"
    if not folder.is_dir():
        return f"there is no folder {folder}"
    other = _names_by_stem(folder).get(_folded(path.stem))
    return f"there is {other}" if other else ""


def _folded(stem: str) -> str:
    return unicodedata.normalize("NFC", stem).casefold()


@lru_cache(maxsize=64)
def _names_by_stem(folder: Path) -> dict[str, str]:
    """Map stems without case to names in a folder; listed once, it may hold 100,000 files."""
    try:
        return {_folded(path.stem): path.name for path in folder.iterdir()}
    except OSError:
        return {}


def image_key(source: ImageSource) -> bytes:
    """Return sixteen bytes that are the same for the same image file, whatever its name.

    They are a hash of the file's length and its first and last 4,096 bytes, so that a million files
    are told apart without reading them. Different files may in theory share a key; they are then
    merely kept together.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise FileNotFoundError(f"no image file {source}: {why_missing(source) or _CHECK_ROOT}")
        with source.open("rb") as file:
            return _key(file)
    return _key(io.BytesIO(_bytes(source)))


def upright_size(source: ImageSource) -> tuple[int, int]:
    """Return the (width, height) in pixels that `open_image` gives, from the header alone.

    A PNG may hold its EXIF data at its end, so one without any is read to there.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not an image in one of `FORMATS`.
    """
    (width, height), _, _ = _read_size(source)
    factor = -(-max(width, height) // MAX_SIDE)
    return -(-width // factor), -(-height // factor)


def size_or_grey(source: ImageSource) -> tuple[int, int]:
    """Return the upright size of an image; that of the grey one for an image that is unreadable."""
    try:
        return upright_size(source)
    except (ValueError, FileNotFoundError):
        return GREY_SIZE


def grey_image(size: tuple[int, int] = GREY_SIZE) -> bytes:
    """Return a mid grey image as the bytes of a PNG: the image that a blind model sees.

    Args:
        size: (width, height) in pixels.
    """
    buffer = io.BytesIO()
    Image.new("RGB", size, _GREY).save(buffer, format="PNG")
    return buffer.getvalue()


def image_name(source: ImageSource) -> str:
    """Return the name of an image in messages."""
    return f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """Open an image file, whose pixels are not read yet; damage is an error as in `open_image`."""
    name = image_name(source)
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"no image file {source}: {why_missing(source) or _CHECK_ROOT}")

    try:
        file = source if isinstance(source, Path) else io.BytesIO(_bytes(source))
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is not an image in a known format: use one of {', '.join(FORMATS)}"
        ) from error
    except (_Unreadable, ConnectionError):  # a server that fails says nothing about the image
        raise
    except Exception as error:  # decoders answer damage with nearly every kind of exception
        raise _Unreadable(name, error) from error


def _read_size(source: ImageSource) -> tuple[tuple[int, int], tuple[int, int], int]:
    with _opened(source) as image:
        stored = image.size
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # shown as it is stored, as in `_upright`
            orientation = 1
    orientation = orientation if orientation in range(1, 9) else 1
    return stored[::-1] if orientation >= 5 else stored, stored, orientation


_known_size = lru_cache(maxsize=65_536)(_read_size)


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


class ContrastWarning(UserWarning):
    """An image loses nearly all of its contrast as RGB."""


class _Unreadable(ValueError):
    """An image that cannot be read, and why."""

    def __init__(self, name: str, cause: Exception) -> None:
        if isinstance(cause, MemoryError):
            super().__init__(
                f"{name} asks for more memory than there is: make it smaller, or remove it"
            )
        else:
            super().__init__(f"{name} cannot be read as an image: {cause or type(cause).__name__}")


def _converted(
    image: Image.Image, name: str, max_pixels: int, in_place: bool = False
) -> Image.Image:
    try:
        # Decode all of it: a file that is cut short must fail here, not be grey at the bottom.
        _check_size(image, max_pixels)
        image.load()
        _check_size(image, max_pixels)  # an icon's directory and the image in it may disagree

        upright = _upright(image, in_place)
        rgb = _to_rgb(upright)
        if cause := _lost_contrast(upright, rgb):
            # The text is the same for every such image, so that Python shows it once.
            warnings.warn(
                f"{cause}; `mipha check` names such images", ContrastWarning, stacklevel=2
            )
        return _bounded(rgb)
    except Exception as error:  # decoders answer damage with nearly every kind of exception
        raise _Unreadable(name, error) from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"{image.width} x {image.height} is more than {max_pixels} pixels; make it smaller"
        )


def _upright(image: Image.Image, in_place: bool) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image, in_place=in_place) or image
    except Exception:  # viewers show an image with a broken EXIF block as it is stored
        return image


def _bounded(image: Image.Image) -> Image.Image:
    factor = -(-max(image.size) // MAX_SIDE)
    return image.reduce(factor) if factor > 1 else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating point numbers of unknown range; save it with 8 or 16 bits"
        )

    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (*_WHITE, 255))
        return Image.alpha_composite(white, layer).convert("RGB")

    return image.convert("RGB")


def _lost_contrast(image: Image.Image, rgb: Image.Image) -> str | None:
    """Return why an image shows something that its RGB form does not, with the fix; else None."""
    is_16_bit = image.mode.startswith("I")
    if not is_16_bit and not image.has_transparency_data:
        return None  # other modes keep their contrast
    if max(high - low for low, high in rgb.getextrema()) >= LOW_CONTRAST:
        return None

    low, high = image.getextrema() if is_16_bit else _alpha(image).getextrema()
    if high - low < _CONTENT:
        return None
    if is_16_bit:
        return (
            "an image of 16 bits uses a small part of their range and is nearly flat as RGB: "
            "save it with 8 bits, scaled to its own range"
        )
    return (
        "a transparent image is nearly white on the white that is laid under it: "
        "save it on a darker background"
    )


def _alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale by 1/257, so that 65535 becomes 255; Pillow's conversion clips above 255 to white."""
    import numpy as np

    values = np.asarray(image)  # (height, width), uint16 or int32
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its pixels reach from {values.min()} to {values.max()}, beyond 16 bits; "
            "save it with 8 or 16 bits"
        )
    rounded = values.astype(np.uint32)
    rounded += 128
    rounded //= 257
    return Image.fromarray(rounded.astype(np.uint8)).convert("RGB")
