"""One image file: what is wrong with it, and a digest of what it shows."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mipha.data.check.findings import Problem, quoted
from mipha.data.check.near_images import NearHash, near_hashes
from mipha.data.faults import RecordError
from mipha.data.images import (
    FORMATS,
    MAX_PIXELS,
    ContrastWarning,
    ImageSource,
    open_image,
    why_missing,
)

MIN_SIDE = 16
"""Pixels: about one patch of the usual towers (14 or 16 pixels a side)."""

MAX_ASPECT = 10
"""Padded to a square, a longer image fills less than a tenth of its tokens."""

FLAT = 4
"""Grey levels of 255: the widest range, in every channel, that is still one flat colour."""

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\x00", b"MM\x00*", b"BM")
_ORIENTATION_TAG = 0x0112


class ImageFacts(NamedTuple):
    """What is kept of an image; not the image.

    Args:
        digest: Digest of the upright RGB pixels: the same for one image in two lossless formats;
            None where there are no pixels.
        width: Pixels, as stored; 0 where unknown.
        height: Pixels, as stored.
        problems: All that is wrong with it.
        near: Hashes to find it again by after it was compressed or resized; empty where they were
            not wanted, or where it shows too little.
    """

    digest: bytes | None
    width: int
    height: int
    problems: tuple[Problem, ...]
    near: tuple[NearHash, ...] = ()


def image_facts(source: ImageSource, name: str, near: bool = False) -> ImageFacts:
    """Read an image completely, as training will, and say what is wrong with it.

    Args:
        source: A file, the bytes of one, or a place in a larger file.
        name: Name of the image, for descriptions.
        near: Whether to make the hashes that find it again.
    """
    if isinstance(source, Path) and not source.is_file():
        why = why_missing(source)
        missing = f"there is no file {quoted(name, 120)}" + (f"; {why}" if why else "")
        return _unusable("missing-image", missing)

    # Read its header.
    label = f"image {name if isinstance(source, bytes) else quoted(name, 120)}"
    begin = b""
    try:
        content = source if isinstance(source, (Path, bytes)) else source.read()
        begin = _begin(content)
        if not begin:
            return _unusable("unreadable-image", f"{label} is empty (0 bytes)")
        stored, width, height, problems = _header(content, label)
    except Image.DecompressionBombError:
        return _unusable("oversized-image", f"{label} is more than {MAX_PIXELS:,} pixels")
    except RecordError as error:  # the place in a larger file holds no image
        return _unusable(error.kind, f"{label}: {error.what}")
    except Exception as error:  # decoders answer damage with nearly every kind of exception
        if begin.startswith(_SIGNATURES):
            damage = f"{label} begins as one but cannot be read ({_reason(error)})"
            return _unusable("truncated-image", damage)
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "is in no known format" if unknown else f"cannot be read ({_reason(error)})"
        return _unusable("unreadable-image", f"{label} {reason}; it begins with {begin!r}")
    if width * height > MAX_PIXELS:
        large = f"{label} of {width} x {height} is more than {MAX_PIXELS:,} pixels"
        return _unusable("oversized-image", large, width, height)

    # Read its pixels.
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", ContrastWarning)
            image = open_image(content)
    except ValueError as error:
        damage = (
            f"{label} begins as a {stored} of {width} x {height} but cannot be read to the end "
            f"({_reason(error)})"
        )
        return _unusable("truncated-image", damage, width, height)
    if lost := [one.message for one in found if one.category is ContrastWarning]:
        cause = str(lost[0]).partition(";")[0]
        problems.append(("blank-image", f"{label} loses its contrast: {cause}"))
    elif all(high - low <= FLAT for low, high in image.getextrema()):
        colour = image.getpixel((0, 0))
        problems.append(("blank-image", f"{label} is one flat colour, about {colour}"))

    digest = hashlib.blake2b(f"{image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    hashes = near_hashes(image) if near else ()
    return ImageFacts(digest.digest(), width, height, tuple(problems), hashes)


def image_reader(
    most: int = 50_000, near: bool = False
) -> Callable[[ImageSource, str], ImageFacts]:
    """Return an `image_facts` that reads an image once, though many rows show it.

    Images that are given by their bytes are read every time.
    """
    known = lru_cache(maxsize=most)(image_facts)
    return lambda source, name: (
        image_facts(source, name, near) if isinstance(source, bytes) else known(source, name, near)
    )


def _unusable(kind: str, what: str, width: int = 0, height: int = 0) -> ImageFacts:
    return ImageFacts(None, width, height, ((kind, what),))


def _begin(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:12]
    with source.open("rb") as file:
        return file.read(12)


def _header(source: Path | bytes, label: str) -> tuple[str, int, int, list[Problem]]:
    """Return format, size and oddities of an image, before its pixels are read."""
    problems: list[Problem] = []
    with warnings.catch_warnings():
        # Pillow warns about size and metadata; both are judged here.
        warnings.simplefilter("ignore")
        with Image.open(
            source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS
        ) as image:
            width, height = image.size

            # Its size.
            stored = "JPEG" if image.format == "MPO" else str(image.format)
            if min(width, height) < MIN_SIDE:
                problems.append(("tiny-image", f"{label} has {width} x {height} pixels"))
            if max(width, height) > MAX_ASPECT * min(width, height):
                problems.append(("extreme-aspect", f"{label} has {width} x {height} pixels"))

            # How it is stored.
            if (orientation := _orientation(image)) in range(2, 9):
                problems.append(
                    (
                        "exif-rotation",
                        f"{label} is stored turned or mirrored (EXIF orientation {orientation})",
                    )
                )
            if image.format != "MPO" and getattr(image, "is_animated", False):
                problems.append(
                    ("animated-image", f"{label} has {getattr(image, 'n_frames', 2)} frames")
                )
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "F") or image.mode.startswith("I"):
                problems.append(("converted-image", f"{label} is stored as {image.mode}"))
            named = (
                Image.registered_extensions().get(source.suffix.lower())
                if isinstance(source, Path)
                else None
            )
            if named and named != stored and {named, stored} != {"JPEG", "MPO"}:
                problems.append(("wrong-suffix", f"{label} is a {stored}"))
            # Decoding does not look at the checksums; it would give wrong pixels silently.
            if image.format == "PNG":
                image.verify()
    return stored, width, height, problems


def _orientation(image: Image.Image) -> int | None:
    if image.format == "PNG" and "exif" not in image.info:
        return None  # to look further, Pillow would decode the whole image
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a broken EXIF block does not break the image
        return None


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    text = cause.what if isinstance(cause, RecordError) else str(cause)
    return (text or type(error).__name__)[:120]
