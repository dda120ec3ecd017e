"""The train/validation split: which images are kept out of training, by each image alone."""

from __future__ import annotations

import hashlib
from typing import Literal

from mipha.data.images import image_key
from mipha.data.sample import Sample

Side = Literal["train", "validation"]


def side_of(sample: Sample, held_out: float) -> Side | None:
    """Return the side of the train/validation split that a sample is on.

    An image's side follows from its content (`image_key`) alone: a copy under another name, in
    another row or another data set is on the same side, whatever else there is and whatever the
    seed. So no image is ever on both sides. Text alone goes by what the user says.

    Args:
        held_out: Share of the images that is held out.

    Returns:
        None where the sample's images are on both sides, so that it can be on neither.
    """
    keys = [image_key(image) for image in sample.images]
    if not keys:
        asked = "\0".join(
            message.text for message in sample.messages if message.role in ("user", "document")
        )
        keys = [asked.encode("utf-8", "surrogatepass")]

    sides: set[Side] = {"validation" if _fraction(key) < held_out else "train" for key in keys}
    return sides.pop() if len(sides) == 1 else None


def _fraction(key: bytes) -> float:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
