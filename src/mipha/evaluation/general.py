"""A small fixed set of general questions, to see what a model unlearns when it is tuned.

Drawings are made by code and texts are written here, so nobody's data hold them. The set is too
small and too easy to rank models: it compares one model with itself, before and after.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

_SIDE = 224
_COLOURS = {
    "red": (214, 40, 40),
    "green": (34, 139, 34),
    "blue": (30, 80, 200),
    "yellow": (250, 210, 30),
    "black": (10, 10, 10),
}
_NUMBERS = ("one", "two", "three", "four")

_TEXTS = (
    ("What is the capital of France?", ("paris",)),
    ("How many legs does a spider have?", ("8", "eight")),
    ("What is two plus three? Answer with a number.", ("5", "five")),
    ("Which is larger, an elephant or a mouse?", ("elephant",)),
    ("What do bees make?", ("honey",)),
    ("Name the planet that we live on.", ("earth",)),
    ("What colour is the sky on a clear day?", ("blue",)),
    ("What is frozen water called?", ("ice",)),
    ("How many days are in a week?", ("7", "seven")),
    ("What is the opposite of hot?", ("cold", "cool")),
    ("In which direction does the sun rise?", ("east",)),
    ("What animal says meow?", ("cat", "kitten")),
)
"""Questions without an image, and words of which a right answer holds one."""


@dataclass(frozen=True)
class GeneralQuestion:
    """A question, and how its answer is recognised.

    Args:
        id: Name of the question.
        text: Question.
        accepted: Words of which a right answer holds one.
        excluded: Words that a right answer does not hold: the other choices.
        image: Drawing that it is about; None for a question without one.
    """

    id: str
    text: str
    accepted: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    image: Image.Image | None = None

    def is_right(self, answer: str) -> bool:
        """Return whether an answer holds an accepted word, and none of the other choices."""
        words = set(re.findall(r"[a-z0-9]+", answer.lower()))
        return bool(words & set(self.accepted)) and not words & set(self.excluded)


def general_questions() -> list[GeneralQuestion]:
    """Return the set: questions about drawings, then questions without an image."""
    texts = (
        GeneralQuestion(f"text-{number}", text, accepted)
        for number, (text, accepted) in enumerate(_TEXTS)
    )
    return [*_drawn(), *texts]


def _drawn() -> Iterator[GeneralQuestion]:
    """Yield questions about shapes, colours, numbers and places in drawings."""
    for number, (colour, value) in enumerate(_COLOURS.items()):
        shape = ("circle", "square", "triangle")[number % 3]
        image = _canvas()
        _draw(image, shape, value, (_SIDE // 2, _SIDE // 2), 70)
        yield GeneralQuestion(
            f"colour-{colour}", "What colour is the shape in the picture?", (colour,), image=image
        )
        yield GeneralQuestion(
            f"shape-{colour}",
            "Which shape is in the picture, a circle, a square or a triangle?",
            (shape,),
            tuple({"circle", "square", "triangle"} - {shape}),
            image,
        )

    for count in range(1, len(_NUMBERS) + 1):
        image = _canvas()
        for place in range(count):
            _draw(
                image, "circle", _COLOURS["blue"], (_SIDE * (2 * place + 1) // (2 * count), 112), 20
            )
        yield GeneralQuestion(
            f"count-{count}",
            "How many circles are in the picture?",
            (str(count), _NUMBERS[count - 1]),
            image=image,
        )

    for side, centre in (("left", (60, 112)), ("right", (164, 112))):
        image = _canvas()
        _draw(image, "square", _COLOURS["red"], centre, 35)
        yield GeneralQuestion(
            f"place-{side}",
            "Is the square on the left or on the right of the picture?",
            (side,),
            ("right" if side == "left" else "left",),
            image,
        )


def _canvas() -> Image.Image:
    return Image.new("RGB", (_SIDE, _SIDE), "white")


def _draw(
    image: Image.Image, shape: str, colour: tuple[int, int, int], centre: tuple[int, int], half: int
) -> None:
    """Draw a filled shape; lengths in pixels."""
    x, y = centre
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "square":
        pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    else:
        pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour)
