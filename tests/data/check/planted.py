"""A corpus with planted defects and its clean copy, made from a seed: what the linter must find, at
which row, and what it must not invent.

Rows come in fours: 0 a plain row that others refer to, 1 a plain row or a defect, 2 several turns,
3 text alone or two images.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = (
    "red",
    "blue",
    "green",
    "grey",
    "dark red",
    "light blue",
    "yellow",
    "white",
    "black",
    "orange",
)
THINGS = (
    "kettle",
    "chair",
    "bicycle",
    "lamp",
    "window",
    "spoon",
    "ladder",
    "violin",
    "candle",
    "boot",
    "map",
    "anchor",
)
PROSE = (
    "The room is long and low, and most of what stands in it was carried up the stairs by two "
    "people who no longer live here. A clock without hands leans on the shelf; beside it somebody "
    "left an atlas, three keys, one glove, and a jar of buttons sorted by size. "
)
Row = dict[str, Any]


@dataclass
class Spot:
    """Where a defect is planted.

    Args:
        folder: Of the data file.
        row: Place in the file, from 0.
        record: The row, to be changed in place.
        before: The plain row that stands just before it.
        random: Its own random numbers.
    """

    folder: Path
    row: int
    record: Row
    before: Row
    random: np.random.Generator
    line: str | None = None
    evaluation: list[Row] = field(default_factory=list)

    def path(self, suffix: str) -> Path:
        """A new image file of this row alone; the row shows it."""
        self.record["images"] = [f"images/planted-{self.row:06}{suffix}"]
        return self.folder / self.record["images"][0]

    def picture(self, width: int = 48, height: int = 40) -> Image.Image:
        """A picture like no other."""
        return picture(self.random, width, height)

    def ask(self, text: str) -> None:
        """Another question, the marker kept."""
        self.record["messages"][0]["content"] = f"<image>\n{text}"

    def answer(self, text: str) -> None:
        """Another answer."""
        self.record["messages"][-1]["content"] = text


@dataclass(frozen=True)
class Defect:
    """One kind of planted defect.

    Args:
        kinds: What must be found at its row, and nothing else.
        plant: Puts it there.
        with_tokens: What must be found in addition where tokens are checked.
    """

    kinds: frozenset[str]
    plant: Callable[[Spot], object]
    with_tokens: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Corpus:
    """What was made.

    Args:
        clean: The file without a defect.
        planted: The file with them.
        evaluation: The set that some of them leak from.
        where: Row to the name of its defect.
    """

    clean: Path
    planted: Path
    evaluation: Path
    where: dict[int, str]

    def expected(self, with_tokens: bool, with_evaluation: bool) -> set[tuple[int, str]]:
        """Every (row, kind) that must be found."""
        found = set()
        for row, name in self.where.items():
            defect = DEFECTS[name]
            kinds = defect.kinds | (defect.with_tokens if with_tokens else frozenset())
            found |= {
                (row, kind) for kind in kinds if with_evaluation or not kind.startswith("leak")
            }
        return found


def picture(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Soft random colours: like no other, and as quick to decode as a photograph."""
    return Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def plant(folder: Path, num_rows: int, copies: int = 1, side: int = 48, seed: int = 0) -> Corpus:
    """Write the corpus.

    Args:
        folder: New or empty.
        num_rows: Of each file; at least four for every planted defect.
        copies: How often each defect is planted.
        side: Of the pictures, in pixels.
        seed: The same seed, the same corpus.
    """
    wanted = [name for _ in range(copies) for name in DEFECTS]
    assert num_rows >= 4 * len(wanted), (
        f"{len(wanted)} defects want {4 * len(wanted)} rows, not {num_rows}"
    )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(num_rows):
        if number % 4 != 3:
            picture(random, side, side * 4 // 5).save(folder / _image(number))
    rows = [_row(number) for number in range(num_rows)]
    stride = num_rows // len(wanted) // 4 * 4
    lines = [_line(row) for row in rows]
    clean = folder / "clean.jsonl"
    clean.write_text("\n".join(lines) + "\n", encoding="utf-8")
    evaluation = [
        {
            "messages": _talk("<image>\nWhat hangs on this wall?", "A mirror."),
            "images": ["images/evaluation.png"],
        }
    ]
    picture(random, side, side).save(folder / "images/evaluation.png")
    where = {}
    for index, name in enumerate(wanted):
        row = index * stride + 1
        where[row] = name
        spot = Spot(
            folder, row, copy.deepcopy(rows[row]), rows[row - 1], np.random.default_rng([seed, row])
        )
        DEFECTS[name].plant(spot)
        lines[row] = spot.line or _line(spot.record)
        evaluation += spot.evaluation
    planted = folder / "planted.jsonl"
    planted.write_text("\n".join(lines) + "\n", encoding="utf-8")
    held_out = folder / "evaluation.jsonl"
    held_out.write_text("\n".join(map(_line, evaluation)) + "\n", encoding="utf-8")
    return Corpus(clean, planted, held_out, where)


def _image(number: int) -> str:
    return f"images/{number:06}.{('jpg', 'png', 'webp')[number % 3]}"


def _line(record: Row) -> str:
    return json.dumps(record, ensure_ascii=True)


def _talk(*texts: str) -> list[Row]:
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


def _row(number: int) -> Row:
    colour, thing = COLOURS[number % 7 % len(COLOURS)], THINGS[number % len(THINGS)]
    question, answer = f"What is thing number {number} in the picture?", f"A {colour} {thing}."
    if number % 4 < 2:
        return {"messages": _talk(f"<image>\n{question}", answer), "images": [_image(number)]}
    if number % 4 == 2:
        turns = _talk(
            f"<image>\n{question}",
            answer,
            "Is it old — or “as good as new”?",
            f"It has been used {number} times, à peu près.",
        )
        return {
            "messages": [{"role": "system", "content": "Be brief."}, *turns],
            "images": [_image(number)],
        }
    if number % 8 == 3:
        return {
            "messages": _talk(
                f"What does a {thing} cost in year {number}?",
                f"About {number * 7} crowns: «так», 約, ~5 < 6 & 7 > 3 — C#.",
            )
        }
    return {
        "messages": _talk(f"<image>\n<image>\n{question}", answer),
        "images": [_image(number - 1), _image(number - 5)],
    }


def _cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _png_damaged(spot: Spot) -> None:
    path = spot.path(".png")
    spot.picture().save(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(value ^ 0xFF for value in content[middle : middle + 8])
    path.write_bytes(bytes(content))


def _exif(spot: Spot) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    spot.picture().save(spot.path(".jpg"), exif=exif)


def _other_case(spot: Spot) -> None:
    path = spot.path(".jpg")
    spot.picture().save(path.with_name(path.name.upper()), format="JPEG")


def _two_images(spot: Spot, text: str) -> None:
    spot.record["images"] = spot.record["images"] + spot.before["images"]
    spot.record["messages"][0]["content"] = text


def _truncated(spot: Spot, suffix: str) -> None:
    path = spot.path(suffix)
    spot.picture(160, 120).save(path)
    _cut(path, 0.6)


def _leak(spot: Spot, question: str) -> None:
    spot.picture().save(spot.path(".jpg"))
    spot.evaluation.append(
        {
            "messages": _talk(f"<image>\n{question}\nAnswer with one word.", "x"),
            "images": ["images/" + f"held-out-{spot.row}.png"],
        }
    )
    image = Image.open(spot.folder / spot.record["images"][0]).convert("RGB")
    image.save(
        spot.folder / "images" / f"held-out-{spot.row}.png"
    )  # another name and format, the same pixels


def _conflict(spot: Spot) -> None:
    spot.record.update(copy.deepcopy(spot.before))
    spot.answer("No, a piano.")


def _sixteen_bit(spot: Spot) -> None:
    values = np.asarray(spot.picture().convert("L")).astype(np.uint16) * 257
    Image.fromarray(values).save(spot.path(".png"))


def _own_question(spot: Spot) -> str:
    return re.sub("<image>\n", "", spot.record["messages"][0]["content"])


def _defect(kinds: str, plant_it: Callable[[Spot], object], with_tokens: str = "") -> Defect:
    return Defect(frozenset(kinds.split()), plant_it, frozenset(with_tokens.split()))


DEFECTS: dict[str, Defect] = {
    # the record
    "broken JSON": _defect("malformed", lambda s: setattr(s, "line", _line(s.record)[:-9])),
    "no messages": _defect("malformed", lambda s: s.record.pop("messages")),
    "null content": _defect("malformed", lambda s: s.answer(None)),  # type: ignore[arg-type]
    "unknown role": _defect("malformed", lambda s: s.record["messages"][1].update(role="tool")),
    "assistant first": _defect("role-order", lambda s: s.record["messages"].reverse()),
    "two questions": _defect(
        "role-order",
        lambda s: s.record["messages"].insert(1, {"role": "user", "content": "And why?"}),
    ),
    "system in the middle": _defect(
        "role-order",
        lambda s: s.record["messages"].insert(1, {"role": "system", "content": "Be brief."}),
    ),
    "unanswered": _defect(
        "role-order", lambda s: s.record["messages"].append({"role": "user", "content": "And why?"})
    ),
    "no turns": _defect("role-order", lambda s: s.record.update(messages=[], images=[])),
    "marker too many": _defect("image-count", lambda s: s.ask("<image>\n" + _own_question(s))),
    "marker too few": _defect(
        "image-count", lambda s: _two_images(s, "<image>\nWhich of them is older?")
    ),
    "marker without image": _defect("image-count", lambda s: s.record.update(images=[])),
    "marker in the answer": _defect(
        "image-in-answer",
        lambda s: s.record.update(messages=_talk(_own_question(s), "Here it is: <image>")),
    ),
    "path leads out": _defect(
        "outside-path", lambda s: s.record.update(images=["../../etc/passwd.png"])
    ),
    "web address": _defect(
        "missing-image", lambda s: s.record.update(images=["https://example.org/cat.jpg"])
    ),
    "missing file": _defect("missing-image", lambda s: s.path(".png")),
    "name in other case": _defect("missing-image", _other_case),
    # its images
    "empty file": _defect("unreadable-image", lambda s: s.path(".png").touch()),
    "web page": _defect(
        "unreadable-image",
        lambda s: s.path(".jpg").write_text("<!doctype html><h1>404 Not Found</h1>"),
    ),
    "JPEG cut short": _defect("truncated-image", lambda s: _truncated(s, ".jpg")),
    "PNG cut short": _defect("truncated-image", lambda s: _truncated(s, ".png")),
    "WebP cut short": _defect("truncated-image", lambda s: _truncated(s, ".webp")),
    "PNG damaged": _defect("truncated-image", _png_damaged),
    "too many pixels": _defect(
        "oversized-image", lambda s: Image.new("1", (10_000, 9_000)).save(s.path(".png"))
    ),
    "tiny": _defect("tiny-image", lambda s: s.picture(8, 8).save(s.path(".png"))),
    "a strip": _defect("extreme-aspect", lambda s: s.picture(400, 20).save(s.path(".png"))),
    "flat colour": _defect(
        "blank-image",
        lambda s: Image.new("RGB", (60 + s.row % 97, 50 + s.row // 97), "white").save(
            s.path(".png")
        ),
    ),
    "transparent": _defect(
        "blank-image",
        lambda s: Image.new("RGBA", (60 + s.row % 97, 350 + s.row // 97), (9, 9, 9, 0)).save(
            s.path(".png")
        ),
    ),
    "EXIF rotation": _defect("exif-rotation", _exif),
    "animation": _defect(
        "animated-image",
        lambda s: s.picture().save(s.path(".gif"), save_all=True, append_images=[s.picture()]),
    ),
    "CMYK": _defect("converted-image", lambda s: s.picture().convert("CMYK").save(s.path(".jpg"))),
    "16 bits": _defect("converted-image", _sixteen_bit),
    "PNG named .jpg": _defect(
        "wrong-suffix", lambda s: s.picture().save(s.path(".jpg"), format="PNG")
    ),
    "copy under another name": _defect(
        "repeated-image",
        lambda s: s.path(Path(s.before["images"][0]).suffix).write_bytes(
            (s.folder / s.before["images"][0]).read_bytes()
        ),
    ),
    # its words
    "empty answer": _defect("empty-answer", lambda s: s.answer(" \n")),
    "one answer of two empty": _defect(
        "empty-answer", lambda s: s.record["messages"].extend(_talk("And why?", ""))
    ),
    "empty question": _defect(
        "empty-question", lambda s: s.record["messages"].extend(_talk(" ", "It is on the left."))
    ),
    "very long answer": _defect(
        "long-answer",
        lambda s: s.answer(
            " ".join(f"Line {i * 37 % 1009}: {THINGS[i % 12]} {i}." for i in range(600))
        ),
        "truncated-answer",
    ),
    "nan": _defect("placeholder-answer", lambda s: s.answer("NaN")),
    "echo": _defect("echo", lambda s: s.answer(_own_question(s))),
    "in circles": _defect("repetition", lambda s: s.answer("and then it goes on " * 20)),
    "refusal": _defect(
        "refusal",
        lambda s: s.answer("As an AI language model, no comment on this picture is possible."),
    ),
    "two turns in one text": _defect(
        "turn-in-text", lambda s: s.answer("A boat.\nUSER: And why?\nASSISTANT: Because.")
    ),
    "control token": _defect("special-token", lambda s: s.answer("A boat.<|im_end|> And more.")),
    "another program's marker": _defect(
        "foreign-marker", lambda s: s.ask("<img> What is it, thing " + str(s.row))
    ),
    "half a character": _defect("lone-surrogate", lambda s: s.answer("It smiles \ud83d.")),
    "lost character": _defect(
        "replacement-character", lambda s: s.answer("A caf\ufffd on the corner.")
    ),
    "mojibake": _defect("mojibake", lambda s: s.answer("A cafÃ© on the corner, itâ€™s closed.")),
    "Cyrillic mojibake": _defect("mojibake", lambda s: s.answer("Ð§Ð°Ð¹Ð½Ð¸Ðº")),
    "control character": _defect("control-characters", lambda s: s.answer("A boat\x07\x1b[31m.")),
    "zero width": _defect("invisible-characters", lambda s: s.answer("A bo\u200bat.")),
    "HTML": _defect("markup", lambda s: s.answer("A boat<br/>and a <b>bridge</b> &amp; more.")),
    # its tokens
    "answer cut off whole": _defect("", lambda s: s.ask(PROSE * 60), "nothing-trained"),
    "answer cut off in part": _defect(
        "",
        lambda s: s.answer(
            " ".join(f"{THINGS[i * 5 % 12]} {i * 7919 % 10007}" for i in range(600))
        ),
        "truncated-answer",
    ),
    "images fill the row": _defect(
        "",
        lambda s: s.record.update(
            images=s.record["images"] * 600, messages=_talk("<image>" * 600, "Many.")
        ),
        "too-many-images",
    ),
    # the whole set
    "duplicate": _defect("duplicate", lambda s: s.record.update(copy.deepcopy(s.before))),
    "two answers": _defect("conflicting-answer", _conflict),
    "leak": _defect("leak", lambda s: _leak(s, _own_question(s).upper())),
    "leaked image": _defect("leaked-image", lambda s: _leak(s, "How many corners has it?")),
}
