"""Drawn pages: the same by seed, what is asked stands on them, and nothing overlaps."""

from __future__ import annotations

import io
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from mipha.data.datasets import written_page, written_page_mini
from mipha.data.datasets.written_page import COLOURS, Layout, Questions, draw, page_of

LAYOUTS = [written_page.PAGES, written_page_mini.PAGES]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.name)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


def pixels_of(layout: Layout, split: str, number: int) -> np.ndarray:
    with Image.open(io.BytesIO(draw(layout, split, number))) as image:
        return np.asarray(image.convert("RGB"), np.int16)  # (height, width, 3)


def test_pages_are_those_of_their_seed(layout: Layout) -> None:
    first = draw(layout, "train", 3)
    draw.cache_clear()
    page_of.cache_clear()
    assert draw(layout, "train", 3) == first
    others = {
        draw(layout, split, number) for split in written_page.SPLITS for number in range(3, 6)
    }
    assert len(others) == 9, "pages and splits differ"


def test_the_pages_never_move() -> None:
    """Scores of different days are of the same questions."""
    asked = Questions(written_page_mini.PAGES, "test")
    assert [(asked[index].question, asked[index].answer) for index in range(3)] == [
        ("which number is red?", "3"),
        ("which number is blue?", "7"),
        ("how many numbers are there?", "4"),
    ]


def test_each_number_stands_where_the_page_says_in_its_colour(layout: Layout) -> None:
    for number in range(20):
        page, pixels = page_of(layout, "train", number), pixels_of(layout, "train", number)
        assert pixels.shape == (page.height, page.width, 3)
        for one in page.numbers:
            box = pixels[one.top : one.top + one.height, one.left :][:, : 3 * one.height]
            # The darkest pixel of a digit is of its colour, or a mix with the ground.
            off = np.abs(box - np.array(COLOURS[one.colour])).sum(2)
            assert off.min() < (60 if one.height >= 16 else 260), (number, one)


def test_numbers_do_not_overlap_and_stay_on_the_page(layout: Layout) -> None:
    heights = set()
    for number in range(200):
        page = page_of(layout, "validation", number)
        boxes = []
        for one in page.numbers:
            wide, high = written_page._extent(one.text, one.height)
            boxes.append((one.left, one.top, one.left + wide, one.top + high))
            heights.add(one.height)
            assert one.left >= 0 and one.left + wide <= page.width
            assert one.top >= 0 and one.top + high <= page.height
        for a, b in combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        colours = [one.colour for one in page.numbers]
        assert len(set(colours)) == len(colours) and 2 <= len(colours) <= 4
    assert heights == set(layout.heights)


def test_digits_are_as_high_as_they_are_said_to_be(layout: Layout) -> None:
    for height in layout.heights:
        assert written_page._extent("0", height)[1] == height


def test_no_patch_and_no_tile_cuts_a_digit_of_the_mini_pages() -> None:
    layout = written_page_mini.PAGES
    for number in range(100):
        for one in page_of(layout, "train", number).numbers:
            wide, _ = written_page._extent(one.text, one.height)
            assert one.left // one.height == (one.left + wide - 1) // one.height
            assert one.top % one.height == 0 and 48 % one.height == 0


def test_questions_ask_what_stands_on_the_page(layout: Layout) -> None:
    asked = Questions(layout, "train")
    assert len(asked) == 3 * written_page.SPLITS["train"]
    counts: Counter[str] = Counter()
    for one in (asked[index] for index in range(90)):
        page = page_of(layout, "train", one.page)
        if one.height is None:
            assert one.answer == str(len(page.numbers))
            counts["count"] += 1
            continue
        (right,) = [number for number in page.numbers if f"is {number.colour}?" in one.question]
        assert (one.answer, one.height) == (right.text, right.height)
        assert len(one.answer) == layout.digits
        counts["number"] += 1
    assert counts == {"number": 60, "count": 30}
    assert asked[-1].page == written_page.SPLITS["train"] - 1
    with pytest.raises(IndexError):
        asked[len(asked)]


def test_a_sample_reads_as_it_is_trained_on() -> None:
    data = written_page_mini.DATASET
    record = data.load(None, "test")[0]
    sample = data.to_sample(record)
    assert sample.id == "written_page_mini/test/0/0"
    assert [message.text for message in sample.messages] == [
        f"<image>\n{record.question}",
        record.answer,
    ]
    assert sample.images == (draw(written_page_mini.PAGES, "test", 0),)


def test_files_and_other_splits_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="written_page is drawn and reads no files: leave out"):
        written_page.DATASET.load(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'dev': use train or validation or test"):
        written_page.DATASET.load(None, "dev")
