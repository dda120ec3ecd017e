"""Images that look the same: compressed anew, resized, squashed, brighter, padded, mirrored.

    near_hashes(image) -> hashes of the image, without its uniform border, and mirrored
    NearImages(...).nearest(hashes) -> number of the image that one of them shows, or None

An image has two hashes of 64 bits: dHash, of the steps of brightness from left to right in 9 x 8
cells; and pHash, of the 8 x 8 lowest frequencies against their median. Two images are taken for
one where at most `MAX_DHASH` and `MAX_PHASH` bits differ. Those numbers are from 300 drawn
images, of which no two different ones came nearer than 13 bits. Crops of more than 5 % are
missed, and so are many that were padded and then strongly compressed.

Source: the hashes are those of the package imagehash
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageOps
from scipy.fft import dct

MAX_DHASH, MAX_PHASH = 4, 6
"""Bits of 64."""

_FEW_ONES = 8
"""Flat images, charts and text on white have so few steps that they all look the same."""

_LEAST_SIDE = 65
"""Pixels. Smaller drawings look like others: 1,232 of 2,000 rows of easy-VQA, with 64, did."""

_ASPECT = 0.02
"""Relative difference of width / height within which two images may be one."""

_BORDER = 16
"""Levels of 255 by which a uniform border may differ, after compression."""


class NearHash(NamedTuple):
    """Hashes of one image.

    Args:
        dhash: 64 bits.
        phash: 64 bits.
        aspect: Width / height.
    """

    dhash: int
    phash: int
    aspect: float


def near_hashes(image: Image.Image) -> tuple[NearHash, ...]:
    """Return the hashes of an image, without a uniform border where it has one, and mirrored.

    A variant that shows too little to be told from others is left out.
    """
    if min(image.size) < _LEAST_SIDE:
        return ()
    variants = [image, ImageOps.mirror(image)]
    if (inner := _without_border(image)) is not None:
        variants += [inner, ImageOps.mirror(inner)]
    found = (_hash(variant) for variant in variants)
    return tuple(dict.fromkeys(one for one in found if _shows_enough(one)))


class NearImages:
    """Images to be found again.

    Args:
        hashes: Of each image, as `near_hashes` gives them.
    """

    def __init__(self, hashes: Sequence[Sequence[NearHash]]) -> None:
        pairs = [(number, one) for number, each in enumerate(hashes) for one in each]
        self._numbers = [number for number, _ in pairs]
        bits = [(one.dhash, one.phash) for _, one in pairs]
        self._bits = np.asarray(bits, dtype=np.uint64).reshape(-1, 2)  # (hashes, 2)
        self._aspects = np.asarray([one.aspect for _, one in pairs])  # (hashes,)

    def nearest(self, hashes: Sequence[NearHash]) -> tuple[int, int, int] | None:
        """Return the image that one of the hashes shows: its number, and the bits that differ."""
        best: tuple[int, int, int, int] | None = None
        for one in hashes if len(self._bits) else ():
            own = np.asarray([one.dhash, one.phash], dtype=np.uint64)
            apart = np.bitwise_count(self._bits ^ own)  # (hashes, 2)
            is_near = (apart <= (MAX_DHASH, MAX_PHASH)).all(axis=1) & self._fits(one.aspect)
            for place in np.flatnonzero(is_near).tolist():
                first, second = map(int, apart[place])
                found = (first + second, self._numbers[place], first, second)
                best = found if best is None else min(best, found)
        return best[1:] if best else None

    def _fits(self, aspect: float) -> np.ndarray:
        """Return which images have this aspect; a square may be any image, squashed."""
        same = np.abs(self._aspects / aspect - 1) <= _ASPECT
        return same | (self._aspects == 1) | (aspect == 1)


def _hash(image: Image.Image) -> NearHash:
    grey = image.convert("L")
    steps = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS)).astype(int)  # (8, 9)
    small = np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS)).astype(float)
    low = dct(dct(small, axis=0), axis=1)[:8, :8]  # (8, 8)
    return NearHash(
        _as_int(steps[:, 1:] > steps[:, :-1]),
        _as_int(low > np.median(low)),
        image.width / image.height,
    )


def _as_int(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _shows_enough(one: NearHash) -> bool:
    return _FEW_ONES <= one.dhash.bit_count() <= 64 - _FEW_ONES


def _without_border(image: Image.Image) -> Image.Image | None:
    """Return the image without a border of one colour; None where it has none."""
    corner = Image.new(image.mode, image.size, image.getpixel((0, 0)))
    apart = ImageChops.difference(image, corner).convert("L")
    box = apart.point(lambda level: 255 * (level > _BORDER)).getbbox()
    if box is None or box == (0, 0, *image.size):
        return None
    return image.crop(box)
