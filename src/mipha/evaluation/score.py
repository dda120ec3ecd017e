"""Predictions -> scores.json, which describes itself: what was measured, on what, how precisely.

scores.json         the scores of one model on one benchmark, for people and programs
tally.json          sums by image, from which paired comparisons are made
worst-cases.html    the answers with the lowest scores, with their images
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mipha.comparison.statistics import Tally, Totals, intervals, tally, values
from mipha.evaluation.answer_files import read_answers
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Plan, Question
from mipha.evaluation.chat_completions import describe_refused
from mipha.evaluation.engine_check import EngineCheck
from mipha.evaluation.predict import asked_hash
from mipha.files import append_line, read_json_object, read_lines, write_whole

_FEWEST_ALIKE = 20
"""So many answers that are the same text are worth a note."""


@dataclass(frozen=True)
class Score:
    """One number.

    Args:
        metric: Name of the metric; `group.member` for one of several alike.
        value: The number in `unit`; None where it is undefined (an F1 without a single yes).
        unit: `%`, `points` or `questions`.
        n: Questions behind the number.
        low: Lower end of the 95 % interval; None where there is none.
        high: Upper end.
    """

    metric: str
    value: float | None
    unit: str
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Result:
    """The scores of one model on one benchmark: the content of scores.json.

    Args:
        benchmark: Name of the benchmark.
        split: Name of its split.
        blind: The model was shown grey instead of every image.
        scores: Headline first; none for a split whose labels only a server has.
        num_questions: Questions in the split.
        n_asked: Questions that were asked; fewer than `num_questions` if a limit was set.
        n_failed: Questions without an answer, or whose answer could not be judged; the scores leave
            them out.
        n_empty: Answers without a visible character. They are scored as the benchmark says.
        all_empty: There is no other answer; then the first note says so.
        complete: Every question of the split has an answer and was judged: only then compare with
            published numbers.
        baselines: Headline metric of answers without a model, on the same questions.
        prompts_sha256: Hash of all ids, prompts and images.
        checkpoint_sha256: Hash of the model that answered.
        max_new_tokens: Longest answer, in tokens.
        protocol: How it was asked and read.
        rules: Whose prompt and rules these are: `official`, `lmms-eval` or `VLMEvalKit`.
        notes: Sentences that a reader must know.
        model: The engine, or the endpoint, that answered.
        fingerprint: Hash of all requests, prompts and images as they were sent; None for a model
            that is asked without requests.
        engine_check: Comparison of an engine's answers with its checkpoint's; None where there is
            nothing to compare.
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
    rules: str = "official"
    notes: tuple[str, ...] = ()
    n_empty: int = 0
    all_empty: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    engine_check: EngineCheck | None = None


def score_predictions(
    plan: Plan,
    predictions: Mapping[str, str],
    folder: Path,
    judge: Judge | None = None,
    model: Mapping[str, Any] | None = None,
) -> Result:
    """Score the answers and write scores.json, or the file that the benchmark's server takes.

    Args:
        plan: The questions that were asked.
        predictions: Question id to text.
        folder: Place of predictions.meta.json; gets scores.json, tally.json and the upload file.
        judge: Grader, where the benchmark wants one.
        model: The engine, or the endpoint, that answered.

    Raises:
        ValueError: Not one of the questions was answered, or not one answer could be judged, or the
            benchmark needs a judge.
    """
    header = read_json_object(folder / "predictions.meta.json")
    benchmark, server = plan.benchmark, plan.benchmark.splits[plan.split].server
    answered = [question for question in plan.asked if question.id in predictions]
    if not answered:
        first = next(read_lines(folder / "errors.jsonl"), None)
        reason = f" ({first['error']})" if first else ""
        raise ValueError(
            f"none of the {len(plan.asked)} questions of {plan.name} was answered{reason}: "
            f"see {folder / 'errors.jsonl'}"
        )
    all_answered = len(answered) == len(plan.questions)
    num_empty, notes = _count_empty(answered, predictions)
    notes += tuple(describe_refused("endpoint", (model or {}).get("refused", {})))

    # Score here, or leave that to the server.
    scores: tuple[Score, ...] = ()
    failed: Mapping[str, str] = {}
    rules = benchmark.rules
    if server is None:
        judgement = judge_answers(benchmark, answered, predictions, judge)
        scores, sums = grade(benchmark, judgement)
        notes, failed = (*notes, *judgement.notes), judgement.failed
        rules = judgement.rules or rules
        judged = [question for question in answered if question.id not in failed]
        pairable = _make_pairable(benchmark, judged, sums)
        write_whole(folder / "tally.json", json.dumps(pairable) + "\n")
        if not benchmark.by_likelihood:
            _write_page(plan, judgement, predictions, folder, scores[0])
        for question_id, error in failed.items():
            append_line(folder / "errors.jsonl", {"question_id": question_id, "error": error})
    else:
        uploads = _write_uploads(benchmark, answered, predictions, folder) if all_answered else ()
        note = f"no upload file for {server} until all are answered"
        if uploads:
            note = f"upload {' and '.join(map(str, uploads))} to {server}"
        notes = (*notes, f"the labels of {plan.split} are not public: {note}")

    # Write the scores, and the upload of a benchmark that has labels and a leaderboard.
    result = Result(
        benchmark=plan.name,
        split=plan.split,
        blind=plan.blind,
        scores=scores,
        num_questions=len(plan.questions),
        n_asked=len(plan.asked),
        n_failed=len(plan.asked) - len(answered) + len(failed),
        complete=all_answered and not failed,
        baselines={
            name: _measure_headline(benchmark, answered, answer(answered))
            for name, answer in benchmark.baselines.items()
        },
        prompts_sha256=header["prompts_sha256"],
        checkpoint_sha256=header["checkpoint_sha256"],
        max_new_tokens=header["max_new_tokens"],
        protocol=benchmark.protocol,
        rules=rules,
        notes=notes,
        n_empty=num_empty,
        all_empty=num_empty == len(answered),
        model=dict(model or {}),
        fingerprint=asked_hash(folder),
    )
    rows = [_describe_score(benchmark, score) for score in scores]
    content = json.dumps(
        asdict(result) | {"scores": rows}, indent=2, ensure_ascii=False, allow_nan=False
    )
    write_whole(folder / "scores.json", content + "\n")
    if all_answered and server is None:
        _write_uploads(benchmark, answered, predictions, folder)
    return result


def score_file(
    benchmark: Benchmark,
    annotations: Path | None,
    predictions_file: Path,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Score any model's predictions, with neither model nor images.

    Args:
        benchmark: The benchmark.
        annotations: Official annotation file, or the folder with the official files; None: the
            packaged copy, where there is one.
        predictions_file: A line `{"question_id": ..., "text": ...}` per question, in any order, or
            another form that `answer_files` lists.
        judge: Grader, where the benchmark wants one.

    Returns:
        `headline` (unrounded), `metrics` (`group.member` as `{group: {member: ...}}`),
        `per_question`; where the protocol has them `parsed`, `normalised`, `submission`; where a
        judge could not judge an answer `failed`, question id to the reason; then `unit`, `n`,
        `n_empty`, `all_empty`, `interval`, `protocol`, `notes`, `tally`. An undefined number is
        None.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is malformed, the predictions do not answer exactly the questions, or not
            one answer could be judged.
    """
    if annotations is None and not benchmark.packaged:
        raise ValueError(
            f"{benchmark.name} has no packaged copy: {benchmark.source}, and give it as annotations"
        )
    questions = benchmark.read_labels(annotations)
    if not questions:
        raise ValueError(f"{annotations} has no question: {benchmark.source}")
    predictions = read_answers(predictions_file, benchmark, questions)
    questions = [question for question in questions if question.id in predictions]
    num_empty, notes = _count_empty(questions, predictions)
    judgement = judge_answers(benchmark, questions, predictions, judge)
    (headline, *others), sums = grade(benchmark, judgement)

    # Metrics of one group stand together.
    metrics: dict[str, Any] = {headline.metric: headline.value}
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
        "failed": judgement.failed,
    }
    judged = [question for question in questions if question.id not in judgement.failed]
    return {
        "headline": headline.value,
        "metric": headline.metric,
        "unit": headline.unit,
        "n": headline.n,
        "n_empty": num_empty,
        "all_empty": num_empty == len(questions),
        "interval": [headline.low, headline.high],
        "metrics": metrics,
        "protocol": benchmark.protocol,
        "notes": [*notes, *judgement.notes],
        "per_question": {
            question_id: _finite(value) for question_id, value in judgement.per_question.items()
        },
        **{name: reading for name, reading in readings.items() if reading},
        "tally": _make_pairable(benchmark, judged, sums),
    }


def judge_answers(
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    judge: Judge | None,
) -> Judgement:
    """Return the benchmark's judgement, with notes on the answers that failed and on the judge.

    Raises:
        ValueError: A judge for a benchmark that has no use for it.
    """
    if benchmark.judge is None and judge is not None:
        raise ValueError(f"{benchmark.name} is scored by rules alone: leave the judge out")
    judgement = benchmark.score(questions, predictions, judge)
    if judge is None:
        return judgement

    notes = list(judgement.notes)
    if judgement.failed:
        question_id, error = next(iter(judgement.failed.items()))
        notes.append(
            f"{len(judgement.failed):,} of {len(questions):,} answers were not judged and are in "
            f"no score, such as that to {question_id}: {error}"
        )
    return replace(judgement, notes=(*notes, *judge.notes))


def grade(benchmark: Benchmark, judgement: Judgement) -> tuple[tuple[Score, ...], Tally]:
    """Return every metric with its 95 % interval, headline first, and the sums behind them.

    A plain count has no interval, nor has an official number that is not made from sums, nor what
    one image alone says.
    """
    sums = tally(judgement.contributions)
    totals = sums.totals()
    spread = intervals(sums, benchmark.measure)
    num_all = len(judgement.per_question)

    scores = []
    for name, value in values(sums, benchmark.measure).items():
        unit = benchmark.metric(name).unit
        has_interval = unit != "questions" and len(sums.clusters) > 1
        low, high = map(_finite, spread[name]) if has_interval else (None, None)
        num = _count_questions(name, totals, num_all)
        scores.append(Score(name, _finite(value), unit, num, low, high))
    for name, value in judgement.extra.items():
        scores.append(Score(name, _finite(value), benchmark.metric(name).unit, num_all))
    return tuple(scores), sums


def _count_empty(
    questions: Sequence[Question], predictions: Mapping[str, str]
) -> tuple[int, tuple[str, ...]]:
    """Return the number of answers that say nothing, and a note on answers like a broken model's.

    A model with weights that are not finite says nothing, or one token again and again.
    """
    texts = [predictions[question.id] for question in questions]
    num = sum(not _says_something(text) for text in texts)
    advice = (
        "look for weights that are not finite, a wrong chat template or a wrong file of answers"
    )

    if num == len(texts):
        note = f"all {num:,} answers are empty, so these numbers say nothing about the model"
        return num, (f"{note}: {advice}",)
    if num:
        return num, (f"{num:,} of {len(texts):,} answers are empty and scored as such",)
    if len(texts) >= _FEWEST_ALIKE and len(set(texts)) == 1:
        return 0, (f"all {len(texts):,} answers are {texts[0][:60]!r}: {advice}",)
    return 0, ()


def _says_something(text: str) -> bool:
    """Return whether a text has a visible character: no space, control or format character."""
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def _count_questions(name: str, totals: Totals, num_all: int) -> int:
    """Return the questions behind a metric.

    They are its own, those of its group (`adversarial.f1`), or all (a mean of F1s).
    """
    if name in totals.names:
        return int(totals.count(name))
    group, _, member = name.partition(".")
    alike = [other for other in totals.names if member and other.startswith(f"{group}.")]
    return max((int(totals.count(other)) for other in alike), default=num_all)


def _describe_score(benchmark: Benchmark, score: Score) -> dict[str, Any]:
    """Return a score as scores.json has it."""
    metric = benchmark.metric(score.metric)
    row = asdict(score) | {"description": metric.description}
    return row | ({"column": metric.column} if metric.column else {})


def _write_uploads(
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    folder: Path,
) -> tuple[Path, ...]:
    """Write what the benchmark's server takes.

    Only complete answers make an upload, because a server counts a missing one as wrong.
    """
    if benchmark.submission is None:
        return ()
    files = benchmark.submission(questions, predictions)
    for name, data in files.items():
        write_whole(folder / name, data)
    return tuple(folder / name for name in files)


def _write_page(
    plan: Plan,
    judgement: Judgement,
    predictions: Mapping[str, str],
    folder: Path,
    headline: Score,
) -> None:
    from mipha.evaluation.worst_cases import write_worst_cases  # it takes what reads images

    value = "undefined" if headline.value is None else f"{headline.value:.1f} {headline.unit}"
    write_worst_cases(plan, judgement, predictions, folder, f"{headline.metric} {value}")


def _make_pairable(
    benchmark: Benchmark, questions: Sequence[Question], sums: Tally
) -> dict[str, Any]:
    """Return a tally with what two of them must share to be compared pair by pair."""
    ids = [question.id for question in questions]
    if benchmark.own_metric:
        # The ids of own data are often mere numbers, so the questions tell two sets apart.
        ids = [f"{one.id}\t{_content_of(one)}" for one in questions]
    content = "\n".join(sorted(ids)).encode("utf-8", "surrogatepass")
    names = {"benchmark": benchmark.name, "ids_sha256": hashlib.sha256(content).hexdigest()}
    own = {"own_metric": benchmark.own_metric} if benchmark.own_metric else {}
    return names | own | sums.as_json()


def _content_of(question: Question) -> str:
    """Return what is asked and what is right, the same for models that write boxes otherwise."""
    own = f"{question.text}\t{question.facts['answers']}"
    return str(question.facts.get("same_as", own))


def _measure_headline(
    benchmark: Benchmark, questions: Sequence[Question], answers: Mapping[str, str]
) -> float:
    sums = tally(benchmark.score(questions, answers, None).contributions)
    return next(iter(values(sums, benchmark.measure).values()))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
