"""Tiles and tokens of a picture are those of the stock processors, at any size."""

from __future__ import annotations

import ast
import math
import random
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from PIL import Image
from transformers import (
    AutoTokenizer,
    Idefics3Processor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mipha.geometry import (
    IMAGE,
    Anyres,
    Geometry,
    Native,
    Shuffled,
    Square,
    Tiles,
    geometry_of,
    read_geometry,
)

FIXTURES = Path(__file__).parent / "fixtures" / "images"
TABLE = (
    *((1, 1), (64, 64), (336, 336), (640, 480), (480, 640), (1000, 300)),
    *((1920, 1080), (1000, 50), (50, 1000), (4000, 3000)),
)


def sizes(number: int, most: int = 1400, aspect: int = 20) -> list[tuple[int, int]]:
    draw = random.Random(0)
    found = list(TABLE)
    while len(found) < number:
        width, height = draw.randint(1, most), draw.randint(1, most)
        if max(width, height) <= aspect * min(width, height):
            found.append((width, height))
    return found


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FIXTURES / "idefics3-llama-tied")


def counts(geometry: Geometry) -> list[int]:
    """Return the image tokens for each size of the table."""
    return [geometry.bounded_span(*size).num_image_tokens for size in TABLE]


def test_a_square_takes_the_same_for_every_picture() -> None:
    geometry = Square(384, 576)
    assert geometry.span(*TABLE[3]) == (IMAGE, (576,), 1)
    assert (geometry.longest, geometry.most_tiles, geometry.depends_on_size) == (576, 1, False)
    assert geometry.bounded_size(1000, 1) == (1000, 1)


def test_tiles_of_a_llava() -> None:
    geometry = Tiles(256, 64, 4)
    grids = [geometry.grid(*size) for size in TABLE]
    assert grids == [(1, 1), (1, 1), *[(2, 2)] * 3, (1, 4), (2, 2), (1, 4), (4, 1), (2, 2)]
    assert counts(geometry) == [64, 64, *[320] * 8]
    six = Tiles(256, 64, 6)
    assert [six.grid(*TABLE[place]) for place in (3, 4, 6, 9)] == [(2, 3), (3, 2), (2, 3), (2, 3)]
    assert six.span(640, 480).text == f"2x3:\n{(f'{IMAGE}{chr(10)}' * 3 + chr(10)) * 2}{IMAGE}"
    assert six.span(640, 480, num_images=3).tiles == 3  # six tiles are shared out
    assert (six.longest, six.most_tiles) == (7 * 64, 7)


@pytest.mark.parametrize(
    ("tile", "tokens", "columns"), [(32, 4, 4), (24, 4, 2), (32, 1, 3), (64, 16, 1), (16, 4, 6)]
)
def test_shuffled_tiles_are_those_of_idefics3(tile: int, tokens: int, columns: int) -> None:
    stock = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": columns * tile}, max_image_size={"longest_edge": tile}
        ),
        tokenizer(),
        image_seq_len=tokens,
    )
    geometry = geometry_of(stock)
    assert geometry == Shuffled(tile, tokens, columns * tile)
    longest = geometry.longest
    for width, height in sizes(1000):
        patches, rows, wide = stock.image_processor.get_number_of_image_patches(height, width)
        span = geometry.span(width, height)
        assert geometry.grid(width, height) == (rows, wide), (width, height)
        assert span.tiles == max(1, patches) <= geometry.most_tiles
        text = stock.replace_image_token({"rows": [[rows]], "cols": [[wide]]}, 0)
        assert re.sub("(<image>)+", IMAGE, text) == span.text
        assert text.count(IMAGE) == span.num_image_tokens <= longest
        (found,) = stock._get_num_multimodal_tokens([(height, width)]).num_image_tokens
        assert found == len(tokenizer()(text, add_special_tokens=False).input_ids)


def test_a_picture_of_idefics3_that_is_not_cut_is_one_tile() -> None:
    stock = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        ),
        tokenizer(),
        image_seq_len=4,
    )
    geometry = geometry_of(stock)
    assert (geometry.most_tiles, geometry.longest) == (1, 4)
    for width, height in sizes(100, most=300):
        picture = Image.new("RGB", (width, height), "teal")
        found = stock(text=IMAGE, images=[picture], return_tensors="np")
        assert found["pixel_values"].shape == (1, 1, 3, 32, 32)
        span = geometry.bounded_span(width, height)
        assert (span.runs, span.tiles) == ((4,), 1)
        written = span.text.replace(IMAGE, IMAGE * 4)
        ids = tokenizer()(written, add_special_tokens=False).input_ids
        assert found["input_ids"][0].tolist() == ids


def test_a_strip_is_bounded_before_its_span_is_found() -> None:
    geometry = Tiles(256, 64, 4)
    assert geometry.bounded_span(3000, 1, 2) == geometry.span(3000, 150, 2)
    assert geometry.bounded_span(640, 480) == geometry.span(640, 480)


def test_idefics3_at_full_size_takes_the_tokens_that_it_is_known_for() -> None:
    """Marks and newlines included, where two newlines are two tokens."""

    def whole(geometry: Shuffled) -> list[int]:
        found = []
        for size in TABLE:
            span = geometry.span(*size)
            marks = len(re.findall(r"<(?!image>)[^>]+>|\n", span.text))
            found.append(marks + span.num_image_tokens)
        return found

    assert whole(Shuffled(512, 64, 2048)) == [1128] * 3 + [863, 864, 598, 863, 333, 336, 863]
    assert whole(Shuffled(384, 144, 1152)) == [1465] * 5 + [587, 1026, 587, 589, 1465]


@pytest.mark.parametrize("strategy", ["full", "default"])
@pytest.mark.parametrize("side", [4, 3, 24])
def test_anyres_is_that_of_llava_next(strategy: str, side: int) -> None:
    tile = side * 8
    grids = [[tile * rows, tile * wide] for rows in (1, 2, 3) for wide in (1, 2, 3)]
    stock = SimpleNamespace(
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        image_processor=SimpleNamespace(image_grid_pinpoints=grids),
    )
    stock._get_unpadded_features = lambda *sizes: LlavaNextProcessor._get_unpadded_features(
        stock, *sizes
    )
    geometry = read_geometry(
        vars(stock)
        | {
            "image_processor": {
                "image_processor_type": "LlavaNextImageProcessor",
                "size": {"height": tile, "width": tile},
                "image_grid_pinpoints": grids,
            }
        }
    )
    longest = geometry.longest
    for width, height in sizes(1000):
        wanted = LlavaNextProcessor._get_number_of_features(stock, height, width, tile, tile)
        found = geometry.span(width, height).num_image_tokens
        assert found == wanted - (strategy == "default"), (width, height)
        assert found <= longest


@pytest.mark.parametrize("cap", [2, 6, 9])
def test_anyres_with_a_cap_is_that_of_llava_onevision(cap: int) -> None:
    grids = [[224 * rows, 224 * wide] for rows in range(1, 7) for wide in range(1, 7 // rows + 1)]
    stock = SimpleNamespace(
        num_image_tokens=49,
        vision_aspect_ratio=f"anyres_max_{cap}",
        vision_feature_select_strategy="full",
        image_processor=SimpleNamespace(image_grid_pinpoints=grids),
    )
    stock._get_unpadded_features = lambda *sizes: LlavaOnevisionProcessor._get_unpadded_features(
        stock, *sizes
    )
    geometry = Anyres(224, 7, tuple(map(tuple, grids)), cap=cap)
    for width, height in sizes(1000):
        wanted = LlavaOnevisionProcessor._get_number_of_features(stock, height, width, 224, 224)
        assert geometry.span(width, height).num_image_tokens == wanted, (width, height)
    assert geometry.span(640, 480, num_images=2).runs == (50,)


def test_anyres_takes_the_tokens_that_it_is_known_for() -> None:
    grids = tuple(
        (384 * rows, 384 * wide) for rows in range(1, 5) for wide in range(1, 4 // rows + 1)
    )
    wanted = [1176] * 3 + [2340, 2352, 2182, 1948, 868, 936, 2340]
    assert counts(Anyres(384, 24, grids)) == wanted


@cache
def native_rules() -> Any:
    """Return the rules of sizes of LFM2-VL's image processor, whose module needs torchvision."""
    source = Path(transformers.__file__).parent / "models/lfm2_vl/image_processing_lfm2_vl.py"
    names = {"round_by_factor", "find_closest_aspect_ratio", "_target_ratios", "smart_resize"}
    names |= {"_get_grid_layout", "_is_image_too_large"}
    rules = [
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    for rule in rules:
        rule.decorator_list = []
    assert len(rules) == len(names)
    found: dict[str, Any] = {"math": math}
    exec(compile(ast.Module(rules, []), str(source), "exec"), found)
    return SimpleNamespace(**{name: found[name] for name in names})


@pytest.mark.parametrize(
    ("least", "most", "tiles", "tile"),
    [(64, 256, 1, 512), (64, 256, 10, 512), (2, 8, 4, 32), (4, 64, 1, 64), (4, 30, 6, 128)],
)
def test_native_is_that_of_lfm2_vl(least: int, most: int, tiles: int, tile: int) -> None:
    from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

    patch = 16 if tile == 512 else 8
    stock = native_rules()
    geometry = Native(tile, patch, 2, least, most, 2, tiles)
    self = SimpleNamespace(_target_ratios=lambda low, high: stock._target_ratios(None, low, high))
    writer = SimpleNamespace(
        image_token=IMAGE,
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )
    for width, height in sizes(1000, aspect=geometry.max_aspect or 1):
        large = stock._is_image_too_large(None, height, width, most, patch, 2, 2.0)
        rows = columns = 1
        if large and tiles > 1:
            columns, rows, *_ = stock._get_grid_layout(self, height, width, 2, tiles, tile)
        wide, high = stock.smart_resize(None, height, width, 2, least, most, patch)
        assert geometry.grid(width, height) == (rows, columns), (width, height)
        assert geometry.resized(width, height) == (wide, high)
        per_tile = Lfm2VlProcessor._compute_tokens_per_tile(None, tile, patch, 2)
        whole = Lfm2VlProcessor._compute_tokens_for_image(None, [high, wide], patch, 2)
        text = Lfm2VlProcessor._build_image_tokens(
            writer, rows, columns, per_tile, whole, True, True
        )
        span = geometry.span(width, height)
        assert re.sub("(<image>)+", IMAGE, text) == span.text
        assert text.count(IMAGE) == span.num_image_tokens


def test_native_takes_the_tokens_that_it_is_known_for() -> None:
    wanted = [64, 64, 100, 234, 234, 232, 252, 72, 72, 234]
    assert counts(Native(512, 16, 2, 64, 256, 2, 1)) == wanted


@pytest.mark.parametrize(
    ("geometry", "most"), [(Tiles(32, 4, 4), 20), (Native(64, 8, 2, 4, 16, 2, 1), 16)]
)
def test_a_strip_is_padded_to_the_longest_that_shows_something(
    geometry: Geometry, most: int
) -> None:
    assert geometry.bounded_size(1000, 1) == (1000, -(-1000 // most))
    assert geometry.bounded_size(3, 900) == (-(-900 // most), 900)
    assert geometry.bounded_size(97, 41) == (97, 41)


def test_a_processor_in_memory_has_the_geometry_of_its_file(tmp_path: Path) -> None:
    size = {"height": 32, "width": 32}
    stock = LlavaProcessor(
        LlavaImageProcessorPil(size=size, crop_size=size, do_center_crop=False, max_tiles=6),
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
    )
    assert geometry_of(stock) == Tiles(32, 16, 6)
