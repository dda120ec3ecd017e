"""Images as another program gets them, so that its model reads what it was trained on.

llama.cpp and vLLM take whole images and cut or scale them by rules of their own:

    processor_config.json, of a checkpoint or in its mmproj --> Front
    Front.prepare(turns, images) --> the turns and images of a request

    square    as it is: the program pads and scales it
    tiles     its tiles as images of their own, with the words that say how they lie
    shuffled  as it is, a long strip padded: llama.cpp cuts as Idefics3 does
    native    in its final size: llama.cpp rounds half away from zero, Python half to even
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mipha.data.pixels import as_square, bounded, cut_tiles
from mipha.data.sample import Message, with_tiles
from mipha.deploy.gguf.header import processor_config
from mipha.geometry import Geometry, Native, Tiles, read_geometry


@dataclass(frozen=True)
class Front:
    """How images are prepared for a model behind another program.

    Args:
        geometry: How the model was trained to see images.
        mean: Mean of the pixels per channel, of values in 0..1: the colour of padding.
        pads: Whether a tile that is not square is padded; otherwise squashed.
        resample: Filter of Pillow that scales a native image.
    """

    geometry: Geometry
    mean: tuple[float, ...]
    pads: bool = True
    resample: int = Image.Resampling.BILINEAR

    def prepare(
        self, turns: Sequence[Message], images: Sequence[Image.Image], num_images: int | None = None
    ) -> tuple[tuple[Message, ...], list[Image.Image]]:
        """Return turns and images as the program is asked.

        Args:
            turns: Turns with a marker for each image.
            images: Upright RGB images in order.
            num_images: Images of the whole conversation; None: these.
        """
        count = num_images or len(images)
        spans = [self.geometry.bounded_span(*image.size, count) for image in images]
        sent = [one for image in images for one in self.cut(image, count)]
        return with_tiles(turns, spans), sent

    def cut(self, image: Image.Image, num_images: int = 1) -> list[Image.Image]:
        """Return what is sent of one image: its tiles, or a single image.

        Args:
            image: Upright RGB image.
            num_images: Images of the whole conversation.
        """
        geometry = self.geometry
        image = bounded(image, geometry, self.mean)
        if isinstance(geometry, Tiles):
            tiles = cut_tiles(image, geometry, self.mean, num_images)
            return [as_square(tile, geometry.side, self.mean, self.pads) for tile in tiles]
        if isinstance(geometry, Native) and geometry.grid(*image.size) == (1, 1):
            return [image.resize(geometry.resized(*image.size), self.resample)]
        return [image]


def front_of(processor: Mapping[str, Any]) -> Front:
    """Return the front of a checkpoint.

    Args:
        processor: Content of its processor_config.json.
    """
    image = processor["image_processor"]
    mean = tuple(image.get("image_mean") or (0.5, 0.5, 0.5))
    resample = image.get("resample", Image.Resampling.BILINEAR)
    return Front(read_geometry(processor), mean, bool(image.get("do_pad", True)), resample)


def front_of_gguf(mmproj: Path | None) -> Front | None:
    """Return the front that an mmproj of ours asks for; None where it says nothing.

    Raises:
        ValueError: What it says cannot be read.
    """
    text = mmproj and processor_config(mmproj)
    if not text:
        return None
    try:
        return front_of(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{mmproj} does not say how its images are cut: export the model again with "
            f"`mipha export --to gguf` ({error})"
        ) from error
