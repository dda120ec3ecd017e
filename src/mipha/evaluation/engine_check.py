"""Does an engine give the answers of its checkpoint? 200 questions are asked of both.

engine's predictions --+
                       +--> equal texts, and the headline on the same questions
float32 transformers --+

The reference's answers are kept in `transformers-float32/` beside the engine's, and the pairs that
differ in `engine-differences.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mipha.comparison.statistics import tally, values, wilson
from mipha.evaluation.benchmark import Benchmark, Plan, Question
from mipha.evaluation.predict import fingerprint, merge, predict
from mipha.files import write_whole

NUM_CHECKED = 200
"""Questions that are asked of both."""

REFERENCE = "transformers-float32"


@dataclass(frozen=True)
class EngineCheck:
    """How an engine's answers compare with those of transformers in float32.

    Args:
        engine: Name of the engine.
        n: Questions that both answered.
        n_same: Those with the same text.
        low: Lower end of the 95 % interval of the share of equal answers, in %.
        high: Upper end.
        metric: Name of the headline.
        score: Headline of the engine on these questions; None where a judge or a server scores.
        reference_score: Headline of the reference on them.
    """

    engine: str
    n: int
    n_same: int
    low: float
    high: float
    metric: str
    score: float | None
    reference_score: float | None


def check_engine(
    engine: str,
    checkpoint: Path,
    answered: Sequence[tuple[Plan, Mapping[str, str]]],
    folder: Path,
    *,
    batch_size: int,
    progress: bool,
) -> list[EngineCheck]:
    """Ask the checkpoint in float32 what its engine was asked, and compare the answers.

    Args:
        engine: Name of the engine.
        checkpoint: Folder of the checkpoint.
        answered: Plans, each with the engine's predictions.
        folder: Folder of the results of all plans.
        batch_size: Questions per forward pass.
        progress: Show a progress bar.

    Returns:
        One comparison per plan.
    """
    from mipha.assistant import load

    assistant = load(checkpoint, dtype="float32")
    checks = []
    for plan, predictions in answered:
        asked = _spread([one for one in plan.asked if one.id in predictions])
        place = folder / plan.key
        predict(
            assistant,
            replace(plan, questions=asked, limit=None),
            place / REFERENCE,
            checkpoint_sha256=fingerprint(checkpoint),
            batch_size=batch_size,
            progress=progress,
        )
        reference = merge(place / REFERENCE, asked)
        checks.append(_compare(engine, plan, asked, predictions, reference, place))
    return checks


def _compare(
    engine: str,
    plan: Plan,
    asked: Sequence[Question],
    predictions: Mapping[str, str],
    reference: Mapping[str, str],
    folder: Path,
) -> EngineCheck:
    both = [question for question in asked if question.id in reference]
    differing = [one for one in both if predictions[one.id] != reference[one.id]]
    rows = (
        {"question_id": one.id, engine: predictions[one.id], REFERENCE: reference[one.id]}
        for one in differing
    )
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(folder / "engine-differences.jsonl", "".join(lines))

    # The headline needs labels, and no judge.
    benchmark = plan.benchmark
    is_scored = both and benchmark.judge is None and benchmark.splits[plan.split].server is None
    scores = [
        _headline(benchmark, both, answers) if is_scored else None
        for answers in (predictions, reference)
    ]
    num_same = len(both) - len(differing)
    low, high = wilson(num_same, len(both)) if both else (0.0, 1.0)
    return EngineCheck(
        engine, len(both), num_same, 100 * low, 100 * high, benchmark.headline.name, *scores
    )


def _headline(
    benchmark: Benchmark, questions: Sequence[Question], answers: Mapping[str, str]
) -> float | None:
    sums = tally(benchmark.score(questions, answers, None).contributions)
    value = values(sums, benchmark.measure)[benchmark.headline.name]
    return value if value == value else None  # NaN: undefined


def _spread(questions: Sequence[Question]) -> list[Question]:
    """Return `NUM_CHECKED` questions from all over the list, or all of them."""
    num = min(NUM_CHECKED, len(questions))
    return [questions[place * len(questions) // num] for place in range(num)]
