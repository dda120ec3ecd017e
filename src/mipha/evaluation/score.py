"""Predictions -> scores.json, which says by itself what was measured, on what, and how sure it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mipha.evaluation.benchmark import Benchmark, Question, Score
from mipha.run import write_whole


@dataclass(frozen=True)
class Result:
    """The scores of one model on one benchmark: the content of scores.json.

    Args:
        benchmark: Its name.
        split: Which of its splits.
        blind: The model was shown grey in place of every picture.
        scores: Headline first.
        num_questions: In the split.
        n_asked: Fewer than `num_questions` if a limit was set.
        n_failed: Asked, but with an error in place of an answer; the scores leave them out.
        complete: Every question of the split has an answer: only then compare with published numbers.
        baselines: Headline metric of the answers that need no model, on the same questions, in the headline's unit.
        prompts_sha256: Of all ids, prompts and images.
        checkpoint_sha256: Of the model that answered.
        max_new_tokens: Longest answer, in tokens.
        protocol: How it was asked and read.
    """

    benchmark: str
    split: str
    blind: bool
    scores: tuple[Score, ...]
    num_questions: int
    n_asked: int
    n_failed: int
    complete: bool
    baselines: Mapping[str, float]
    prompts_sha256: str
    checkpoint_sha256: str
    max_new_tokens: int
    protocol: str


def score_predictions(
    benchmark: Benchmark,
    split: str,
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    folder: Path,
    limit: int | None = None,
    blind: bool = False,
) -> Result:
    """Score the answers and write scores.json beside them.

    Args:
        benchmark: Its module.
        split: Which split the questions are.
        questions: All of the split.
        predictions: Question id to text.
        folder: Holds predictions.meta.json; gets scores.json.
        limit: Only the first N questions were asked.
        blind: The model was shown grey.

    Raises:
        ValueError: Not one of the questions was answered.
    """
    header = json.loads((folder / "predictions.meta.json").read_text(encoding="utf-8"))
    asked = questions[:limit]
    answered = [question for question in asked if question.id in predictions]
    if not answered:
        raise ValueError(f"none of the {len(asked)} questions of {header['benchmark']} was answered: see {folder / 'errors.jsonl'}")
    scores = benchmark.score(answered, predictions)
    metrics = {metric.name: metric for metric in benchmark.METRICS}
    assert all(score.metric in metrics for score in scores), "a score of a metric that METRICS lacks"
    result = Result(
        benchmark=header["benchmark"],
        split=split,
        blind=blind,
        scores=tuple(scores),
        num_questions=len(questions),
        n_asked=len(asked),
        n_failed=len(asked) - len(answered),
        complete=len(answered) == len(questions),
        baselines={name: benchmark.score(answered, answer(answered))[0].value for name, answer in benchmark.BASELINES.items()},
        prompts_sha256=header["prompts_sha256"],
        checkpoint_sha256=header["checkpoint_sha256"],
        max_new_tokens=header["max_new_tokens"],
        protocol=benchmark.PROTOCOL,
    )
    rows = [asdict(score) | {"description": metrics[score.metric].description} for score in scores]
    content = asdict(result) | {"scores": rows}
    write_whole(folder / "scores.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return result
