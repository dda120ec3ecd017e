"""Pages with a few numbers at random places, drawn by a seed: a task that needs fine detail.

    split and number of a page --page_of--> Page: its numbers, colours, heights, places
                               --draw--> PNG, the same bytes wherever Pillow is the same

Each page has three questions: two numbers by their colour, and how many there are. Digits of a page
of 1024 pixels are 10 to 48 pixels high; squeezed into a square of 256, the smallest are gone.
Nothing is read from files: `root` is not taken, and `limit` says how many questions are used.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from mipha.data.dataset import DataSet
from mipha.data.datasets._records import check_split
from mipha.data.sample import IMAGE, Message, Sample

COLOURS = {
    "black": (20, 20, 20),
    "red": (200, 30, 30),
    "green": (20, 130, 40),
    "blue": (30, 50, 200),
}
QUESTIONS_A_PAGE = 3
SPLITS = {"train": 40_000, "validation": 400, "test": 400}
"""Split to its number of pages."""


@dataclass(frozen=True)
class Layout:
    """What the pages of a data set are like.

    Args:
        name: Name of the data set; it seeds the pages.
        side: Longest side of a page, pixels.
        aspects: Shapes that are drawn, width by height.
        heights: Heights of digits that are drawn, pixels.
        digits: Digits of a number.
        on_grid: Whether a digit of height h stands in a cell of h x h pixels, the cells side by
            side from the corner of the page, so that no tile and no patch cuts one in two.
    """

    name: str
    side: int
    aspects: tuple[tuple[int, int], ...]
    heights: tuple[int, ...]
    digits: int
    on_grid: bool = False


class Number(NamedTuple):
    """A number on a page; `left` and `top` are the corner of its digits."""

    text: str
    colour: str
    height: int
    left: int
    top: int


class Page(NamedTuple):
    """What is drawn: the size of the page in pixels, and its numbers."""

    width: int
    height: int
    numbers: tuple[Number, ...]


class Asked(NamedTuple):
    """One question about a page.

    Args:
        layout: Layout of the page.
        split: Name of the split.
        page: Number of the page.
        number: Place among the questions of the page, from 0.
        question: Its text.
        answer: What is right.
        height: Height of the digits that answer it, pixels; None where all of the page does.
    """

    layout: Layout
    split: str
    page: int
    number: int
    question: str
    answer: str
    height: int | None


class Questions(Sequence[Asked]):
    """The questions of a split, page by page, each made when it is asked for."""

    def __init__(self, layout: Layout, split: str) -> None:
        self.layout, self.split = layout, split

    def __len__(self) -> int:
        return SPLITS[self.split] * QUESTIONS_A_PAGE

    def __getitem__(self, index: int) -> Asked:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number, place = divmod(index % len(self), QUESTIONS_A_PAGE)
        page = page_of(self.layout, self.split, number)
        if place == QUESTIONS_A_PAGE - 1:
            question, answer = "how many numbers are there?", str(len(page.numbers))
            return Asked(self.layout, self.split, number, place, question, answer, None)
        asked = page.numbers[place]
        question = f"which number is {asked.colour}?"
        return Asked(self.layout, self.split, number, place, question, asked.text, asked.height)


@lru_cache(maxsize=1024)
def page_of(layout: Layout, split: str, number: int) -> Page:
    """Return what stands on a page: two to four numbers, each of a colour of its own."""
    dice = random.Random(f"{layout.name}/{split}/{number}")
    wide, high = dice.choice(layout.aspects)
    width, height = layout.side * wide // max(wide, high), layout.side * high // max(wide, high)

    numbers: list[Number] = []
    boxes: list[tuple[int, int, int, int]] = []
    for colour in dice.sample(sorted(COLOURS), dice.randint(2, 4)):
        text = "".join(dice.choice("0123456789") for _ in range(layout.digits))
        digits = dice.choice(layout.heights)
        box = _free_place(dice, layout, (width, height), text, digits, boxes)
        # A small digit finds a place where a large one does not.
        while box is None:
            digits = min(layout.heights)
            box = _free_place(dice, layout, (width, height), text, digits, boxes)
        boxes.append(box)
        numbers.append(Number(text, colour, digits, box[0], box[1]))
    return Page(width, height, tuple(numbers))


def _free_place(
    dice: random.Random,
    layout: Layout,
    page: tuple[int, int],
    text: str,
    height: int,
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int] | None:
    """Return (left, top, right, bottom) of a text that overlaps nothing; None after some tries."""
    wide, high = _extent(text, height)
    gap = 0 if layout.on_grid else max(2, high // 4)
    for _ in range(50):
        if layout.on_grid:
            left = height * dice.randrange(page[0] // height) + (height - wide) // 2
            top = height * dice.randrange(page[1] // height)
        else:
            left = dice.randint(1, max(1, page[0] - wide - 1))
            top = dice.randint(1, max(1, page[1] - high - 1))
        box = (left, top, left + wide, top + high)
        if all(
            box[2] + gap <= other[0]
            or other[2] + gap <= box[0]
            or box[3] + gap <= other[1]
            or other[3] + gap <= box[1]
            for other in taken
        ):
            return box
    return None


@lru_cache(maxsize=256)
def draw(layout: Layout, split: str, number: int) -> bytes:
    """Draw a page as PNG: numbers on a light ground."""
    page = page_of(layout, split, number)
    dice = random.Random(f"{layout.name}/{split}/{number}/ground")
    ground = tuple(dice.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (page.width, page.height), ground)
    pen = ImageDraw.Draw(image)
    for one in page.numbers:
        font = _font(one.height)
        left, top, _, _ = font.getbbox(one.text)
        pen.text((one.left - left, one.top - top), one.text, COLOURS[one.colour], font)

    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@lru_cache(maxsize=64)
def _font(height: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font at the size whose digits have this height, pixels."""
    for size in range(height, 3 * height):
        font = ImageFont.load_default(size)
        _, top, _, bottom = font.getbbox("0")
        if bottom - top >= height:
            return font
    raise AssertionError(f"no size of Pillow's font has digits of {height} pixels")


@lru_cache(maxsize=4096)
def _extent(text: str, height: int) -> tuple[int, int]:
    """Return width and height of a text in pixels."""
    left, top, right, bottom = _font(height).getbbox(text)
    return int(right - left), int(bottom - top)


def data_set(layout: Layout) -> DataSet:
    """Return the data set of a layout."""

    def load(root: Path | None, split: str) -> Questions:
        check_split(layout.name, split, tuple(SPLITS))
        check_drawn(layout, root)
        return Questions(layout, split)

    return DataSet(layout.name, load, to_sample)


def check_drawn(layout: Layout, root: Path | None) -> None:
    """Raise a `ValueError` where a place of files is given."""
    if root is not None:
        raise ValueError(f"{layout.name} is drawn and reads no files: leave out {root}")


def to_sample(asked: Asked) -> Sample:
    """Return one question, with its page as PNG bytes, and its answer."""
    return Sample(
        id=f"{asked.layout.name}/{asked.split}/{asked.page}/{asked.number}",
        messages=(
            Message("user", f"{IMAGE}\n{asked.question}"),
            Message("assistant", asked.answer),
        ),
        images=(draw(asked.layout, asked.split, asked.page),),
    )


PAGES = Layout(
    "written_page",
    side=1024,
    aspects=((1, 1), (1, 1), (2, 1), (1, 2), (4, 1), (1, 4)),
    heights=(10, 16, 24, 48),
    digits=4,
)

DATASET = data_set(PAGES)
