"""The worst answers of a model as one page that needs nothing beside it: image, question, answer.

It stands beside scores.json as worst-cases.html. All text of data and model is escaped, and images
are small copies inside the page. Boxes are drawn on them, the right one green and the answer's red.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from mipha.data.check.html import STYLE, escaped, thumbnail
from mipha.data.regions import Region
from mipha.evaluation.benchmark import Judgement, Plan, Question
from mipha.evaluation.boxes import iou
from mipha.files import write_whole

FILE = "worst-cases.html"
NUM_SHOWN = 60
"""Questions on the page."""

_LONGEST = 2_000
"""Characters of a text that are shown."""
_GOLDS = ("answers", "answer", "label", "letter")
"""Facts that hold the right answer; the first that a question has counts."""

_RIGHT, _WRONG = "#2a7f4f", "#b83232"

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name: worst cases</title>
<style>$style
.turn { margin: 8px 0 0; } .turn b { display: block; color: var(--grey); font-weight: normal;
  font-size: 12px; }
.turn span { white-space: pre-wrap; overflow-wrap: anywhere; }
.wrong span { color: $wrong; } .right span { color: $right; }
</style>
</head>
<body>
<main>
<h1>$name: worst cases</h1>
<p class="grey">$headline</p>
<div class="cards">$cards</div>
</main>
</body>
</html>
""")


def write_worst_cases(
    plan: Plan,
    judgement: Judgement,
    predictions: Mapping[str, str],
    folder: Path,
    metric: str,
) -> None:
    """Write the page.

    Args:
        plan: The questions.
        judgement: What each answer is worth.
        predictions: Question id to text.
        folder: Place of the page.
        metric: Name of the headline and its value, for the heading.
    """
    judged = [one for one in plan.asked if one.id in judgement.per_question]
    shown = choose(judged, judgement.per_question)
    num_right = sum(judgement.per_question[one.id] >= 1 for one in judged)
    page = _PAGE.substitute(
        name=escaped(plan.key),
        style=STYLE,
        right=_RIGHT,
        wrong=_WRONG,
        headline=escaped(
            f"{metric}. {len(shown):,} of {len(judged):,} questions, the lowest scores first; "
            f"{num_right:,} are answered without fault."
        ),
        cards="".join(_card(one, judgement, predictions) for one in shown)
        or '<p class="fine">No answer is at fault.</p>',
    )
    write_whole(folder / FILE, page)


def choose(questions: Sequence[Question], scores: Mapping[str, float]) -> list[Question]:
    """Return the questions with the lowest scores below 1, the lowest first.

    Of questions with the same score, those from all over the set are taken.
    """
    wrong = [one for one in questions if scores[one.id] < 1]
    chosen: list[Question] = []
    for score in sorted({scores[one.id] for one in wrong}):
        alike = [one for one in wrong if scores[one.id] == score]
        num = min(NUM_SHOWN - len(chosen), len(alike))
        chosen += [alike[place * len(alike) // num] for place in range(num)]
        if len(chosen) == NUM_SHOWN:
            break
    return chosen


def _card(question: Question, judgement: Judgement, predictions: Mapping[str, str]) -> str:
    score = judgement.per_question[question.id]
    title = (
        f'<h3>{escaped(question.id)} <span class="number">{score:.2f}</span> '
        f'<span class="grey">{escaped(str(question.facts.get("where", "")))}</span></h3>'
    )
    layers = _boxes(question, judgement)
    images = "".join(
        thumbnail(image, number, *layers) for number, image in enumerate(question.images[:4])
    )
    before = "".join(_turn(turn.role, turn.text) for turn in question.before)
    gold = next((question.facts[name] for name in _GOLDS if question.facts.get(name)), None)
    right = "" if gold is None else gold if isinstance(gold, str) else " | ".join(map(str, gold))
    read = (judgement.parsed or {}).get(question.id)
    turns = (
        before
        + _turn("question", question.text)
        + _turn("answer", predictions[question.id] or "(empty)", "wrong")
        + (_turn("read as", str(read)) if judgement.parsed is not None else "")
        + _overlap(question, judgement)
        + (_turn("right", right, "right") if right else "")
    )
    return f'<div class="card">{title}{images}{turns}</div>'


def _boxes(question: Question, judgement: Judgement) -> tuple[tuple[Sequence[Region], str], ...]:
    """Return the right boxes and those of the answer, each with its colour; nothing without any."""
    right: tuple[Region, ...] = question.facts.get("boxes", ())
    if not right:
        return ()
    first = right[0]
    said = [first._replace(numbers=numbers) for numbers in judgement.boxes.get(question.id, ())]
    return (right, _RIGHT), (said, _WRONG)


def _overlap(question: Question, judgement: Judgement) -> str:
    """Return the IoU of the one box of an answer with the one right box, as a turn."""
    right, said = question.facts.get("boxes", ()), judgement.boxes.get(question.id, ())
    if len(right) != 1 or len(said) != 1:
        return ""
    return _turn("overlap", f"IoU {iou(said[0], right[0].numbers):.2f}")


def _turn(name: str, text: str, kind: str = "") -> str:
    cut = text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
    return f'<div class="turn {kind}"><b>{escaped(name)}</b><span>{escaped(cut)}</span></div>'
