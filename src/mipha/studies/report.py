"""A study's report: one Markdown file and one page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path

from mipha.comparison.results import TITLES
from mipha.evaluation.benchmark import Question as Asked
from mipha.files import write_whole
from mipha.studies.figures import draw_scores
from mipha.studies.findings import Comparison, Findings, Judged, VariantScores, find
from mipha.studies.panel import asked_of, panel_answers
from mipha.studies.study import Study

_STYLE = """
:root { --ink: #1f2933; --grey: #616e7c; --faint: #e4e7eb; --paper: #ffffff; --back: #f5f7fa; --good: #2a7f4f; --bad: #b83232; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 32px 0 8px; }
.grey { color: var(--grey); }
.wide, .claim, img.figure { background: var(--paper); border: 1px solid var(--faint); border-radius: 8px; }
.wide, .claim { overflow-x: auto; padding: 8px 14px; }
table { border-collapse: collapse; }
td, th { text-align: left; vertical-align: top; padding: 4px 18px 4px 0; } th { color: var(--grey); font-weight: normal; }
td + td { font-variant-numeric: tabular-nums; }
img.figure { max-width: 100%; } td img { width: 96px; height: auto; border: 1px solid var(--faint); }
.claim { border-left: 6px solid var(--grey); margin: 8px 0; } .claim b { display: block; } .claim i { font-style: normal; }
.claim.holds { border-left-color: var(--good); } .claim.does-not-hold { border-left-color: var(--bad); }
.holds i { color: var(--good); } .does-not-hold i { color: var(--bad); }
"""


def write_report(study: Study, scale: str, out: Path) -> tuple[Path, Path]:
    """Write `report.md`, `report.html` and `scores.png` into a study's folder.

    Raises:
        FileNotFoundError: No run is finished.
    """
    findings = find(study, scale, out)
    draw_scores(findings, out / "scores.png")
    write_whole(out / "report.md", markdown(findings))
    write_whole(out / "report.html", page(findings, out))
    return out / "report.md", out / "report.html"


def markdown(findings: Findings) -> str:
    """The report as Markdown, with `scores.png` beside it."""
    parts = [f"# {findings.study.title}\n\n{intro(findings)}\n"]
    if findings.judged:
        parts.append("## Takeaways\n")
    for judged in findings.judged:
        parts.append(
            f"**{judged.takeaway.claim}** ({judged.takeaway.source}): **{overall(judged)}**\n\n"
        )
        parts.append(_markdown_table(_comparison_rows(judged.comparisons, findings)) + "\n")
    parts.append(
        "## Scores\n\n" + _markdown_table(score_rows(findings)) + "\n![scores](scores.png)\n"
    )
    if detailed := _detailed(findings):
        parts.append("## In detail\n\n" + "\n".join(map(_markdown_table, detailed)))
    parts.append("## What differs\n\n" + _markdown_table(difference_rows(findings)))
    parts.append("## Cost\n\n" + _markdown_table(cost_rows(findings)))
    return "\n".join(parts)


def page(findings: Findings, out: Path) -> str:
    """The report as one HTML page, figure, pictures and answers in it."""
    claims = []
    for judged in findings.judged:
        verdict = overall(judged)
        kind = verdict if verdict in ("holds", "does not hold") else "open"
        table = _html_table(_comparison_rows(judged.comparisons, findings))
        claims.append(
            f'<div class="claim {kind.replace(" ", "-")}"><b>{html.escape(judged.takeaway.claim)}: <i>{html.escape(verdict)}</i></b>'
            f'<span class="grey">{html.escape(judged.takeaway.source)}</span>{table}</div>'
        )
    details = [f'<div class="wide">{_html_table(rows)}</div>' for rows in _detailed(findings)]
    figure = base64.b64encode((out / "scores.png").read_bytes()).decode()
    sections = [
        f"<h1>{html.escape(findings.study.title)}</h1><p>{html.escape(intro(findings))}</p>",
        *(["<h2>Takeaways</h2>" + "".join(claims)] if claims else []),
        f'<h2>Scores</h2><div class="wide">{_html_table(score_rows(findings))}</div>'
        f'<p><img class="figure" alt="scores of every variant, a dot a seed" src="data:image/png;base64,{figure}"></p>',
        *(["<h2>In detail</h2>", *details] if details else []),
        f'<h2>What differs</h2><div class="wide">{_html_table(difference_rows(findings))}</div>',
        f'<h2>Cost</h2><div class="wide">{_html_table(cost_rows(findings))}</div>',
        _panel(findings, out),
    ]
    title = html.escape(findings.study.title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def intro(findings: Findings) -> str:
    """What was asked, at which scale, and what of it is there."""
    counts = {name: len(costs) for name, costs in findings.costs.items()}
    runs = (
        f"{min(counts.values())} to {max(counts.values())}"
        if len(set(counts.values())) > 1
        else str(next(iter(counts.values())))
    )
    missing = f" {findings.num_missing} runs are not finished." if findings.num_missing else ""
    size = findings.study.scale(findings.scale)
    return (
        f"Scale {findings.scale}, base recipe {size.recipe}, {len(counts)} variants, {runs} runs each. "
        f"In the paper: {findings.study.source}.{missing} {size.note}".strip()
    )


def overall(judged: Judged) -> str:
    """One word for a takeaway, or on how many benchmarks it holds."""
    verdicts = list(judged.verdicts.values())
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return ", ".join(
        f"{verdict} on {verdicts.count(verdict)} of {len(verdicts)}"
        for verdict in dict.fromkeys(verdicts)
    )


def score_rows(findings: Findings) -> list[list[str]]:
    """Header, then a variant a row: mean, deviation over seeds and number of runs on each benchmark."""
    header = [
        "variant",
        *(f"{name}, {metric.name} ({metric.unit})" for name, metric in findings.headline.items()),
    ]
    body = []
    for variant in findings.variants:
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
    """Header, then a metric of the benchmark a row with each variant's mean and deviation."""
    found = {
        variant.name: findings.details[variant.name][benchmark] for variant in findings.variants
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


def _detailed(findings: Findings) -> list[list[list[str]]]:
    """A table for each benchmark that has more than its headline."""
    tables = [detail_rows(findings, benchmark) for benchmark in findings.headline]
    return [rows for rows in tables if len(rows) > 2]


def _spread(scores: VariantScores) -> str:
    return f"{scores.mean:.1f}" + ("" if math.isnan(scores.spread) else f" ± {scores.spread:.1f}")


def difference_rows(findings: Findings) -> list[list[str]]:
    """Header, then a recipe key a row with each variant's value."""
    names = [variant.name for variant in findings.variants]
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
    """Header, then a variant a row: means over its runs."""
    rows = [["variant", "training, minutes", "peak memory, GiB", "tokens trained on"]]
    for name, costs in findings.costs.items():
        if costs:
            minutes, memory, tokens = (
                sum(getattr(cost, key) for cost in costs) / len(costs)
                for key in ("minutes", "memory", "tokens")
            )
            rows.append([name, f"{minutes:.1f}", f"{memory:.2f}", f"{tokens:,.0f}"])
    return rows


def _comparison_rows(comparisons: Sequence[Comparison], findings: Findings) -> list[list[str]]:
    rows = [["comparison", "benchmark", "difference", "95 % interval", "p", "p, adjusted"]]
    for one in comparisons:
        found = one.found
        known = not math.isnan(found.p_value)
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
    size = findings.study.scale(findings.scale)
    names = [variant.name for variant in findings.variants]
    answers = {name: panel_answers(out / "runs" / name / "seed-0") for name in names}
    if not any(answers.values()):
        return ""
    rows = []
    for number, asked in enumerate(asked_of(size.panel, size.evaluate)):
        said = (
            html.escape(answers[name][number]) if number < len(answers[name]) else "-"
            for name in names
        )
        question = f'{html.escape(asked.text)}<br><span class="grey">{html.escape(asked.facts["kind"])}</span>'
        rows.append("".join(f"<td>{cell}</td>" for cell in (_picture(asked), question, *said)))
    header = "".join(f"<th>{html.escape(name)}</th>" for name in ("picture", "question", *names))
    table = "".join(f"<tr>{row}</tr>" for row in (header, *rows))
    title = '<h2>Answers side by side</h2><p class="grey">The first seed of each variant.</p>'
    return f'{title}<div class="wide"><table>{table}</table></div>'


def _picture(asked: Asked) -> str:
    if asked.image is None:
        return ""
    content = asked.image if isinstance(asked.image, bytes) else Path(asked.image).read_bytes()
    kind = "png" if content[:4] == b"\x89PNG" else "jpeg"
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *body))


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in header)}</tr>{lines}</table>"
