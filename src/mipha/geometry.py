"""What an image becomes for a model: tiles for the tower, tokens and marks for the language model.

    settings of the processor --read_geometry--> Geometry
    Geometry.span(width, height) -> Span: text with one <image> for each run of image tokens,
                                          the lengths of the runs, and the number of tiles

A checkpoint's processor_config.json decides it, and everything asks here: encoding, packing, plans,
checks of data, prompts, the server and exports.

    kind      class of transformers     an image of 3 columns and 2 rows of tiles
    square    Llava                     one square
    tiles     Llava                     2x3: six tiles, a line for each row, then the whole image
    shuffled  Idefics3                  the same with marks, and fewer tokens a tile
    anyres    LlavaNext, OneVision      the whole, then the grid read line by line, padding left out
    native    Lfm2Vl                    its own shape; tiles where it is large and they are allowed

Sizes are (width, height) in pixels of the upright image after `bounded_size`.

Source: processors and image processors of these classes in transformers 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

IMAGE = "<image>"
"""Stands in a text where an image goes."""

MAX_ASPECT = 20
"""Longer strips are padded on their short sides first; tiles of thinner ones would show nothing."""

_MAX_NATIVE_ASPECT = 64
_IDEFICS3_MAX_SIDE = 4096


class Span(NamedTuple):
    """What stands in a conversation for one image.

    Args:
        text: Text with one `IMAGE` for each run of image tokens, with marks and newlines around.
        runs: Image tokens of each run.
        tiles: Images that the tower reads.
    """

    text: str
    runs: tuple[int, ...]
    tiles: int

    in_conversation = False
    """Whether the text is written before the chat template is applied, or after it."""

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of all runs, without the marks around them."""
        return sum(self.runs)


class TilesSpan(Span):
    """The span of an image whose tiles are images of their own for the chat template."""

    in_conversation = True


@dataclass(frozen=True)
class Geometry:
    """How images are cut for one model.

    Args:
        side: Pixels of a square tile.
    """

    side: int

    kind: ClassVar[str]

    def span(self, width: int, height: int, num_images: int = 1) -> Span:
        """Return what stands for an image.

        Args:
            width: Pixels of the upright image, bounded.
            height: Pixels.
            num_images: Images of the whole conversation.
        """
        raise NotImplementedError

    def bounded_span(self, width: int, height: int, num_images: int = 1) -> Span:
        """Return what stands for an image of any aspect; arguments as for `span`, not bounded."""
        return self.span(*self.bounded_size(width, height), num_images)

    @property
    def depends_on_size(self) -> bool:
        """Whether images of different sizes take different tokens."""
        return True

    @property
    def max_aspect(self) -> int | None:
        """The longest strip, as long side by short side; None where any is read."""
        return MAX_ASPECT

    @property
    def most_tiles(self) -> int:
        """Most tiles of one image, the whole image among them."""
        return 1

    @property
    def longest(self) -> int:
        """Most image tokens of one image, the marks around them left out."""
        sizes = {self.bounded_size(*size) for size in _probes(self.side)}
        return max(self.span(*size).num_image_tokens for size in sizes)

    def bounded_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of an image after its short side is padded to `max_aspect`."""
        if self.max_aspect is None:
            return width, height
        return (
            max(width, -(-height // self.max_aspect)),
            max(height, -(-width // self.max_aspect)),
        )


@dataclass(frozen=True)
class Square(Geometry):
    """One square for each image.

    Args:
        tokens: Image tokens of a tile.
    """

    tokens: int

    kind: ClassVar[str] = "square"

    def span(self, width: int = 0, height: int = 0, num_images: int = 1) -> Span:
        """Return the span of any image."""
        return Span(IMAGE, (self.tokens,), 1)

    @property
    def depends_on_size(self) -> bool:
        """False."""
        return False

    @property
    def max_aspect(self) -> int | None:
        """None: any strip becomes a square."""
        return None


@dataclass(frozen=True)
class Tiles(Geometry):
    """Tiles as several images of one LLaVA, each a square of its own, and then the whole image.

    Words before them say the grid, because 2 x 3 and 3 x 2 tiles are as many images.

    Args:
        tokens: Image tokens of a tile.
        max_tiles: Most tiles of a conversation, its whole images left out.
    """

    tokens: int
    max_tiles: int

    kind: ClassVar[str] = "tiles"

    @property
    def most_tiles(self) -> int:
        """Most tiles of one image, the whole image among them."""
        return self.max_tiles + 1

    def grid(self, width: int, height: int, num_images: int = 1) -> tuple[int, int]:
        """Return rows and columns; (1, 1) for an image that is not cut."""
        most = max(1, self.max_tiles // num_images)
        grids = [
            (rows * self.side, columns * self.side)
            for rows in range(1, most + 1)
            for columns in range(1, most // rows + 1)
        ]
        rows, columns = best_grid(width, height, grids)
        return rows // self.side, columns // self.side

    def span(self, width: int, height: int, num_images: int = 1) -> Span:
        """Return the span of an image; a newline stands behind each image for the template."""
        rows, columns = self.grid(width, height, num_images)
        if rows * columns == 1:
            return TilesSpan(IMAGE, (self.tokens,), 1)
        row = f"{IMAGE}\n" * columns + "\n"
        text, tiles = f"{rows}x{columns}:\n{row * rows}{IMAGE}", rows * columns + 1
        return TilesSpan(text, (self.tokens,) * tiles, tiles)


@dataclass(frozen=True)
class Shuffled(Geometry):
    """Tiles of Idefics3, with marks for row and column, and then the whole image.

    Args:
        tokens: Image tokens of a tile.
        longest_edge: Pixels that the longest side is scaled to, up or down.
        splits: Whether images are cut at all.
    """

    tokens: int
    longest_edge: int
    splits: bool = True

    kind: ClassVar[str] = "shuffled"

    @property
    def most_tiles(self) -> int:
        """Most tiles of one image, the whole image among them."""
        if not self.splits:
            return 1
        return (-(-min(self.longest_edge, _IDEFICS3_MAX_SIDE) // self.side)) ** 2 + 1

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return rows and columns; (0, 0) for an image that is not cut."""
        if not self.splits:
            return 0, 0

        # Scale the longest side, then both sides up to whole tiles; each step keeps the aspect.
        height, width = scaled_to(height, width, self.longest_edge)
        if max(height, width) > _IDEFICS3_MAX_SIDE:
            aspect = width / height
            if width >= height:
                width, height = _IDEFICS3_MAX_SIDE, int(_IDEFICS3_MAX_SIDE / aspect)
            else:
                width, height = int(_IDEFICS3_MAX_SIDE * aspect), _IDEFICS3_MAX_SIDE
            width, height = max(width, 1), max(height, 1)
        aspect = width / height
        if width >= height:
            columns = math.ceil(width / self.side)
            rows = math.ceil(int(columns * self.side / aspect) / self.side)
        else:
            rows = math.ceil(height / self.side)
            columns = math.ceil(int(rows * self.side * aspect) / self.side)
        return (0, 0) if rows <= 1 and columns <= 1 else (rows, columns)

    def span(self, width: int, height: int, num_images: int = 1) -> Span:
        """Return the span of an image."""
        rows, columns = self.grid(width, height)
        around = "<fake_token_around_image>"
        whole = f"{around}<global-img>{IMAGE}{around}"
        if not rows:
            return Span(whole, (self.tokens,), 1)
        text = "".join(
            "".join(f"{around}<row_{row}_col_{column}>{IMAGE}" for column in range(1, columns + 1))
            + "\n"
            for row in range(1, rows + 1)
        )
        tiles = rows * columns + 1
        return Span(f"{text}\n{whole}", (self.tokens,) * tiles, tiles)


@dataclass(frozen=True)
class Anyres(Geometry):
    """The whole image, then its tiles as one grid without padding, with an end of every row.

    Args:
        patches: Patches a side of a tile.
        grids: Sizes of canvases, (height, width) in pixels.
        dropped: Tokens of each tile that are left out behind the count: 1 in a checkpoint of
            LlavaNext whose count is made with a class token that it does not have.
        cap: Most tiles' worth of tokens of the grid; None for no limit. With a cap, several
            images of one conversation take one tile each.
    """

    patches: int
    grids: tuple[tuple[int, int], ...]
    dropped: int = 0
    cap: int | None = None

    kind: ClassVar[str] = "anyres"

    @property
    def most_tiles(self) -> int:
        """Most tiles of one image, the whole image among them."""
        return max(height * width for height, width in self.grids) // self.side**2 + 1

    def span(self, width: int, height: int, num_images: int = 1) -> Span:
        """Return the span of an image."""
        whole = self.patches**2 - self.dropped
        if self.cap is not None and num_images > 1:
            return Span(IMAGE, (whole + 1,), 1)

        # Leave out the rows or columns of the grid that are padding alone.
        canvas_height, canvas_width = best_grid(width, height, self.grids)
        rows, columns = canvas_height // self.side, canvas_width // self.side
        high, wide = rows * self.patches, columns * self.patches
        if width / height > wide / high:
            high -= (high - int(round(height * (wide / width), 7))) // 2 * 2
        else:
            wide -= (wide - int(round(width * (high / height), 7))) // 2 * 2

        if self.cap is not None:
            ratio = math.sqrt(high * wide / (self.cap * self.patches**2))
            if ratio > 1.1:
                high, wide = int(high // ratio), int(wide // ratio)
        return Span(IMAGE, (whole + high * wide + high,), rows * columns + 1)


@dataclass(frozen=True)
class Native(Geometry):
    """An image in its own shape, both sides whole numbers of tokens.

    Args:
        patch: Pixels of a patch.
        shuffle: Patches a side that one token stands for.
        min_tokens: Fewest tokens of an image.
        max_tokens: Most tokens of an image, or of the whole beside tiles.
        min_tiles: Fewest tiles of an image that is cut.
        max_tiles: Most tiles; 1: no image is cut.
        tolerance: An image is cut where it is so many times larger than `max_tokens` allow.
        has_whole: Whether the whole image stands behind its tiles.
    """

    patch: int
    shuffle: int
    min_tokens: int
    max_tokens: int
    min_tiles: int
    max_tiles: int
    tolerance: float = 2.0
    has_whole: bool = True

    kind: ClassVar[str] = "native"

    @property
    def most_tiles(self) -> int:
        """Most tiles of one image, the whole image among them."""
        return self.max_tiles + 1

    @property
    def max_aspect(self) -> int | None:
        """The stock processor breaks where a strip is longer than `max_tokens` squares."""
        return min(self.max_tokens, _MAX_NATIVE_ASPECT)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return rows and columns of tiles; (1, 1) for an image that is not cut."""
        unit = self.patch * self.shuffle
        around = [max(self.patch, round(side / unit) * unit) for side in (width, height)]
        most = self.max_tokens * unit**2 * self.tolerance
        if self.max_tiles <= 1 or around[0] * around[1] <= most:
            return 1, 1

        # Take the grid of the nearest aspect; of two as near, the later one for a large image.
        nearest, chosen = math.inf, (1, 1)
        for columns, rows in _tile_counts(self.min_tiles, self.max_tiles):
            difference = abs(width / height - columns / rows)
            is_large = width * height > 0.5 * self.side**2 * columns * rows
            if difference < nearest or (difference == nearest and is_large):
                nearest, chosen = difference, (rows, columns)
        return chosen

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the size, (width, height) in pixels, that the whole image is scaled to."""
        unit = self.patch * self.shuffle
        fitted = [max(unit, round(side / unit) * unit) for side in (width, height)]
        area, (least, most) = width * height, (self.min_tokens, self.max_tokens)
        if fitted[0] * fitted[1] > most * unit**2:
            factor = math.sqrt(area / (most * unit**2))
            fitted = [
                max(unit, math.floor(side / factor / unit) * unit) for side in (width, height)
            ]
        elif fitted[0] * fitted[1] < least * unit**2:
            factor = math.sqrt(least * unit**2 / area)
            fitted = [math.ceil(side * factor / unit) * unit for side in (width, height)]
        return fitted[0], fitted[1]

    def span(self, width: int, height: int, num_images: int = 1) -> Span:
        """Return the span of an image."""
        unit = self.patch * self.shuffle
        wide, high = self.resized(width, height)
        whole = (wide // unit) * (high // unit)
        rows, columns = self.grid(width, height)
        if rows * columns == 1:
            return Span(f"<|image_start|>{IMAGE}<|image_end|>", (whole,), 1)

        text = "".join(
            f"<|img_row_{row}_col_{column}|>{IMAGE}"
            for row in range(1, rows + 1)
            for column in range(1, columns + 1)
        )
        runs = (math.ceil(self.side // self.patch / self.shuffle) ** 2,) * (rows * columns)
        if self.has_whole:
            text, runs = f"{text}<|img_thumbnail|>{IMAGE}", (*runs, whole)
        return Span(f"<|image_start|>{text}<|image_end|>", runs, len(runs))


def read_geometry(processor: Mapping[str, Any]) -> Geometry:
    """Return the geometry of a checkpoint.

    Args:
        processor: Content of its processor_config.json.

    Raises:
        KeyError: A setting is missing.
        ValueError: The image processor is of a kind that is not known.
    """
    image = processor["image_processor"]
    kind = str(image.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    kind = kind.removesuffix("ImageProcessor")

    if kind == "Idefics3":
        return Shuffled(
            image["max_image_size"]["longest_edge"],
            processor["image_seq_len"],
            image["size"]["longest_edge"],
            image["do_image_splitting"],
        )

    if kind == "LlavaNext":
        side = _side(image)
        return Anyres(
            side,
            side // processor["patch_size"],
            _grids(image),
            (processor["vision_feature_select_strategy"] == "default")
            - processor["num_additional_image_tokens"],
        )

    if kind == "LlavaOnevision":
        strategy = processor["vision_feature_select_strategy"]
        return Anyres(
            _side(image),
            math.isqrt(processor["num_image_tokens"]),
            _grids(image),
            int(strategy == "default")
            - (processor["num_image_tokens"] - math.isqrt(processor["num_image_tokens"]) ** 2),
            int(processor["vision_aspect_ratio"].removeprefix("anyres_max_")),
        )

    if kind == "Lfm2Vl":
        splits = image["do_image_splitting"]
        return Native(
            image["tile_size"],
            image["encoder_patch_size"],
            image["downsample_factor"],
            image["min_image_tokens"],
            image["max_image_tokens"],
            image["min_tiles"],
            image["max_tiles"] if splits else 1,
            image["max_pixels_tolerance"],
            image["use_thumbnail"],
        )

    size = image["crop_size" if image.get("do_center_crop") else "size"]
    tokens = count_image_tokens(
        size["height"],
        size["width"],
        processor["patch_size"],
        processor["num_additional_image_tokens"],
        processor["vision_feature_select_strategy"],
    )
    if max_tiles := image.get("max_tiles"):
        return Tiles(size["height"], tokens, max_tiles)
    return Square(size["height"], tokens)


_SETTINGS = (
    "patch_size",
    "num_additional_image_tokens",
    "vision_feature_select_strategy",
    "image_seq_len",
    "num_image_tokens",
    "vision_aspect_ratio",
)


def geometry_of(processor: Any) -> Geometry:
    """Return the geometry of a processor of transformers."""
    settings = {key: getattr(processor, key) for key in _SETTINGS if hasattr(processor, key)}
    return read_geometry(settings | {"image_processor": processor.image_processor.to_dict()})


def count_image_tokens(
    height: int, width: int, patch_size: int, num_prefix_tokens: int, select_strategy: str
) -> int:
    """Return how many tokens one image takes in a stock LLaVA.

    Args:
        height: Pixels.
        width: Pixels.
        patch_size: Pixels a side.
        num_prefix_tokens: Tokens that the tower puts before its patches.
        select_strategy: `default` leaves out the first token of the tower, `full` keeps all.

    Source: transformers 5.23 `LlavaProcessor`.
    """
    patches = (height // patch_size) * (width // patch_size)
    return patches + num_prefix_tokens - (select_strategy == "default")


def best_grid(width: int, height: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the canvas that keeps most of an image's pixels, and of these wastes the least.

    Args:
        width: Pixels of the image.
        height: Pixels.
        grids: Canvases, (height, width) in pixels.

    Source: transformers 5.23 `select_best_resolution`.
    """
    chosen, most, least = grids[0], 0, math.inf
    for canvas_height, canvas_width in grids:
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_width * canvas_height - kept
        if kept > most or (kept == most and wasted < least):
            chosen, most, least = (canvas_height, canvas_width), kept, wasted
    return chosen


def scaled_to(height: int, width: int, longest: int) -> tuple[int, int]:
    """Return (height, width) with the longest side as given, the other one truncated to even."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        width, height = int(longest * aspect), longest
        width += width % 2
    return max(height, 1), max(width, 1)


@lru_cache(maxsize=64)
def _tile_counts(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Return the grids, (columns, rows), of so many tiles, in the order of the stock processor."""
    grids = [
        (columns, rows)
        for number in range(least, most + 1)
        for columns in range(1, number + 1)
        for rows in range(1, number + 1)
        if least <= columns * rows <= most
    ]
    return tuple(sorted(set(grids), key=lambda grid: grid[0] * grid[1]))


def _side(image: Mapping[str, Any]) -> int:
    size = image["size"]
    return size.get("height") or size["shortest_edge"]


def _grids(image: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((height, width) for height, width in image["image_grid_pinpoints"])


def _probes(side: int) -> list[tuple[int, int]]:
    """Return sizes of images of every aspect, small and large, among them those of most tiles."""
    sides = [1, side, *(side * number for number in range(2, 9)), 8 * side + 1, 40 * side]
    aspects = [(wide, high) for wide in range(1, 21) for high in (1, 2, 3)]
    fixed = [(wide, high) for wide in sides for high in sides]
    return fixed + [
        size
        for wide, high in aspects
        for size in ((wide * side, high * side), (high * side, wide * side))
    ]
