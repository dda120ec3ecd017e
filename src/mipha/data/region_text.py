"""Boxes and points as text, in the forms that models of the field write them, and back.

    thousand   [228, 320, 961, 970]                       0 to 1000 of the image (the default)
    unit3      [0.228, 0.320, 0.961, 0.970]               0 to 1, three decimals
    square2    [0.23, 0.38, 0.96, 0.81]                   0 to 1 of the padded square: LLaVA-1.5
    bbox_2d    [{"bbox_2d": [228, 320, 961, 970], ...}]   0 to 1000 in JSON: Qwen3-VL
    loc        <loc0327><loc0233><loc0992><loc0984>       y before x, 1,024 bins: PaliGemma
    molmo      <point x="59.5" y="64.5" ...>...</point>   points, 0 to 100: Molmo
    molmo2     <points coords="1 1 595 645">...</points>  points, 0 to 1000: Molmo2

Default numbers are of the original image, so they do not depend on resolution, tiles and padding;
three digits are off by at most 1/2000 of a side. A model is asked and scored in the form that it
was trained in, which its checkpoint holds.

Sources: LLaVA issues 606 and 822; Qwen3-VL README and qwen-vl-finetune/tools/process_bbox.ipynb;
the PaliGemma card's parser; molmo2 point_formatter.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

from mipha.data.faults import RecordError
from mipha.data.regions import Numbers, Region, Size, pad_to_square, to_pixels
from mipha.data.sample import REGION, Message, Sample
from mipha.recipe import RegionForm

DEFAULT: RegionForm = "thousand"
FORMS: tuple[RegionForm, ...] = get_args(RegionForm)

_RUN = re.compile(f"(?:{re.escape(REGION)})+")
_NUMBER = r"-?\d+(?:\.\d+)?"
_BRACKETS = re.compile(rf"\[\s*{_NUMBER}(?:\s*,\s*{_NUMBER}){{1,3}}\s*\]")
_LOC = re.compile(r"(?:<loc(\d{4})>){2,4}")
_COORDS = re.compile(r'<points?\s[^>]*?coords="([^"]*)"')
_POINTS = re.compile(r"<points?\s([^>]*)>")
_XY = re.compile(rf'\b([xy])(\d*)="\s*({_NUMBER})\s*"')


def write_sample(sample: Sample, form: str | None) -> Sample:
    """Return a sample whose texts hold its regions as text; any other as it is.

    Regions whose markers stand side by side are written together.

    Args:
        sample: Sample.
        form: One of `FORMS`; None for `DEFAULT`.

    Raises:
        RecordError: The form has no boxes, and the sample has one.
    """
    if not sample.regions:
        return sample
    messages = write_messages(sample.messages, sample.regions, form, sample.id)
    return replace(sample, messages=messages, regions=())


def write_messages(
    messages: Sequence[Message], regions: Sequence[Region], form: str | None, name: str = ""
) -> tuple[Message, ...]:
    """Return turns whose texts hold regions as text.

    Args:
        messages: Turns with a `REGION` marker for each region, in order; without any region such a
            marker is plain text.
        regions: Regions of all turns.
        form: One of `FORMS`; None for `DEFAULT`.
        name: Name of the sample, for messages; errors as in `write_sample`.
    """
    if not regions:
        return tuple(messages)
    left = list(regions)

    def write(run: re.Match[str]) -> str:
        number = len(run.group()) // len(REGION)
        group, left[:] = left[:number], left[number:]
        return write_regions(group, form or DEFAULT, name)

    return tuple(replace(message, text=_RUN.sub(write, message.text)) for message in messages)


def write_regions(regions: Sequence[Region], form: str, name: str = "") -> str:
    """Write regions of one kind as text; errors as in `write_sample`, which names the sample."""
    if form in ("molmo", "molmo2"):
        if any(len(region.numbers) == 4 for region in regions):
            raise RecordError(
                f"it has a box, and the form {form} writes points only",
                "choose another form for model.boxes",
                f"sample {name}",
            )
        return (_write_molmo if form == "molmo" else _write_molmo2)(regions)
    if form == "bbox_2d":
        return json.dumps([_as_json(region) for region in regions], ensure_ascii=False)
    if form == "loc":
        return " ; ".join(_write_loc(region) for region in regions)
    return ", ".join(f"[{', '.join(_write_numbers(region, form))}]" for region in regions)


def parse_regions(text: str, form: str, size: Size) -> list[Numbers]:
    """Return the boxes and points that a text holds: fractions of the image, in their order.

    Corners are as written: those of a box may be in the wrong order, and numbers may lie outside.

    Args:
        text: What a model said.
        form: The one form that is looked for.
        size: Of the upright image, which `square2` needs.
    """
    return _PARSERS[form](text, size)


def parse_leniently(text: str, form: str, size: Size) -> tuple[list[Numbers], str]:
    """Return regions in this form or else the first other one that finds any, and that form."""
    for other in (form, *(one for one in FORMS if one != form)):
        if found := parse_regions(text, other, size):
            return found, other
    return [], form


def _write_numbers(region: Region, form: str) -> list[str]:
    if form == "thousand":
        return [str(_thousand(number)) for number in region.numbers]
    if form == "unit3":
        return [f"{number:.3f}" for number in region.numbers]
    pixels = to_pixels(region.numbers, "unit", region.size)
    padded, (side, _) = pad_to_square(pixels, region.size)
    return [f"{number / side:.2f}" for number in padded]


def _as_json(region: Region) -> dict[str, object]:
    kind = "bbox_2d" if len(region.numbers) == 4 else "point_2d"
    named = {"label": region.label} if region.label else {}
    return {kind: [_thousand(number) for number in region.numbers], **named}


def _write_loc(region: Region) -> str:
    numbers = region.numbers
    turned = [numbers[place] for place in ((1, 0, 3, 2) if len(numbers) == 4 else (1, 0))]
    bins = "".join(f"<loc{min(int(number * 1024), 1023):04d}>" for number in turned)
    return f"{bins} {region.label}".rstrip()


def _write_molmo(regions: Sequence[Region]) -> str:
    label = regions[0].label
    shown = [tuple(f"{100 * number:.1f}" for number in region.numbers) for region in regions]
    if len(shown) == 1:
        ((x, y),) = shown
        return f'<point x="{x}" y="{y}" alt="{label}">{label}</point>'
    pairs = " ".join(f'x{n}="{x}" y{n}="{y}"' for n, (x, y) in enumerate(shown, start=1))
    return f'<points {pairs} alt="{label}">{label}</points>'


def _write_molmo2(regions: Sequence[Region]) -> str:
    images = sorted({region.image for region in regions})
    groups = []
    number = 0
    for image in images:
        words = [str(image + 1)]
        for x, y in sorted(r.numbers for r in regions if r.image == image):
            number += 1
            words += [str(number), f"{_thousand(x):03d}", f"{_thousand(y):03d}"]
        groups.append(" ".join(words))
    return f'<points coords="{";".join(groups)}">{regions[0].label}</points>'


def _thousand(number: float) -> int:
    return min(max(round(1000 * number), 0), 1000)


def _parse_brackets(text: str, size: Size, scale: str) -> list[Numbers]:
    found = []
    for match in _BRACKETS.finditer(text):
        numbers = tuple(map(float, re.findall(_NUMBER, match.group())))
        if len(numbers) in (2, 4):
            found.append(_to_unit(numbers, scale, size))
    return found


def _parse_thousand(text: str, size: Size) -> list[Numbers]:
    return _parse_brackets(text, size, "thousand")


def _parse_unit(text: str, size: Size) -> list[Numbers]:
    return _parse_brackets(text, size, "unit")


def _parse_square(text: str, size: Size) -> list[Numbers]:
    return _parse_brackets(text, size, "square")


def _parse_json(text: str, size: Size) -> list[Numbers]:
    """Return the boxes and points of whole objects, in a list or alone, words around them or not.

    So a list that a limit of tokens cuts off keeps the objects before the cut.
    """
    found = []
    for written in re.findall(r"\{[^{}]*\}", text):
        try:
            item = json.loads(written)
        except (ValueError, RecursionError):
            continue
        numbers = item.get("bbox_2d", item.get("point_2d"))
        if not isinstance(numbers, list) or len(numbers) not in (2, 4):
            continue
        # NaN, infinity and numbers beyond those of a computer are none.
        if all(isinstance(number, int | float) and abs(number) < 1e9 for number in numbers):
            found.append(_to_unit(tuple(map(float, numbers)), "thousand", size))
    return found


def _parse_loc(text: str, size: Size) -> list[Numbers]:
    found = []
    for match in _LOC.finditer(text):
        bins = [int(number) / 1024 for number in re.findall(r"\d{4}", match.group())]
        if len(bins) == 4:
            found.append((bins[1], bins[0], bins[3], bins[2]))
        elif len(bins) == 2:
            found.append((bins[1], bins[0]))
    return found


def _parse_molmo(text: str, size: Size) -> list[Numbers]:
    found = []
    for match in _POINTS.finditer(text):
        named: dict[str, dict[str, float]] = {}
        for axis, number, value in _XY.findall(match.group(1)):
            named.setdefault(number, {})[axis] = float(value) / 100
        found += [(one["x"], one["y"]) for one in named.values() if len(one) == 2]
    return found


def _parse_molmo2(text: str, size: Size) -> list[Numbers]:
    found = []
    for match in _COORDS.finditer(text):
        for group in match.group(1).split(";"):
            words = group.split()[1:]
            if len(words) % 3 == 0 and all(word.isdecimal() for word in words):
                pairs = zip(words[1::3], words[2::3], strict=True)
                found += [(float(x) / 1000, float(y) / 1000) for x, y in pairs]
    return found


def _to_unit(numbers: Numbers, scale: str, size: Size) -> Numbers:
    pixels = to_pixels(numbers, scale, size)
    return tuple(number / size[place % 2] for place, number in enumerate(pixels))


_PARSERS: dict[str, Callable[[str, Size], list[Numbers]]] = {
    "thousand": _parse_thousand,
    "unit3": _parse_unit,
    "square2": _parse_square,
    "bbox_2d": _parse_json,
    "loc": _parse_loc,
    "molmo": _parse_molmo,
    "molmo2": _parse_molmo2,
}
