"""A picture from a stranger: its header is walked here before a decoder sees it.

A small file can hold a decoder for minutes: 100 KB of JPEG scans, a million empty PNG chunks, a GIF of nothing but comments. So what
is counted here are the steps that a decoder would take, besides the pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from PIL import Image

from mipha.data.images import open_image

_MOST_STEPS = 10_000
"""Chunks, segments or blocks of one file: a PNG of 14 MB in pieces of 8 KB has 1,800."""

_MOST_SCANS = 50
"""Of a JPEG, each of which decodes the whole picture again; a progressive one has about 10."""

_BMP_UNPACKED = (0, 3, 6)
"""BI_RGB, BI_BITFIELDS, BI_ALPHABITFIELDS. Left out: run lengths, which Pillow unpacks one by one in Python."""


def read_picture(data: bytes, max_pixels: int) -> Image.Image:
    """The bytes of a PNG, JPEG, WebP, GIF (its first frame) or BMP as an upright RGB picture, whatever it calls itself.

    Args:
        data: A whole file.
        max_pixels: The largest width x height; it is read from the header, and nothing larger is decoded.

    Raises:
        ValueError: It is none of these formats, too large, damaged, or made to keep a decoder busy.
    """
    size_of = _size_reader(data)
    if size_of is None:
        raise ValueError(
            "the picture is none of PNG, JPEG, WebP, GIF and BMP: convert it to one of them"
        )
    try:
        width, height = size_of(data)
    except (IndexError, struct.error) as error:
        raise ValueError(
            "the picture's header is cut short or damaged: send the whole file"
        ) from error
    if width * height > max_pixels:
        raise ValueError(
            f"the picture has {width:,} x {height:,} pixels and {max_pixels:,} are read at most: make it smaller"
        )
    try:
        return open_image(data, max_pixels=max_pixels)
    except ValueError as error:
        raise ValueError(
            f"the picture is damaged ({error.__cause__ or error}): send the whole file"
        ) from error


def _size_reader(data: bytes) -> Callable[[bytes], tuple[int, int]] | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_size
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_size
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif_size
    if data.startswith(b"BM"):
        return _bmp_size
    return _webp_size if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _png_size(data: bytes) -> tuple[int, int]:
    """Source: PNG specification (W3C), sections 5.3 and 11.2.2."""
    position = 8
    for _ in range(_MOST_STEPS):
        if position >= len(data):
            return struct.unpack_from(">II", data, 16)
        position += 12 + struct.unpack_from(">I", data, position)[0]
    raise ValueError(f"the picture has more than {_MOST_STEPS:,} chunks: save it again")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Source: ITU-T T.81, annex B: segments up to the first scan; 0xC0 to 0xCF begin a frame, but for DHT, JPG and DAC."""
    if data.count(b"\xff\xda") > _MOST_SCANS:  # coded data never holds these two bytes
        raise ValueError(
            f"the picture has more than {_MOST_SCANS} scans: save it again, not progressive"
        )
    position, size = 2, None
    for _ in range(_MOST_STEPS):
        if data[position] != 0xFF:
            raise ValueError("the picture is a damaged JPEG: save it again")
        marker = data[position + 1]
        if marker == 0xDA:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if size:
                raise ValueError("the picture says twice how large it is: save it again")
            height, width = struct.unpack_from(">HH", data, position + 5)
            size = width, height
        position += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, position + 2)[0]
    if not size:
        raise ValueError("the picture's pixels do not begin where they should: save it again")
    return size


def _gif_size(data: bytes) -> tuple[int, int]:
    """Source: GIF89a specification, sections 18 to 26: extensions up to the first frame, which may be larger than the screen."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _palette_bytes(flags)
    for _ in range(_MOST_STEPS):
        if data[position] == 0x2C:
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
            return max(width, left + frame_width), max(height, top + frame_height)
        if data[position] != 0x21:
            break
        position += 2
        while length := data[position]:
            position += 1 + length
        position += 1
    raise ValueError("the picture's first frame is not where it should be: save it again")


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _bmp_size(data: bytes) -> tuple[int, int]:
    """Source: Microsoft, BITMAPCOREHEADER (12 bytes) and BITMAPINFOHEADER (40 and more); a negative height stands upside down."""
    if struct.unpack_from("<I", data, 14)[0] == 12:
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    if struct.unpack_from("<I", data, 30)[0] not in _BMP_UNPACKED:
        raise ValueError("the picture is a compressed BMP: save it as PNG")
    return abs(width), abs(height)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Source: WebP container specification (VP8X), RFC 6386 section 9.1 (VP8), WebP lossless specification section 3 (VP8L)."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF
