"""The linter's findings as one page that needs nothing beside it.

It holds the findings, histograms, and example rows with every token, the trained ones in colour.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from string import Template

from mipha.data.check.findings import KINDS, SEVERITIES, Finding, Severity
from mipha.data.check.linter import NO_RECIPE, CheckResult, Histogram
from mipha.data.check.report import answer_lines, by_kind, headline, training_lines, verdict
from mipha.data.images import ImageSource
from mipha.data.regions import Region
from mipha.data.show import (
    OUTLINE,
    TokenPiece,
    View,
    draw_regions,
    open_quietly,
    view_sample,
    visible,
)

_MOST_ROWS = 50
_ROWS_A_KIND = 2
_MOST_CARDS = 60
_SOUND_CARDS = 6
_MOST_PIECES = 1_200
_THUMBNAIL = 256
"""Pixels: the longer side of an image in the page."""

STYLE = """
:root { --ink: #1f2933; --grey: #616e7c; --faint: #e4e7eb; --paper: #ffffff; --back: #f5f7fa;
  --error: #b83232; --warning: #9a6700; --note: #2563a8; --a: #b7e4c7; --b: #74c69d;
  --image: #bfe3f5; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
p { margin: 6px 0; } .grey { color: var(--grey); }
.counts { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; }
.counts b { display: block; font-size: 26px; line-height: 1.2; }
.counts div, details, .card, .plot, table.facts { background: var(--paper);
  border: 1px solid var(--faint); border-radius: 8px; }
.counts div { padding: 8px 16px; min-width: 110px; }
.error { color: var(--error); } .warning { color: var(--warning); } .note { color: var(--note); }
.fine { color: #2a7f4f; }
details { margin: 8px 0; } summary { cursor: pointer; padding: 8px 14px; }
details > div { padding: 0 14px 12px; overflow-x: auto; }
.badge { display: inline-block; border: 1px solid currentColor; border-radius: 9px;
  padding: 0 8px; font-size: 12px; margin-right: 6px; }
.number { float: right; color: var(--grey); }
table { border-collapse: collapse; }
td, th { text-align: left; vertical-align: top; padding: 3px 16px 3px 0; overflow-wrap: anywhere; }
th { color: var(--grey); font-weight: normal; }
td:first-child, .rows td:nth-child(2) { white-space: nowrap; }
table.facts { border-collapse: separate; padding: 8px 14px; width: 100%; }
table.facts td:first-child { color: var(--grey); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));
  gap: 12px; }
.plot { padding: 12px 14px; } .plot svg { width: 100%; height: auto; display: block; }
.plot h3 { margin: 0; font-size: 14px; }
.bar { display: flex; gap: 8px; margin: 3px 0; font-size: 13px; }
.bar span:first-child { flex: 0 0 45%; overflow-wrap: anywhere; }
.bar i { display: block; background: var(--note); opacity: 0.75; height: 12px; margin-top: 4px;
  border-radius: 2px; }
.bar div { flex: 1; }
.cards { columns: 2; column-gap: 12px; }
.card { padding: 12px 14px; margin: 0 0 12px; break-inside: avoid; }
.card h3 { margin: 0 0 6px; font-size: 14px; overflow-wrap: anywhere; }
.card img { max-width: 100%; height: auto; border: 1px solid var(--faint); margin: 4px 8px 4px 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.6 ui-monospace, "DejaVu Sans Mono", monospace;
  max-height: 340px; overflow-y: auto; background: var(--back); padding: 8px; border-radius: 6px;
  margin: 6px 0; }
.text u { text-decoration: none; color: var(--grey); }
.a { background: var(--a); } .b { background: var(--b); } .i { background: var(--image); }
.legend span { padding: 0 6px; border-radius: 3px; margin-right: 8px; }
@media (max-width: 720px) {
  .cards { columns: 1; } .facts td:first-child { white-space: normal; }
  .rows, .rows tbody { display: block; } .rows th { display: none; } .rows td { padding: 0; }
  .rows tr { display: grid; grid-template-columns: 64px 1fr; margin-bottom: 6px; }
  .rows td:nth-child(2) { color: var(--grey); white-space: normal; }
  .rows td:nth-child(3) { grid-column: 2; }
}
"""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name: $verdict</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$name</h1>
<p class="grey">$headline</p>
<div class="counts">$counts</div>
$notes
<h2>Findings</h2>
$findings
<h2>Lengths and sizes</h2>
<div class="plots">$plots</div>
$facts
<h2>Examples</h2>
<p class="legend">$legend</p>
<div class="cards">$cards</div>
</main>
</body>
</html>
""")


def html_report(result: CheckResult) -> str:
    """Write the page; all text of the data is escaped, images are small copies inside it."""
    has_tokens = result.processor is not None
    notes = [
        result.data.shorten(result.data.format or ""),
        f"Compared with {result.against}." if result.against else "",
        "" if result.training else NO_RECIPE,
    ]
    legend = (
        '<span class="a">trained on</span><span class="b">the next token</span>'
        '<span class="i">an image</span>the rest is given'
    )
    return _PAGE.substitute(
        name=escaped(result.data.name),
        verdict=escaped(verdict(result)),
        style=STYLE,
        headline=escaped(headline(result)),
        counts="".join(_count(result, severity) for severity in SEVERITIES),
        notes="".join(f"<p>{escaped(note)}</p>" for note in notes if note),
        findings="".join(
            _kind(kind, found, not place)
            for place, (kind, found) in enumerate(by_kind(result).items())
        )
        or '<p class="fine">Nothing was found.</p>',
        plots="".join(_plot(histogram) for histogram in result.histograms) + _answers(result),
        facts=_facts(result),
        legend=legend
        if has_tokens
        else "Words as they stand; which tokens are trained on depends on the recipe.",
        cards="".join(example_cards(result)),
    )


def _count(result: CheckResult, severity: Severity) -> str:
    number = result.count(severity)
    return f'<div><b class="{severity if number else "fine"}">{number:,}</b>{severity}s</div>'


def _kind(kind: str, found: Sequence[Finding], is_open: bool) -> str:
    about = KINDS[kind]
    rows = "".join(map(_row, found[:_MOST_ROWS]))
    more = (
        f'<p class="grey">The first {_MOST_ROWS} of {len(found):,}; the JSON report has all.</p>'
        if len(found) > _MOST_ROWS
        else ""
    )
    return (
        f'<details{" open" if is_open else ""}><summary><span class="number">{len(found):,}</span>'
        f'<span class="badge {about.severity}">{about.severity}</span>'
        f"{escaped(about.title)}</summary>"
        f"<div><p>What to do: {escaped(about.fix)}.</p>"
        '<table class="rows"><tr><th>row</th><th>where</th><th>what</th></tr>'
        f"{rows}</table>{more}</div></details>"
    )


def _row(finding: Finding) -> str:
    row = "the set" if finding.row is None else finding.row
    what = finding.sentence if finding.own_fix else finding.what
    return f"<tr><td>{row}</td><td>{escaped(finding.where)}</td><td>{escaped(what)}</td></tr>"


def _plot(histogram: Histogram) -> str:
    """Draw bars as SVG; a dashed line marks the median."""
    width, height, most, unit = 320, 110, max(histogram.counts), histogram.unit
    step = width / len(histogram.counts)
    low, high = histogram.edges[0], histogram.edges[-1]
    bars = []
    for number, count in enumerate(histogram.counts):
        left, right = histogram.edges[number], histogram.edges[number + 1] - 1
        span = f"{left:,.0f}" + (f" to {right:,.0f}" if right > left else "")
        tall, place = (
            height * count / most,
            f'x="{number * step + 0.5:.1f}" width="{max(step - 1, 0.5):.1f}"',
        )
        bars.append(
            f'<rect {place} y="{height - tall:.1f}" height="{tall:.1f}" fill="#2563a8">'
            f"<title>{span} {unit}: {count:,}</title></rect>"
        )
    name = escaped(histogram.name)
    median = width * (histogram.median + 0.5 - low) / (high - low)
    spread = f"median {histogram.median:,.0f}, 95 % up to {histogram.p95:,.0f}"
    spread += f", longest {histogram.maximum:,.0f} {unit}"
    label = f'y="{height + 14}" font-size="11" fill="#616e7c"'
    last = f"{high - 1:,.0f}" + (" and more" if histogram.maximum >= high else "")
    return (
        f'<div class="plot"><h3>{name} <span class="grey">({unit})</span></h3>'
        f'<p class="grey">{spread}</p><svg viewBox="0 0 {width} {height + 18}" role="img" '
        f'aria-label="{name}: {spread}">{"".join(bars)}'
        f'<line x1="{median:.1f}" x2="{median:.1f}" y1="0" y2="{height}" '
        'stroke="#b83232" stroke-width="1.5" stroke-dasharray="4 3"/>'
        f'<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="#7b8794"/>'
        f'<text x="0" {label}>{low:,.0f}</text>'
        f'<text x="{width}" {label} text-anchor="end">{last}</text></svg></div>'
    )


def _answers(result: CheckResult) -> str:
    answers = result.answers
    if not answers.top:
        return ""
    most = answers.top[0][1]
    bars = "".join(
        f'<div class="bar"><span>{escaped(visible(answer))}</span>'
        f'<div><i style="width:{100 * number / most:.1f}%"></i></div>'
        f"<span>{number:,}</span></div>"
        for answer, number in answers.top
    )
    spread = f"{answers.num_short:,} answers, {answers.num_distinct:,} different"
    title = f'<h3>most frequent short answers</h3><p class="grey">{spread}</p>'
    return f'<div class="plot">{title}{bars}</div>'


def _facts(result: CheckResult) -> str:
    lines = [*training_lines(result), *answer_lines(result)]
    if not lines:
        return ""
    rows = "".join(
        f"<tr><td>{escaped(label)}</td><td>{escaped(value)}</td></tr>" for label, value in lines
    )
    title = "Training, tokens and packing" if result.training else "Answers"
    return f'<h2>{title}</h2><table class="facts">{rows}</table>'


# The example rows.


def example_rows(result: CheckResult) -> list[int]:
    """Choose the rows to show in full: the first of every kind of finding, and some without any."""
    chosen = [
        finding.row
        for found in by_kind(result).values()
        for finding in found[:_ROWS_A_KIND]
        if finding.row is not None
    ]
    chosen = list(dict.fromkeys(chosen))[:_MOST_CARDS]

    # Sound rows, spread over the set.
    faulty = {finding.row for finding in result.findings}
    size = result.num_rows
    spread = range(0, size, max(1, size // (4 * _SOUND_CARDS)))
    sound = [row for row in spread if row not in faulty]
    return chosen + sound[:: 4 if size >= 4 * _SOUND_CARDS else 1][:_SOUND_CARDS]


def example_cards(result: CheckResult) -> Iterator[str]:
    """Show each example row with its findings, images and words; with a recipe, token by token."""
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
            view = view_sample(result.data, row, stage, result.processor)
            body = _images(view) + _words(view)
        except (ValueError, OSError):
            # The findings say why already; all there is to see of such a row is the record.
            body = _record(result, row)
        where = view.where if view else next((finding.where for finding in found[row]), "")
        title = f'<h3>row {row} <span class="grey">{escaped(where)}</span></h3>'
        yield f'<div class="card">{title}{badges}{said}{body}</div>'


def _record(result: CheckResult, row: int) -> str:
    try:
        content = getattr(result.data.records[row], "content", result.data.records[row])
    except (ValueError, OSError) as error:
        return f'<div class="text">{escaped(visible(result.data.shorten(str(error))))}</div>'
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


def _pieces(pieces: Iterable[TokenPiece]) -> Iterator[str]:
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


def _images(view: View) -> str:
    return "".join(
        thumbnail(source, number, (view.regions, OUTLINE))
        for number, source in enumerate(view.sample.images[:4])
    )


def thumbnail(source: ImageSource, number: int = 0, *layers: tuple[Sequence[Region], str]) -> str:
    """Return a small copy of an image as an element of a page, or that there is none to show.

    Args:
        source: Image.
        number: Its number in its sample.
        layers: Regions of the sample, and the colour in which those of this image are drawn.
    """
    try:
        image = open_quietly(source)
    except (ValueError, OSError):
        return '<p class="error">(no image to show)</p>'
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    for regions, colour in layers:
        own = [region for region in regions if region.image == number]
        image = draw_regions(image, own, outline=colour)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    content = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img {size} alt="" src="data:image/jpeg;base64,{content}">'


def escaped(text: str) -> str:
    """Escape text of the data for the page, whatever it holds."""
    return html.escape(text.encode("utf-8", "backslashreplace").decode())
