"""One sample as the model sees it: turns, rendered template, tokens, loss mask, resized images.

record --> Sample --> Encoded --> pieces of text, trained or not --> terminal, HTML (check/html.py)
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from mipha.data.dataset import LoadedData
from mipha.data.faults import RecordError
from mipha.data.images import ImageSource, open_image
from mipha.data.region_text import write_sample
from mipha.data.regions import Region, pad_to_square, resize, to_pixels
from mipha.data.sample import Sample
from mipha.files import write_whole
from mipha.recipe import StageRecipe
from mipha.terminal import printable

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    from mipha.data.encode import Encoded

_STYLES = {
    "image": "#1f2933 on #bfe3f5",
    "trained": ("#1f2933 on #b7e4c7", "#1f2933 on #74c69d"),
    "given": ("", "dim"),
}

OUTLINE = "#ff0080"
_POINT = 2
"""Pixels to each side of a point that is drawn."""


class TokenPiece(NamedTuple):
    """A token, or the several that make one character, or all tokens of one image.

    Args:
        text: Its text; empty for an image.
        trained: Whether it is trained on.
        num_tokens: Tokens in it.
        is_image: Whether it is an image.
    """

    text: str
    trained: bool
    num_tokens: int
    is_image: bool = False


@dataclass(frozen=True)
class View:
    """One sample, looked at.

    Args:
        row: Place in the data set, from 0.
        where: The row as its file counts.
        sample: Its texts and images.
        image_notes: Name and size of each image, or why it cannot be read.
        rendered: The template with the texts in it, images as markers; None without a processor.
        pieces: All tokens in order; empty where the sample cannot be encoded.
        num_truncated: Tokens cut off by row_tokens.
        problem: Why the sample cannot be encoded.
        pixels: The images after preprocessing, as the tower gets them, turned back into colours;
            regions are drawn on them.
        regions: Boxes and points of the sample, which its texts hold as text.
    """

    row: int
    where: str
    sample: Sample
    image_notes: tuple[str, ...]
    rendered: str | None = None
    pieces: tuple[TokenPiece, ...] = ()
    num_truncated: int = 0
    problem: str | None = None
    pixels: tuple[Image.Image, ...] = ()
    regions: tuple[Region, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of tokens after image expansion."""
        return sum(piece.num_tokens for piece in self.pieces)

    @property
    def num_trained(self) -> int:
        """Number of trained tokens."""
        return sum(piece.num_tokens for piece in self.pieces if piece.trained)


def view_sample(
    data: LoadedData,
    row: int,
    stage: StageRecipe | None = None,
    processor: LlavaProcessor | None = None,
) -> View:
    """Look at one sample.

    Args:
        data: The data set, as `load_data` gives it.
        row: Place in the data set, from 0.
        stage: Stage of the recipe; with the processor, tokens and preprocessed images are shown
            too.
        processor: Processor of the recipe's model.

    Raises:
        ValueError: There is no such row.
        RecordError: The row is not a sample.
    """
    size = len(data)
    if not 0 <= row < size:
        raise ValueError(
            f"{data.name} has no row {row}: it has {size:,} rows, so give one from 0 to {size - 1}"
        )

    # Read its texts and images.
    record = data.records[row]
    given = data.to_sample(record)
    sample = write_sample(given, getattr(processor, "boxes", None))
    images, notes = [], []
    for stored in sample.images:
        name = data.image_name(stored)
        try:
            images.append(open_quietly(stored))
            notes.append(f"{name}, {images[-1].width} x {images[-1].height} pixels")
        except (ValueError, OSError) as error:
            notes.append(f"{name}: {error}")
    view = View(row, data.place(record), sample, tuple(notes), regions=given.regions)
    if processor is None or stage is None:
        return view

    from mipha.data.encode import as_chat, check_text, encode_for  # transformers takes seconds
    from mipha.rendering import write_chat

    # Render it with the template.
    is_padded = bool(getattr(processor.image_processor, "do_pad", False))
    pixels = [
        draw_regions(image, [r for r in given.regions if r.image == number], is_padded)
        for number, image in enumerate(_preprocessed(images, processor))
    ]
    view = replace(view, pixels=tuple(pixels))
    try:
        check_text(sample)
    except RecordError as error:
        return replace(view, problem=str(error))
    if stage.prompt == "chat" and not sample.is_document:
        chat = as_chat(sample.messages)
        view = replace(
            view,
            rendered=write_chat(
                processor.tokenizer, chat, processor.chat_template, "the chat template"
            ),
        )

    # Encode it as training does.
    try:
        encoded = encode_for(sample, processor, stage)
    except RecordError as error:
        return replace(view, problem=str(error))
    pieces = tuple(token_pieces(encoded, processor))
    rendered = view.rendered or "".join(
        "<image>" if piece.is_image else piece.text for piece in pieces
    )
    return replace(view, rendered=rendered, pieces=pieces, num_truncated=encoded.truncated)


def token_pieces(encoded: Encoded, processor: LlavaProcessor) -> Iterator[TokenPiece]:
    """Yield tokens as text, in order; those that only together make a character stay together."""
    from mipha.data.encode import IGNORE, image_spans

    ids, trained = encoded.input_ids, encoded.labels != IGNORE
    trained[:1] = False  # the first token of a row is predicted by nothing
    spans = image_spans(processor, encoded.images)
    runs = iter([run for span in spans for run in span.runs])
    start = 0
    while start < len(ids):
        end = start + 1
        if ids[start] == processor.image_token_id:
            end = start + next(runs)
            yield TokenPiece("", False, end - start, is_image=True)
        else:
            text = _decoded(ids[start:end], processor)
            while (
                text.endswith("\ufffd")
                and end < min(len(ids), start + 4)
                and trained[end] == trained[start]
            ):
                end += 1
                text = _decoded(ids[start:end], processor)
            yield TokenPiece(text, bool(trained[start]), end - start)
        start = end


def draw_regions(
    image: Image.Image,
    regions: Sequence[Region],
    is_padded: bool = False,
    outline: str = OUTLINE,
) -> Image.Image:
    """Return an image with its boxes and points drawn on it.

    Args:
        image: Image of any size.
        regions: Regions of the original.
        is_padded: Whether the original was padded to a square before it was resized.
        outline: Colour of the lines.
    """
    if not regions:
        return image
    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    for region in regions:
        pixels, size = to_pixels(region.numbers, "unit", region.size), region.size
        if is_padded:
            pixels, size = pad_to_square(pixels, size)
        numbers, _ = resize(pixels, size, image.size)
        if len(numbers) == 2:
            x, y = numbers
            numbers = (x - _POINT, y - _POINT, x + _POINT, y + _POINT)
        inside = [min(n, image.size[place % 2] - 1) for place, n in enumerate(numbers)]
        pen.rectangle(inside, outline=outline)
    return drawn


def open_quietly(source: ImageSource) -> Image.Image:
    """Open an image without Pillow's warnings on size and metadata; the linter judges both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_image(source)


def visible(text: str) -> str:
    """Return text for a screen: control characters as symbols, an end of line shown and kept."""
    return printable(text).replace("\t", "␉").replace("\n", "↵\n")


def render(view: View) -> RenderableType:
    """Render the sample for a terminal; trained tokens are green, in alternating shades."""
    lines: list[RenderableType] = [Rule(f"row {view.row}  {view.where}", align="left")]
    lines += [
        Text(f"image {number}: {note}") for number, note in enumerate(view.image_notes, start=1)
    ]
    lines += [Text(remark.about, "yellow") for remark in view.sample.remarks]

    if view.rendered is None:
        lines += [
            Text.assemble((f"{message.role}: ", "bold"), visible(message.text))
            for message in view.sample.messages
        ]
        return Group(
            *lines,
            Text(view.problem, "bold red")
            if view.problem
            else Text(
                "give a recipe (--recipe NAME) to see its tokens, what is trained on, "
                "and its images resized",
                "dim",
            ),
        )

    lines += [Rule("rendered template", align="left", style="dim"), Text(visible(view.rendered))]
    if view.problem:
        return Group(*lines, Text(view.problem, "bold red"))

    title = f"{view.num_tokens:,} tokens, {view.num_trained:,} of them trained on"
    title += (
        f"; {view.num_truncated:,} more are cut off by row_tokens" if view.num_truncated else ""
    )
    lines += [Rule(title, align="left", style="dim"), _coloured(view.pieces)]
    return Group(
        *lines,
        Text.assemble(
            ("trained on", _STYLES["trained"][0]), "  given  ", ("an image", _STYLES["image"])
        ),
    )


def save_pixels(view: View, folder: Path) -> list[Path]:
    """Write the preprocessed images as PNG files, `row-17-image-1.png` and so on."""
    paths = []
    for number, image in enumerate(view.pixels, start=1):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        paths.append(folder / f"row-{view.row}-image-{number}.png")
        write_whole(paths[-1], buffer.getvalue())
    return paths


def _coloured(pieces: tuple[TokenPiece, ...]) -> Text:
    text = Text()
    for number, piece in enumerate(pieces):
        if piece.is_image:
            text.append(f"[image: {piece.num_tokens} tokens]", _STYLES["image"])
        else:
            text.append(
                visible(piece.text), _STYLES["trained" if piece.trained else "given"][number % 2]
            )
    return text


def _decoded(ids: np.ndarray, processor: LlavaProcessor) -> str:
    return processor.tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _preprocessed(images: list[Image.Image], processor: LlavaProcessor) -> Iterator[Image.Image]:
    """Yield the images as the tower gets them, with mean and deviation taken back."""
    from mipha.data.pixels import as_tiles, read_pixels  # torch takes seconds

    if not images:
        return
    settings = processor.image_processor
    mean, std = (
        np.reshape(values, (3, 1, 1)) for values in (settings.image_mean, settings.image_std)
    )
    inputs = read_pixels(images, processor, [len(images)] * len(images))
    for values in as_tiles(inputs):
        colours = np.clip(np.asarray(values) * std + mean, 0, 1) * 255
        yield Image.fromarray(colours.round().astype(np.uint8).transpose(1, 2, 0))
