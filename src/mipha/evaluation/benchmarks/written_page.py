"""Written pages: numbers by their colour, small and large, on pages that the program draws itself.

Accuracy is reported by the height of the digits, because that is what decides whether more tokens
for an image pay: a total mixes what any model reads with what no small image shows.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.data.datasets.written_page import PAGES, SPLITS, Layout, Questions, check_drawn, draw
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split


def make_benchmark(layout: Layout) -> Benchmark:
    """Return the benchmark on the pages of a layout."""
    metrics = (
        Metric("accuracy", "%", "all questions"),
        Metric("number", "%", "questions for the number of a colour"),
        *(
            Metric(f"height_{height}", "%", f"numbers whose digits are {height} pixels high")
            for height in layout.heights
        ),
        Metric("count", "%", "questions for how many numbers there are"),
        Metric("unreadable", "questions", "the answer holds no digit; counts as wrong"),
    )

    def read(root: Path | None, split: str) -> list[Question]:
        check_drawn(layout, root)
        return [
            Question(
                id=f"{split}/{asked.page}/{asked.number}",
                text=asked.question,
                image=draw(layout, split, asked.page),
                facts={"answer": asked.answer, "page": asked.page, "height": asked.height},
            )
            for asked in Questions(layout, split)
        ]

    def read_labels(path: Path | None) -> list[Question]:
        return read(path, "test")

    def majority_baseline(questions: Sequence[Question]) -> dict[str, str]:
        """Give the most frequent answer of 1,000 training pages to each question string."""
        given: dict[str, Counter[str]] = defaultdict(Counter)
        for asked in itertools.islice(Questions(layout, "train"), 3_000):
            given[asked.question][asked.answer] += 1
        usual = {
            text: min(answers.most_common(), key=lambda pair: (-pair[1], pair[0]))[0]
            for text, answers in given.items()
        }
        return {question.id: usual[question.text] for question in questions}

    def measure(totals: Totals) -> dict[str, np.ndarray]:
        """Return percent right of each group, and the number of unreadable answers."""
        groups = [metric.name for metric in metrics[:-1] if metric.name in totals.names]
        found = {name: 100 * totals.mean(name) for name in groups}
        return found | {"unreadable": totals.sum("unreadable")}

    return Benchmark(
        name=layout.name,
        metrics=metrics,
        splits={name: Split(3 * SPLITS[name]) for name in ("test", "validation")},
        protocol=(
            "drawn by mipha, the question as the whole prompt, greedy; the last run of digits of "
            "the text must equal the answer; 95 % interval: cluster bootstrap over pages, 2000 "
            "resamples"
        ),
        source="get nothing, because mipha draws the pages",
        max_new_tokens=16,
        read=read,
        read_labels=read_labels,
        score=score,
        measure=measure,
        baselines={"majority": majority_baseline},
        packaged=True,
    )


def read_answer(text: str) -> str | None:
    """Return the last run of digits of a text, as 03 and 3 differ; None without one."""
    found = re.findall(r"\d+", text)
    return found[-1] if found else None


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge whether each number is the one that stands on the page.

    Raises:
        KeyError: A question has no prediction.
    """
    parsed = {question.id: read_answer(predictions[question.id]) for question in questions}
    right = {
        question.id: float(parsed[question.id] == question.facts["answer"])
        for question in questions
    }
    contributions = []
    for question in questions:
        height = question.facts["height"]
        groups = ["accuracy", *(("count",) if height is None else ("number", f"height_{height}"))]
        amounts = dict.fromkeys(groups, right[question.id])
        amounts["unreadable"] = float(parsed[question.id] is None)
        contributions.append((question.facts["page"], amounts))
    return Judgement(per_question=right, contributions=contributions, parsed=parsed)


BENCHMARK = make_benchmark(PAGES)
