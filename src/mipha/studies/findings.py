"""What a study's runs say: scores of each variant over its seeds, the planned comparisons, and whether each takeaway holds.

Only the pairs that a takeaway names are tested, and all of a study's p-values are adjusted together (Holm): looking at every pair
would make chance findings of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mipha.comparison.statistics import (
    SeedDifference,
    Tally,
    holm,
    read_tally,
    seed_difference,
)
from mipha.evaluation.benchmark import Benchmark, Metric, load_benchmark
from mipha.files import read_lines
from mipha.lookup import did_you_mean
from mipha.recipe import STAGES
from mipha.run import flat, open_run
from mipha.studies.folder import Job, jobs_of
from mipha.studies.study import Measured, Study, Takeaway, Variant

Verdict = Literal["holds", "does not hold", "not enough runs"]
ALPHA = 0.05


@dataclass(frozen=True)
class Cost:
    """What one run took.

    Args:
        minutes: Training time of both stages, as if each were its own.
        memory: Peak, GiB.
        tokens: Real ones trained on.
    """

    minutes: float
    memory: float
    tokens: int


@dataclass(frozen=True)
class VariantScores:
    """A variant's headline score on one benchmark, a value a finished run."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; NaN of one run."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """A planned comparison on one benchmark: first minus second."""

    first: str
    second: str
    benchmark: str
    found: SeedDifference
    p_holm: float


@dataclass(frozen=True)
class Judged:
    """A takeaway with its verdict on each benchmark, and the comparisons behind it."""

    takeaway: Takeaway
    verdicts: dict[str, Verdict]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Findings:
    """All that a report shows.

    Args:
        headline: Benchmark to the metric that is compared.
        scores: Variant, then benchmark.
        details: Variant, then benchmark, then every metric of it that was measured.
        costs: Variant to its runs' costs, over finished runs.
        differences: Variant to recipe keys in which variants differ, with its own values.
        num_missing: Runs that the study asks for and that are not finished.
    """

    study: Study
    scale: str
    variants: tuple[Variant, ...]
    headline: dict[str, Metric]
    scores: dict[str, dict[str, VariantScores]]
    details: dict[str, dict[str, dict[str, VariantScores]]]
    costs: dict[str, tuple[Cost, ...]]
    differences: dict[str, dict[str, object]]
    judged: tuple[Judged, ...]
    num_missing: int


def find(study: Study, scale: str, out: Path) -> Findings:
    """Read the runs of a study's folder.

    Raises:
        FileNotFoundError: No run is finished.
        ValueError: The metric to compare by is none of the benchmark's, or was not measured.
    """
    size = study.scale(scale)
    variants = study.variants(scale)
    seeds = max(
        (int(path.name.removeprefix("seed-")) + 1 for path in (out / "runs").glob("*/seed-*")),
        default=0,
    )
    jobs = jobs_of(study, scale, out, seeds)
    benchmarks = [wanted.benchmark for wanted in size.evaluate]
    tallies = {
        (variant.name, name): _tallies(jobs, variant.name, name)
        for variant in variants
        for name in benchmarks
    }
    if not any(tallies.values()):
        raise FileNotFoundError(
            f"{out} has no finished run: make them with `mipha study run {study.name} -o {out}`"
        )
    headline = {wanted.benchmark: compared_by(wanted) for wanted in size.evaluate}
    measures = {name: load_benchmark(name).measure for name in benchmarks}
    details = {
        variant.name: {
            name: _details(load_benchmark(name), tallies[variant.name, name]) for name in benchmarks
        }
        for variant in variants
    }
    for variant, name in tallies:
        if details[variant][name] and headline[name].name not in details[variant][name]:
            measured = f"runs of {variant} were measured on {name} without {headline[name].name}"
            raise ValueError(f"{measured}: remove their evaluation folders and run the study again")
    scores = {
        variant: {
            name: found.get(headline[name].name, VariantScores(()))
            for name, found in of_benchmark.items()
        }
        for variant, of_benchmark in details.items()
    }
    compared = _compare(
        size.takeaways,
        benchmarks,
        tallies,
        measures,
        {name: headline[name].name for name in benchmarks},
    )
    done = [job for job in jobs if open_run(job.folder).is_finished("finetune")]
    return Findings(
        study,
        scale,
        tuple(variants),
        headline,
        scores,
        details,
        {
            variant.name: tuple(_cost(job) for job in done if job.variant == variant.name)
            for variant in variants
        },
        _differences(variants),
        tuple(_judge(takeaway, benchmarks, compared) for takeaway in size.takeaways),
        len(jobs) - len(done),
    )


def compared_by(wanted: Measured) -> Metric:
    """The metric that variants are compared by.

    Raises:
        ValueError: The benchmark has no such metric.
    """
    metrics = {metric.name: metric for metric in load_benchmark(wanted.benchmark).metrics}
    if wanted.metric is not None and wanted.metric not in metrics:
        raise ValueError(
            f"benchmark {wanted.benchmark} has no metric {wanted.metric!r}: {did_you_mean(wanted.metric, metrics)}"
        )
    return metrics[wanted.metric] if wanted.metric else next(iter(metrics.values()))


def judge(takeaway: Takeaway, found: SeedDifference, p_holm: float) -> Verdict:
    """Whether one comparison bears a takeaway out.

    `better` holds where the difference is above zero beyond chance; it fails where the whole interval lies below what counts as a
    difference. `on_par` holds where the whole interval lies within that, and fails where the difference is beyond it and beyond
    chance. `not_better` holds where the whole interval lies below it. All else wants more runs.
    """
    margin = takeaway.within
    if math.isnan(found.p_value):
        return "not enough runs"
    sure = p_holm < ALPHA
    if takeaway.better:
        return (
            "holds"
            if sure and found.difference > 0
            else "does not hold"
            if found.high < margin
            else "not enough runs"
        )
    if takeaway.on_par:
        inside = -margin < found.low and found.high < margin
        return (
            "holds"
            if inside
            else "does not hold"
            if sure and abs(found.difference) > margin
            else "not enough runs"
        )
    return (
        "holds"
        if found.high < margin
        else "does not hold"
        if sure and found.difference > margin
        else "not enough runs"
    )


def _compare(
    takeaways: Sequence[Takeaway],
    benchmarks: Sequence[str],
    tallies: dict[tuple[str, str], list[Tally]],
    measures: dict,
    metrics: dict[str, str],
) -> dict[tuple[str, str, str], Comparison]:
    pairs = dict.fromkeys(pair for takeaway in takeaways for pair in takeaway.pairs)
    found = {}
    for first, second in pairs:
        for name in benchmarks:
            a, b = tallies[first, name], tallies[second, name]
            if a and b:
                found[first, second, name] = seed_difference(a, b, measures[name], metrics[name])
    tested = [key for key, difference in found.items() if not math.isnan(difference.p_value)]
    adjusted = dict(zip(tested, holm([found[key].p_value for key in tested]), strict=True))
    return {
        key: Comparison(*key, difference, adjusted.get(key, math.nan))
        for key, difference in found.items()
    }


def _judge(
    takeaway: Takeaway, benchmarks: Sequence[str], compared: dict[tuple[str, str, str], Comparison]
) -> Judged:
    verdicts: dict[str, Verdict] = {}
    for name in benchmarks:
        parts = [compared.get((*pair, name)) for pair in takeaway.pairs]
        each = [
            judge(takeaway, part.found, part.p_holm) if part else "not enough runs"
            for part in parts
        ]
        verdicts[name] = (
            "does not hold"
            if "does not hold" in each
            else "not enough runs"
            if "not enough runs" in each
            else "holds"
        )
    used = tuple(comparison for key, comparison in compared.items() if key[:2] in takeaway.pairs)
    return Judged(takeaway, verdicts, used)


def _tallies(jobs: Sequence[Job], variant: str, benchmark: str) -> list[Tally]:
    found = []
    for job in jobs:
        files = (
            sorted((job.folder / "evaluation").glob("*/tally.json"))
            if job.variant == variant
            else []
        )
        contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        found += [read_tally(content) for content in contents if content["benchmark"] == benchmark]
    return found


def _details(benchmark: Benchmark, tallies: Sequence[Tally]) -> dict[str, VariantScores]:
    """Every metric over the runs, in the benchmark's order; those that some run has no number of are left out."""
    runs = [benchmark.measure(tally.totals()) for tally in tallies]
    named = (
        [metric.name for metric in benchmark.metrics if all(metric.name in found for found in runs)]
        if runs
        else []
    )
    return {name: VariantScores(tuple(float(found[name]) for found in runs)) for name in named}


def _cost(job: Job) -> Cost:
    rows = [row for stage in STAGES for row in read_lines(open_run(job.folder).metrics(stage))]
    memory = max((row["peak_memory_gib"] for row in rows), default=math.nan)
    return Cost(
        sum(row["seconds"] for row in rows) / 60, memory, sum(row["tokens"] for row in rows)
    )


def _differences(variants: Sequence[Variant]) -> dict[str, dict[str, object]]:
    trees = {variant.name: _values(variant) for variant in variants}
    keys = dict.fromkeys(key for tree in trees.values() for key in tree)
    differing = [
        key for key in keys if len({json.dumps(tree.get(key)) for tree in trees.values()}) > 1
    ]
    return {name: {key: tree.get(key) for key in differing} for name, tree in trees.items()}


def _values(variant: Variant) -> dict[str, object]:
    """Recipe key to value; an empty group of keys says nothing."""
    values = flat(variant.recipe.model_dump(mode="json", exclude={"name", "description"}))
    return {key: value for key, value in values.items() if value != {}}
