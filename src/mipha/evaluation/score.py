"""Predictions -> scores.json, which says by itself what was measured, on what, and how sure it is.

scores.json    the scores of one model on one benchmark, for people and programs
tally.json     sums by image, from which paired comparisons are made
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mipha.comparison.statistics import Tally, Totals, intervals, tally, values
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Question, Score, describe
from mipha.evaluation.files import read_json_lines
from mipha.files import write_whole


@dataclass(frozen=True)
class Result:
    """The scores of one model on one benchmark: the content of scores.json.

    Args:
        benchmark: Its name.
        split: Which of its splits.
        blind: The model was shown grey in place of every picture.
        scores: Headline first; none for a split whose labels only a server has.
        num_questions: In the split.
        n_asked: Fewer than `num_questions` if a limit was set.
        n_failed: Asked, but with an error in place of an answer; the scores leave them out.
        complete: Every question of the split has an answer: only then compare with published numbers.
        baselines: Headline metric of the answers that need no model, on the same questions, in the headline's unit.
        prompts_sha256: Of all ids, prompts and images.
        checkpoint_sha256: Of the model that answered.
        max_new_tokens: Longest answer, in tokens.
        protocol: How it was asked and read.
        notes: What a reader must know, a sentence each.
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
    notes: tuple[str, ...] = ()


def score_predictions(
    benchmark: Benchmark,
    split: str,
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    folder: Path,
    limit: int | None = None,
    blind: bool = False,
    judge: Judge | None = None,
) -> Result:
    """Score the answers and write scores.json beside them, or the file that the benchmark's server takes.

    Args:
        benchmark: Its module.
        split: Which split the questions are.
        questions: All of the split.
        predictions: Question id to text.
        folder: Holds predictions.meta.json; gets scores.json, tally.json and the upload file.
        limit: Only the first N questions were asked.
        blind: The model was shown grey.
        judge: Grades where the benchmark wants one.

    Raises:
        ValueError: Not one of the questions was answered, or the benchmark needs a judge.
    """
    header = json.loads((folder / "predictions.meta.json").read_text(encoding="utf-8"))
    asked = questions[:limit]
    answered = [question for question in asked if question.id in predictions]
    if not answered:
        raise ValueError(
            f"none of the {len(asked)} questions of {header['benchmark']} was answered: see {folder / 'errors.jsonl'}"
        )
    complete = len(answered) == len(questions)
    scores: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()
    if split not in benchmark.SERVERS:
        judgement = judge_answers(benchmark, answered, predictions, judge)
        scores, sums, notes = (*grade(benchmark, judgement), judgement.notes)
        write_whole(
            folder / "tally.json", json.dumps(_pairable(header["benchmark"], answered, sums)) + "\n"
        )
    else:
        uploads = _write_upload(benchmark, answered, predictions, folder) if complete else ()
        server = benchmark.SERVERS[split]
        note = (
            f"upload {' and '.join(map(str, uploads))} to {server}"
            if uploads
            else f"no upload file for {server} until all are answered"
        )
        notes = (f"the labels of {split} are not public: {note}",)
    result = Result(
        benchmark=header["benchmark"],
        split=split,
        blind=blind,
        scores=scores,
        num_questions=len(questions),
        n_asked=len(asked),
        n_failed=len(asked) - len(answered),
        complete=complete,
        baselines={
            name: _headline(benchmark, answered, answer(answered))
            for name, answer in benchmark.BASELINES.items()
        },
        prompts_sha256=header["prompts_sha256"],
        checkpoint_sha256=header["checkpoint_sha256"],
        max_new_tokens=header["max_new_tokens"],
        protocol=benchmark.PROTOCOL,
        notes=notes,
    )
    rows = [
        asdict(score) | {"description": describe(benchmark, score.metric).description}
        for score in scores
    ]
    write_whole(folder / "scores.json", _json(asdict(result) | {"scores": rows}))
    if complete and split not in benchmark.SERVERS:
        _write_upload(benchmark, answered, predictions, folder)
    return result


def score_file(
    benchmark: Benchmark, annotations: Path, predictions_file: Path, judge: Judge | None = None
) -> dict[str, Any]:
    """Score any model's predictions, with neither model nor images.

    Args:
        annotations: Official annotation file, or the folder with the official files.
        predictions_file: A line `{"question_id": ..., "text": ...}` a question, in any order; other keys are passed over.

    Returns:
        `headline` (unrounded), `metrics` (all others, `group.member` as `{group: {member: ...}}`), `per_question`; where the protocol has
        them `parsed`, `normalised`, `submission`; then `unit`, `n`, `interval`, `protocol`, `notes`, `tally`. An undefined number is null.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is malformed, or the predictions do not answer exactly the questions.
    """
    questions = benchmark.annotations(annotations)
    if not questions:
        raise ValueError(f"{annotations} has no question: {benchmark.SOURCE}")
    predictions = read_predictions_file(predictions_file, questions)
    questions = [question for question in questions if question.id in predictions]
    judgement = judge_answers(benchmark, questions, predictions, judge)
    (headline, *others), sums = grade(benchmark, judgement)
    metrics: dict[str, Any] = {}
    for score in others:
        group, _, member = score.metric.partition(".")
        if member:
            metrics.setdefault(group, {})[member] = score.value
        else:
            metrics[group] = score.value
    readings = {
        "parsed": judgement.parsed,
        "normalised": judgement.normalised,
        "submission": judgement.submission,
    }
    return {
        "headline": headline.value,
        "metric": headline.metric,
        "unit": headline.unit,
        "n": headline.n,
        "interval": [headline.low, headline.high],
        "metrics": {headline.metric: headline.value} | metrics,
        "protocol": benchmark.PROTOCOL,
        "notes": list(judgement.notes),
        "per_question": {
            question_id: _finite(value) for question_id, value in judgement.per_question.items()
        },
        **{name: reading for name, reading in readings.items() if reading},
        "tally": _pairable(benchmark.__name__.rpartition(".")[2], questions, sums),
    }


def read_predictions_file(path: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Question id to text, of exactly these questions; those whose facts say `optional` may be missing.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A malformed line, an id twice, an unknown or a missing id: names file, line and id.
    """
    wanted = {question.id for question in questions}
    lines: dict[str, int] = {}
    predictions: dict[str, str] = {}
    for number, row in read_json_lines(path):
        where = f"{path} line {number}"
        if not isinstance(row.get("question_id"), (str, int)) or not isinstance(
            row.get("text"), str
        ):
            raise ValueError(
                f'{where} is not {{"question_id": ..., "text": "..."}}: mend that line'
            )
        question_id = str(row["question_id"])
        if question_id in lines:
            raise ValueError(
                f"{where}: question_id {question_id} is also on line {lines[question_id]}: keep one of the two"
            )
        if question_id not in wanted:
            raise ValueError(
                f"{where}: no question has the id {question_id} (ids look like {questions[0].id}): are these the annotations?"
            )
        lines[question_id], predictions[question_id] = number, row["text"]
    required = [question.id for question in questions if not question.facts.get("optional")]
    if missing := [question_id for question_id in required if question_id not in predictions]:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(required)} questions, such as {', '.join(missing[:3])}: predict those too"
        )
    return predictions


def judge_answers(
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    judge: Judge | None,
) -> Judgement:
    """The benchmark's judgement; the judge is handed to those benchmarks that take one.

    Raises:
        ValueError: A judge for a benchmark that has no use for it.
    """
    if benchmark.JUDGE is None:
        if judge is not None:
            raise ValueError("this benchmark is scored by rules alone: leave the judge out")
        return benchmark.score(questions, predictions)
    return benchmark.score(questions, predictions, judge)  # type: ignore[call-arg]


def grade(benchmark: Benchmark, judgement: Judgement) -> tuple[tuple[Score, ...], Tally]:
    """Every metric with its 95 % interval, headline first; a plain count and an official number that is no sum have none."""
    sums = tally(judgement.contributions)
    found, spread, totals = (
        values(sums, benchmark.measure),
        intervals(sums, benchmark.measure),
        sums.totals(),
    )
    scores = []
    for name, value in found.items():
        unit = describe(benchmark, name).unit
        n = _num_questions(name, totals, len(judgement.per_question))
        low, high = (None, None) if unit == "questions" else map(_finite, spread[name])
        scores.append(Score(name, _finite(value), unit, n, low, high))
    extra = [
        Score(name, _finite(value), describe(benchmark, name).unit, len(judgement.per_question))
        for name, value in judgement.extra.items()
    ]
    return (*scores, *extra), sums


def _num_questions(name: str, totals: Totals, num_all: int) -> int:
    """Questions that a metric rests on: its own, those of its group (`adversarial.f1`), or all (a mean of F1s)."""
    if name in totals.names:
        return int(totals.count(name))
    group, _, member = name.partition(".")
    return max(
        (
            int(totals.count(other))
            for other in totals.names
            if member and other.startswith(f"{group}.")
        ),
        default=num_all,
    )


def _write_upload(
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    folder: Path,
) -> tuple[Path, ...]:
    """Write what the benchmark's server takes; only of complete answers, for a server counts a missing one as wrong."""
    files = benchmark.submission(questions, predictions)
    for name, data in files.items():
        write_whole(folder / name, data)
    return tuple(folder / name for name in files)


def _pairable(name: str, questions: Sequence[Question], sums: Tally) -> dict[str, Any]:
    """A tally with what two of them must share to be compared pair by pair."""
    ids = "\n".join(sorted(question.id for question in questions))
    return {
        "benchmark": name,
        "ids_sha256": hashlib.sha256(ids.encode()).hexdigest(),
    } | sums.as_json()


def _headline(
    benchmark: Benchmark, questions: Sequence[Question], answers: Mapping[str, str]
) -> float:
    return next(
        iter(
            values(
                tally(benchmark.score(questions, answers).contributions), benchmark.measure
            ).values()
        )
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
