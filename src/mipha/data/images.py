"""Image files to upright RGB pictures, by one stated rule.

Padding and resizing are the processor's; here an image keeps its size. Colour profiles are not applied.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

MAX_PIXELS = 80_000_000
"""About 240 MB as RGB; below the size at which Pillow itself begins to warn."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
"""What is read. Left out on purpose: EPS, which hands the file to another program."""

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


def open_image(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read one image completely: upright (EXIF), first frame, RGB.

    Transparency is laid on white; 16-bit grey is scaled to 8; palette, CMYK and grey are converted.

    Args:
        source: A file, or the bytes of one.
        max_pixels: The largest width x height that is decoded, in pixels: a small file can ask for gigabytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image in one of `FORMATS`, is damaged, or is larger than `max_pixels`; the message names the file.
    """
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"no image file {source}: check the data set's root")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} is more than {max_pixels} pixels; make it smaller")
            image.load()  # all of it: a file cut short must fail here, not be grey at the bottom
            return _to_rgb(_upright(image))
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image in a known format: use one of {', '.join(FORMATS)}") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders answer damage with nearly every kind of exception
        raise ValueError(f"{name} cannot be read as an image: {error or type(error).__name__}") from error


def grey_image() -> bytes:
    """A mid grey square as the bytes of a PNG: what a blind model sees."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), _GREY).save(buffer, format="PNG")
    return buffer.getvalue()


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
        raise ValueError("its pixels are floating point numbers of unknown range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*_WHITE, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale by 1/257, so that 65535 becomes 255; Pillow's own conversion clips everything above 255 to white."""
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels reach from {values.min()} to {values.max()}, beyond 16 bits; save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
