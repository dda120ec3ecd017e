"""A study's report: one Markdown file, one figure, and one page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path

from mipha.comparison.figures import (
    BLUE,
    COLOURS,
    FAINT,
    GREY,
    INK,
    new_figure,
    save_figure,
)
from mipha.comparison.results import TITLES, published_table
from mipha.evaluation.benchmark import Question
from mipha.files import write_whole
from mipha.studies.findings import Findings, Judged, VariantComparison, VariantScores, find
from mipha.studies.panel import asked_of, panel_answers
from mipha.studies.study import Experiment, Numbers

_MARGIN = (
    "A difference up to the margin counts as none. Where the runs do not settle a claim, its "
    "verdict is: not enough runs."
)

_FIRST_TOKENS = "What an image costs"
_FIRST_TOKENS_HOW = (
    "From an image and a question to the first token of the answer: CPU time of one thread, the "
    "median of 20 images of the first benchmark."
)

_STYLE = """
:root {
  --ink: #1f2933; --grey: #616e7c; --faint: #e4e7eb; --paper: #ffffff; --back: #f5f7fa;
  --good: #2a7f4f; --bad: #b83232;
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 24px; margin: 0; }
h2 { font-size: 18px; margin: 32px 0 8px; }
.grey { color: var(--grey); }
.wide, .claim, img.figure {
  background: var(--paper); border: 1px solid var(--faint); border-radius: 8px;
}
.wide, .claim { overflow-x: auto; padding: 8px 14px; }
table { border-collapse: collapse; }
td, th { text-align: left; vertical-align: top; padding: 4px 18px 4px 0; }
th { color: var(--grey); font-weight: normal; }
td + td { font-variant-numeric: tabular-nums; }
img.figure { max-width: 100%; }
td img { width: 96px; height: auto; border: 1px solid var(--faint); }
.claim { border-left: 6px solid var(--grey); margin: 8px 0; }
.claim b { display: block; }
.claim i { font-style: normal; }
.claim.holds { border-left-color: var(--good); }
.claim.does-not-hold { border-left-color: var(--bad); }
.holds i { color: var(--good); }
.does-not-hold i { color: var(--bad); }
"""


def write_report(experiment: Experiment, out: Path) -> tuple[Path, Path]:
    """Write `report.md`, `report.html` and the figures into a study's folder.

    These are `scores.png`, and `first-token.png` where the study measures first tokens.

    Raises:
        FileNotFoundError: No run is finished.
    """
    findings = find(experiment, out)
    draw_scores(findings, out / "scores.png")
    if findings.first_tokens:
        draw_first_tokens(findings, out / "first-token.png")
    write_whole(out / "report.md", markdown(findings))
    write_whole(out / "report.html", page(findings, out))
    return out / "report.md", out / "report.html"


def markdown(findings: Findings) -> str:
    """Return the report as Markdown, with `scores.png` beside it."""
    parts = [f"# {findings.experiment.study.title}\n\n{intro(findings)}\n"]

    if findings.judged:
        parts.append(f"## Takeaways\n\n{_MARGIN}\n")
    for judged in findings.judged:
        parts.append(
            f"**{judged.takeaway.claim}** ({judged.takeaway.source}): "
            f"**{overall(judged)}**, {margin(judged, findings)}\n\n"
        )
        parts.append(_markdown_table(_comparison_rows(judged.comparisons, findings)) + "\n")

    parts.append(
        "## Scores\n\n" + _markdown_table(score_rows(findings)) + "\n![scores](scores.png)\n"
    )
    if findings.first_tokens:
        parts.append(
            f"## {_FIRST_TOKENS}\n\n{_FIRST_TOKENS_HOW}\n\n"
            + _markdown_table(first_token_rows(findings))
            + "\n![accuracy by time to the first token](first-token.png)\n"
        )
    if rows := beside_rows(findings):
        parts.append(f"## {_beside_title(findings)}\n\n" + _markdown_table(rows))
    if detailed := _detailed(findings):
        parts.append("## In detail\n\n" + "\n".join(map(_markdown_table, detailed)))
    parts.append("## What differs\n\n" + _markdown_table(difference_rows(findings)))
    parts.append("## Cost\n\n" + _markdown_table(cost_rows(findings)))
    return "\n".join(parts)


def page(findings: Findings, out: Path) -> str:
    """Return the report as one HTML page, with the figure, images and answers in it."""
    claims = []
    for judged in findings.judged:
        verdict = overall(judged)
        kind = verdict if verdict in ("holds", "does not hold") else "open"
        table = _html_table(_comparison_rows(judged.comparisons, findings))
        claim = (
            f"{html.escape(judged.takeaway.claim)}: <i>{html.escape(verdict)}</i>, "
            f"{html.escape(margin(judged, findings))}"
        )
        claims.append(
            f'<div class="claim {kind.replace(" ", "-")}"><b>{claim}</b>'
            f'<span class="grey">{html.escape(judged.takeaway.source)}</span>{table}</div>'
        )

    beside = beside_rows(findings)
    details = [f'<div class="wide">{_html_table(rows)}</div>' for rows in _detailed(findings)]
    timed = ""
    if findings.first_tokens:
        timed = (
            f"<h2>{_FIRST_TOKENS}</h2><p>{_FIRST_TOKENS_HOW}</p>"
            f'<div class="wide">{_html_table(first_token_rows(findings))}</div>'
            + _figure_tag(out / "first-token.png", "accuracy by time to the first token")
        )
    title = html.escape(findings.experiment.study.title)
    sections = [
        f"<h1>{title}</h1><p>{html.escape(intro(findings))}</p>",
        *([f"<h2>Takeaways</h2><p>{_MARGIN}</p>" + "".join(claims)] if claims else []),
        f'<h2>Scores</h2><div class="wide">{_html_table(score_rows(findings))}</div>'
        + _figure_tag(out / "scores.png", "scores of every variant, a dot a seed"),
        timed,
        *(
            [f'<h2>{_beside_title(findings)}</h2><div class="wide">{_html_table(beside)}</div>']
            if beside
            else []
        ),
        *(["<h2>In detail</h2>", *details] if details else []),
        f'<h2>What differs</h2><div class="wide">{_html_table(difference_rows(findings))}</div>',
        f'<h2>Cost</h2><div class="wide">{_html_table(cost_rows(findings))}</div>',
        _panel(findings, out),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def intro(findings: Findings) -> str:
    """Return the scale, the base recipe and the number of runs, as a paragraph."""
    experiment = findings.experiment
    counts = {name: len(costs) for name, costs in findings.costs.items()}
    runs = (
        f"{min(counts.values())} to {max(counts.values())}"
        if len(set(counts.values())) > 1
        else str(next(iter(counts.values())))
    )

    missing = f" {findings.num_missing} runs are not finished." if findings.num_missing else ""
    return (
        f"Scale {experiment.scale}, base recipe {experiment.asked.recipe}, "
        f"{len(counts)} variants, {runs} runs each. "
        f"In the paper: {experiment.study.source}.{missing} {experiment.asked.note}".strip()
    )


def overall(judged: Judged) -> str:
    """Return one word for a takeaway, or on how many benchmarks it holds."""
    verdicts = list(judged.verdicts.values())
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return ", ".join(
        f"{verdict} on {verdicts.count(verdict)} of {len(verdicts)}"
        for verdict in dict.fromkeys(verdicts)
    )


def margin(judged: Judged, findings: Findings) -> str:
    """Return the margin of a verdict with the units of the metrics that it is measured in."""
    units = dict.fromkeys(findings.headline[name].unit for name in judged.verdicts)
    return f"margin {judged.takeaway.within:g} {' or '.join(units)}"


def score_rows(findings: Findings) -> list[list[str]]:
    """Return a header, then a variant a row: mean, deviation over seeds and number of runs."""
    header = [
        "variant",
        *(f"{name}, {metric.name} ({metric.unit})" for name, metric in findings.headline.items()),
    ]

    body = []
    for variant in findings.experiment.variants:
        found = findings.scores[variant.name].values()
        body.append(
            [
                variant.name,
                *(
                    f"{_spread(scores)} (n={len(scores.values)})" if scores.values else "-"
                    for scores in found
                ),
            ]
        )
    return [header, *body]


def detail_rows(findings: Findings, benchmark: str) -> list[list[str]]:
    """Return a header, then a metric a row with each variant's mean and deviation."""
    found = {
        variant.name: findings.details[variant.name][benchmark]
        for variant in findings.experiment.variants
    }
    metrics = dict.fromkeys(metric for scores in found.values() for metric in scores)

    header = [TITLES.get(benchmark, benchmark), *found]
    return [
        header,
        *(
            [
                metric,
                *(
                    _spread(scores[metric]) if metric in scores else "-"
                    for scores in found.values()
                ),
            ]
            for metric in metrics
        ),
    ]


def beside_rows(findings: Findings) -> list[list[str]]:
    """Return a header, then a variant a row: published numbers, then its means.

    Empty where the study names no published table.
    """
    beside = findings.experiment.asked.beside
    if beside is None:
        return []
    table = {row.name: row for row in published_table(beside.table)}
    columns = dict.fromkeys(column for name in beside.rows.values() for column in table[name].cells)

    header = ["variant", "in the paper", *(TITLES.get(column, column) for column in columns)]
    header += [TITLES.get(name, name) for name in findings.headline]
    body = []
    for variant, name in beside.rows.items():
        printed = (
            table[name].cells[column].printed if column in table[name].cells else "-"
            for column in columns
        )
        found = (
            _spread(scores) if scores.values else "-"
            for scores in findings.scores[variant].values()
        )
        body.append([variant, name, *printed, *found])
    return [header, *body]


def _beside_title(findings: Findings) -> str:
    beside = findings.experiment.asked.beside
    assert beside is not None
    return f"Beside Table {beside.table} of the paper"


def _detailed(findings: Findings) -> list[list[list[str]]]:
    """Return a table for each benchmark that has more than its headline."""
    tables = [detail_rows(findings, benchmark) for benchmark in findings.headline]
    return [rows for rows in tables if len(rows) > 2]


def _spread(scores: VariantScores) -> str:
    return f"{scores.mean:.1f}" + ("" if math.isnan(scores.spread) else f" ± {scores.spread:.1f}")


def difference_rows(findings: Findings) -> list[list[str]]:
    """Return a header, then a recipe key a row with each variant's value."""
    names = [variant.name for variant in findings.experiment.variants]
    keys = next(iter(findings.differences.values()))
    shown = {
        name: {
            key: "-" if value is None else str(value)
            for key, value in findings.differences[name].items()
        }
        for name in names
    }
    return [["recipe key", *names], *([key, *(shown[name][key] for name in names)] for key in keys)]


def cost_rows(findings: Findings) -> list[list[str]]:
    """Return a header, then a variant a row: means over its runs."""
    rows = [["variant", "training, minutes", "peak memory, GiB", "tokens trained on"]]
    for name, costs in findings.costs.items():
        if costs:
            minutes, memory, tokens = (
                sum(getattr(cost, key) for cost in costs) / len(costs)
                for key in ("minutes", "memory", "tokens")
            )
            rows.append([name, f"{minutes:.1f}", f"{memory:.2f}", f"{tokens:,.0f}"])
    return rows


def first_token_rows(findings: Findings) -> list[list[str]]:
    """Return a header, then a variant a row: tokens, time to the first token, and scores."""
    header = ["variant", "image tokens", "prompt tokens", "first token, ms"]
    header += [
        f"{name}, {metric.name} ({metric.unit})" for name, metric in findings.headline.items()
    ]
    return [
        header,
        *(
            [
                name,
                *(f"{value:.0f}" for value in (found.image_tokens, found.prompt_tokens)),
                f"{found.milliseconds:.1f}",
                *(
                    _spread(scores) if scores.values else "-"
                    for scores in findings.scores[name].values()
                ),
            ]
            for name, found in findings.first_tokens.items()
        ),
    ]


def _comparison_rows(
    comparisons: Sequence[VariantComparison], findings: Findings
) -> list[list[str]]:
    rows = [["comparison", "benchmark", "difference", "95 % interval", "p", "p, adjusted"]]
    for one in comparisons:
        found = one.found
        known = not math.isnan(found.p_value)

        # A single run has neither an interval nor a p-value.
        interval = f"{found.low:+.1f} to {found.high:+.1f}" if known else "-"
        p_values = [f"{found.p_value:.3g}", f"{one.p_holm:.3g}"] if known else ["-", "-"]
        unit = findings.headline[one.benchmark].unit
        rows.append(
            [
                f"{one.first} minus {one.second}",
                one.benchmark,
                f"{found.difference:+.1f} {unit}",
                interval,
                *p_values,
            ]
        )
    return rows


def _panel(findings: Findings, out: Path) -> str:
    asked_of_all = findings.experiment.asked
    names = [variant.name for variant in findings.experiment.variants]
    answers = {name: panel_answers(out / "runs" / name / "seed-0") for name in names}
    if not any(answers.values()):
        return ""

    # One row per question, with every variant's answer.
    rows = []
    for number, asked in enumerate(asked_of(asked_of_all.panel, asked_of_all.evaluate)):
        said = (
            html.escape(answers[name][number]) if number < len(answers[name]) else "-"
            for name in names
        )
        kind = html.escape(asked.facts["kind"])
        question = f'{html.escape(asked.text)}<br><span class="grey">{kind}</span>'
        rows.append("".join(f"<td>{cell}</td>" for cell in (_image_tag(asked), question, *said)))

    header = "".join(f"<th>{html.escape(name)}</th>" for name in ("image", "question", *names))
    table = "".join(f"<tr>{row}</tr>" for row in (header, *rows))
    title = '<h2>Answers side by side</h2><p class="grey">The first seed of each variant.</p>'
    return f'{title}<div class="wide"><table>{table}</table></div>'


def _figure_tag(path: Path, text: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img class="figure" alt="{text}" src="data:image/png;base64,{content}"></p>'


def _image_tag(asked: Question) -> str:
    if asked.image is None:
        return ""
    content = asked.image if isinstance(asked.image, bytes) else Path(asked.image).read_bytes()
    kind = "png" if content[:4] == b"\x89PNG" else "jpeg"
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def draw_scores(findings: Findings, path: Path) -> None:
    """Draw one panel a benchmark: a bar or a point a variant, a dot a seed.

    Args:
        findings: Findings to draw; a curve for a single numeric axis, else bars.
        path: `.png` or `.svg`, written whole.
    """
    benchmarks = list(findings.headline)
    (axis, *others) = findings.experiment.asked.axes.values()
    is_curve = isinstance(axis, Numbers) and not others

    # A grid of panels.
    columns = min(4, len(benchmarks))
    rows = math.ceil(len(benchmarks) / columns)
    figure = new_figure(max(5.6, 3.4 * columns), 3.3 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()

    for axes, name in zip(panels, benchmarks, strict=False):
        (_curve if is_curve else _bars)(axes, findings, name)
        title, metric = TITLES.get(name, name), findings.headline[name]
        axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
        axes.set_ylabel(f"{metric.name} ({metric.unit})", color=GREY, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY, labelsize=8)
        axes.grid(axis="y", color=FAINT)
        axes.set_axisbelow(True)

    for axes in panels[len(benchmarks) :]:
        axes.set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)


def draw_first_tokens(findings: Findings, path: Path) -> None:
    """Draw one panel a benchmark: mean score by time to the first token, with the image's tokens.

    Args:
        path: `.png` or `.svg`, written whole.
    """
    names = list(findings.first_tokens)
    figure = new_figure(5.2 * len(findings.headline), 4.0)
    panels = figure.subplots(1, len(findings.headline), squeeze=False).ravel()
    for axes, (name, metric) in zip(panels, findings.headline.items(), strict=True):
        for number, variant in enumerate(names):
            found, scores = findings.first_tokens[variant], findings.scores[variant][name]
            if not scores.values:
                continue
            colour = COLOURS[number % len(COLOURS)]
            across = [found.milliseconds] * len(scores.values)
            axes.plot(across, scores.values, "o", color=colour, markersize=3, alpha=0.5)
            label = f"{variant}: {found.image_tokens:.0f}"
            axes.plot(found.milliseconds, scores.mean, "o", color=colour, markersize=8, label=label)
        axes.set_title(
            TITLES.get(name, name), loc="left", color=INK, fontsize=11, fontweight="bold"
        )
        axes.set_xlabel("first token, ms", color=GREY, fontsize=9)
        axes.set_ylabel(f"{metric.name} ({metric.unit})", color=GREY, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY, labelsize=8)
        axes.grid(color=FAINT)
        axes.set_axisbelow(True)
        axes.margins(0.12)
    panels[-1].legend(
        title="image tokens", loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8
    )
    figure.tight_layout()
    save_figure(figure, path)


def _bars(axes, findings: Findings, benchmark: str) -> None:
    names = [variant.name for variant in findings.experiment.variants]
    for place, name in enumerate(names):
        scores = findings.scores[name][benchmark]
        if scores.values:
            axes.bar(place, scores.mean, width=0.6, color=BLUE, alpha=0.3)
            axes.plot([place] * len(scores.values), scores.values, "o", color=BLUE, markersize=4)
    is_crowded = len(names) > 5
    axes.set_xticks(
        range(len(names)),
        [name.replace("-", "-\n", 1) if len(name) > 12 else name for name in names],
        rotation=35 if is_crowded else 0,
        ha="right" if is_crowded else "center",
    )


def _curve(axes, findings: Findings, benchmark: str) -> None:
    in_order = sorted(findings.experiment.variants, key=lambda variant: variant.number)
    points = [(variant.number, findings.scores[variant.name][benchmark]) for variant in in_order]
    measured = [(number, scores) for number, scores in points if scores.values]

    axes.plot(
        [number for number, _ in measured],
        [scores.mean for _, scores in measured],
        color=BLUE,
        linewidth=2,
    )
    for number, scores in measured:
        axes.plot([number] * len(scores.values), scores.values, "o", color=BLUE, markersize=4)

    numbers = [number for number, _ in points]
    if min(numbers) > 0 and max(numbers) / min(numbers) >= 10:
        axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    (axis,) = findings.experiment.asked.axes
    axes.set_xlabel(axis, color=GREY, fontsize=9)


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *body))


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in header)}</tr>{lines}</table>"
