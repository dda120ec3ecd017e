"""Example rows on the linter's page: images, words, and every token with the trained ones in colour."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Iterator

from mipha.data.check.findings import KINDS, Finding
from mipha.data.check.report import by_kind
from mipha.data.check.result import CheckResult
from mipha.data.images import ImageSource
from mipha.data.show import Piece, View, open_quietly, view_sample, visible

_ROWS_A_KIND = 2
_MOST_CARDS = 60
_SOUND_CARDS = 6
_MOST_PIECES = 1_200
_THUMBNAIL = 256
"""Pixels: the longer side of a picture in the page."""


def example_rows(result: CheckResult) -> list[int]:
    """Rows shown in full: the first of every kind of finding, and some without any, spread over the set."""
    chosen = [
        finding.row
        for found in by_kind(result).values()
        for finding in found[:_ROWS_A_KIND]
        if finding.row is not None
    ]
    chosen = list(dict.fromkeys(chosen))[:_MOST_CARDS]
    faulty = {finding.row for finding in result.findings}
    size = result.num_rows
    spread = range(0, size, max(1, size // (4 * _SOUND_CARDS)))
    return (
        chosen
        + [row for row in spread if row not in faulty][:: 4 if size >= 4 * _SOUND_CARDS else 1][
            :_SOUND_CARDS
        ]
    )


def example_cards(result: CheckResult) -> Iterator[str]:
    """Each of the example rows with its findings, images and words; with a recipe, token by token."""
    rows = example_rows(result)
    found: dict[int, list[Finding]] = {row: [] for row in rows}
    for finding in result.findings:
        if finding.row in found:
            found[finding.row].append(finding)
    stage = result.training.stage if result.training else None
    for row in rows:
        badges = "".join(
            f'<span class="badge {finding.severity}">{escaped(KINDS[finding.kind].title)}</span>'
            for finding in found[row]
        )
        said = "".join(
            f'<p class="{finding.severity}">{escaped(finding.sentence)}</p>'
            for finding in found[row]
        )
        view = None
        try:
            view = view_sample(result.source, row, stage, result.processor)
            body = _images(view.sample.images) + _words(view)
        except (
            ValueError,
            OSError,
        ):  # said above already: what there is to see of such a row is the record
            body = _record(result, row)
        where = view.where if view else next((finding.where for finding in found[row]), "")
        yield f'<div class="card"><h3>row {row} <span class="grey">{escaped(where)}</span></h3>{badges}{said}{body}</div>'


def _record(result: CheckResult, row: int) -> str:
    try:
        content = getattr(result.source.records[row], "content", result.source.records[row])
    except (ValueError, OSError) as error:
        return f'<div class="text">{escaped(visible(result.source.shortened(str(error))))}</div>'
    return f'<div class="text">{escaped(json.dumps(content, default=str, indent=1)[:2_000])}</div>'


def _words(view: View) -> str:
    if view.rendered is None:
        turns = "".join(
            f"<b>{message.role}</b>\n{escaped(visible(message.text[:8_000]))}\n"
            for message in view.sample.messages
        )
        return f'<div class="text">{turns}</div>'
    if view.problem:
        return f'<div class="text">{escaped(visible(view.rendered[:8_000]))}</div>'
    cut = f"; {view.num_truncated:,} more are cut off" if view.num_truncated else ""
    title = f'<p class="grey">{view.num_tokens:,} tokens, {view.num_trained:,} trained on{cut}</p>'
    return f'{title}<div class="text">{"".join(_pieces(view.pieces))}</div>'


def _pieces(pieces: Iterable[Piece]) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        if number == _MOST_PIECES:
            yield "<u> … and so on</u>"
            return
        text = (
            f"image: {piece.num_tokens} tokens" if piece.is_image else escaped(visible(piece.text))
        )
        if piece.is_image or piece.trained:
            yield f'<span class="{"i" if piece.is_image else "ab"[number % 2]}">{text}</span>'
        else:
            yield f"<u>{text}</u>"


def _images(images: Iterable[ImageSource]) -> str:
    return "".join(map(_thumbnail, list(images)[:4]))


def _thumbnail(source: ImageSource) -> str:
    try:
        image = open_quietly(source)
    except (ValueError, OSError):
        return '<p class="error">(no picture to show)</p>'
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{image.width}" height="{image.height}" alt="" src="data:image/jpeg;base64,{content}">'


def escaped(text: str) -> str:
    """Text of the data for the page, whatever it holds."""
    return html.escape(text.encode("utf-8", "backslashreplace").decode())
