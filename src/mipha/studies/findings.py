"""Findings of a study: each variant's scores, planned comparisons, each takeaway's verdict.

Only the pairs that a takeaway names are tested, and all p-values of a study are adjusted together
(Holm): looking at every pair would make findings of chance.
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
from mipha.files import read_json, read_lines
from mipha.lookup import did_you_mean
from mipha.recipe import flatten
from mipha.studies.first_token import FirstToken, first_token_of
from mipha.studies.folder import Job, jobs_of
from mipha.studies.study import Experiment, Measured, Takeaway, Variant

Verdict = Literal["holds", "does not hold", "not enough runs"]
ALPHA = 0.05


@dataclass(frozen=True)
class Cost:
    """The cost of one run.

    Args:
        minutes: Training time of all stages, as if each were its own.
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
class VariantComparison:
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
    comparisons: tuple[VariantComparison, ...]


@dataclass(frozen=True)
class Findings:
    """All that a report shows.

    Args:
        experiment: The study at one scale.
        headline: Benchmark to the metric that is compared.
        scores: Variant, then benchmark.
        details: Variant, then benchmark, then every metric of it that was measured.
        costs: Variant to its runs' costs, over finished runs.
        first_tokens: Variant to the price of an image; empty where the study does not measure it.
        differences: Variant to recipe keys in which variants differ, with its own values.
        judged: Every takeaway with its verdicts.
        num_missing: Runs that the study asks for and that are not finished.
    """

    experiment: Experiment
    headline: dict[str, Metric]
    scores: dict[str, dict[str, VariantScores]]
    details: dict[str, dict[str, dict[str, VariantScores]]]
    costs: dict[str, tuple[Cost, ...]]
    first_tokens: dict[str, FirstToken]
    differences: dict[str, dict[str, object]]
    judged: tuple[Judged, ...]
    num_missing: int


def find(experiment: Experiment, out: Path) -> Findings:
    """Read the runs of a study's folder.

    Raises:
        FileNotFoundError: No run is finished.
        ValueError: The metric to compare by is none of the benchmark's, or was not measured.
    """
    asked = experiment.asked
    names = [variant.name for variant in experiment.variants]
    benchmarks = {wanted.benchmark: load_benchmark(wanted.benchmark) for wanted in asked.evaluate}
    headline = {wanted.benchmark: compared_by(wanted) for wanted in asked.evaluate}

    # Read the measurements of each run.
    seeds = [int(path.name.removeprefix("seed-")) for path in (out / "runs").glob("*/seed-*")]
    jobs = jobs_of(experiment, out, max(seeds, default=-1) + 1)
    tallies = {
        (variant, name): _tallies(jobs, variant, name) for variant in names for name in benchmarks
    }
    if not any(tallies.values()):
        raise FileNotFoundError(
            f"{out} has no finished run: "
            f"make them with `mipha study run {experiment.name} -o {out}`"
        )

    # Every metric, and of them the one that variants are compared by.
    details = {
        variant: {
            name: _details(benchmark, tallies[variant, name])
            for name, benchmark in benchmarks.items()
        }
        for variant in names
    }
    for variant, name in tallies:
        if details[variant][name] and headline[name].name not in details[variant][name]:
            raise ValueError(
                f"runs of {variant} were measured on {name} without {headline[name].name}: "
                "remove their evaluation folders and run the study again"
            )
    scores = {
        variant: {
            name: found.get(headline[name].name, VariantScores(()))
            for name, found in of_benchmark.items()
        }
        for variant, of_benchmark in details.items()
    }

    # Judge the takeaways.
    compared = _compare(asked.takeaways, benchmarks, headline, tallies)
    judged = tuple(_judge(takeaway, list(benchmarks), compared) for takeaway in asked.takeaways)

    done = [job for job in jobs if job.is_trained]
    costs = {
        variant: tuple(_cost(job) for job in done if job.variant == variant) for variant in names
    }
    timed = {job.variant: first_token_of(job.folder) for job in jobs if job.seed == 0}
    return Findings(
        experiment,
        headline,
        scores,
        details,
        costs,
        {variant: found for variant, found in timed.items() if found is not None},
        _differences(experiment.variants),
        judged,
        num_missing=len(jobs) - len(done),
    )


def compared_by(wanted: Measured) -> Metric:
    """Return the metric that variants are compared by.

    Raises:
        ValueError: The benchmark has no such metric.
    """
    metrics = {metric.name: metric for metric in load_benchmark(wanted.benchmark).metrics}
    if wanted.metric is not None and wanted.metric not in metrics:
        near = did_you_mean(wanted.metric, metrics)
        raise ValueError(f"benchmark {wanted.benchmark} has no metric {wanted.metric!r}: {near}")
    return metrics[wanted.metric] if wanted.metric else next(iter(metrics.values()))


def judge(takeaway: Takeaway, found: SeedDifference, p_holm: float) -> Verdict:
    """Return whether one comparison bears a takeaway out.

    The margin is the takeaway's `within`. All else wants more runs:

    - `better` holds where the difference is above zero beyond chance. It fails where the whole
      interval lies below the margin.
    - `on_par` holds where the whole interval lies within the margin. It fails where the difference
      is beyond the margin and beyond chance.
    - `not_better` holds where the whole interval lies below the margin. It fails where the
      difference is above the margin and beyond chance.
    """
    margin = takeaway.within
    if math.isnan(found.p_value):
        return "not enough runs"
    beyond_chance = p_holm < ALPHA

    if takeaway.better:
        holds = beyond_chance and found.difference > 0
        fails = found.high < margin
    elif takeaway.on_par:
        holds = -margin < found.low and found.high < margin
        fails = beyond_chance and abs(found.difference) > margin
    else:
        holds = found.high < margin
        fails = beyond_chance and found.difference > margin
    return "holds" if holds else "does not hold" if fails else "not enough runs"


def _compare(
    takeaways: Sequence[Takeaway],
    benchmarks: dict[str, Benchmark],
    headline: dict[str, Metric],
    tallies: dict[tuple[str, str], list[Tally]],
) -> dict[tuple[str, str, str], VariantComparison]:
    """Return (variant, variant, benchmark) to the comparison, for all pairs of the takeaways."""
    pairs = dict.fromkeys(pair for takeaway in takeaways for pair in takeaway.pairs)
    found = {}
    for first, second in pairs:
        for name, benchmark in benchmarks.items():
            a, b = tallies[first, name], tallies[second, name]
            if a and b:
                found[first, second, name] = seed_difference(
                    a, b, benchmark.measure, headline[name].name
                )

    tested = [key for key, difference in found.items() if not math.isnan(difference.p_value)]
    adjusted = dict(zip(tested, holm([found[key].p_value for key in tested]), strict=True))
    return {
        key: VariantComparison(*key, difference, adjusted.get(key, math.nan))
        for key, difference in found.items()
    }


def _judge(
    takeaway: Takeaway,
    benchmarks: Sequence[str],
    compared: dict[tuple[str, str, str], VariantComparison],
) -> Judged:
    verdicts: dict[str, Verdict] = {}
    for name in benchmarks:
        parts = [compared.get((*pair, name)) for pair in takeaway.pairs]
        each: list[Verdict] = [
            judge(takeaway, part.found, part.p_holm) if part else "not enough runs"
            for part in parts
        ]
        # One that fails decides, then one that is open.
        worst: tuple[Verdict, ...] = ("does not hold", "not enough runs", "holds")
        verdicts[name] = next(verdict for verdict in worst if verdict in each)

    used = tuple(comparison for key, comparison in compared.items() if key[:2] in takeaway.pairs)
    return Judged(takeaway, verdicts, used)


def _tallies(jobs: Sequence[Job], variant: str, benchmark: str) -> list[Tally]:
    """Return the contribution of each run of a variant to a benchmark's metrics."""
    contents = [
        read_json(file)
        for job in jobs
        if job.variant == variant
        for file in sorted((job.folder / "evaluation").glob("*/tally.json"))
    ]
    return [read_tally(content) for content in contents if content["benchmark"] == benchmark]


def _details(benchmark: Benchmark, tallies: Sequence[Tally]) -> dict[str, VariantScores]:
    """Return every metric that all runs have a number of, in the benchmark's order."""
    if not tallies:
        return {}
    runs = [benchmark.measure(tally.totals()) for tally in tallies]
    named = [
        metric.name for metric in benchmark.metrics if all(metric.name in found for found in runs)
    ]
    return {name: VariantScores(tuple(float(found[name]) for found in runs)) for name in named}


def _cost(job: Job) -> Cost:
    rows = [row for stage in job.recipe.stages for row in read_lines(job.run.metrics(stage))]
    return Cost(
        minutes=sum(row["seconds"] for row in rows) / 60,
        memory=max((row["peak_memory_gib"] for row in rows), default=math.nan),
        tokens=sum(row["tokens"] for row in rows),
    )


def _differences(variants: Sequence[Variant]) -> dict[str, dict[str, object]]:
    """Return, for each variant, the recipe keys in which variants differ, with its values."""
    trees = {variant.name: _values(variant) for variant in variants}
    keys = dict.fromkeys(key for tree in trees.values() for key in tree)
    differing = [
        key for key in keys if len({json.dumps(tree.get(key)) for tree in trees.values()}) > 1
    ]
    return {name: {key: tree.get(key) for key in differing} for name, tree in trees.items()}


def _values(variant: Variant) -> dict[str, object]:
    """Return recipe key to value; an empty group of keys is left out."""
    values = flatten(variant.recipe.model_dump(mode="json", exclude={"name", "description"}))
    return {key: value for key, value in values.items() if value != {}}
