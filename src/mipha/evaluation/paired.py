"""Two models on the same questions: is the difference more than chance?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipha.comparison.results import missing_scores
from mipha.comparison.statistics import PairedDifference, holm, paired_differences, read_tally
from mipha.evaluation.benchmark import Benchmark, load_benchmark
from mipha.evaluation.own_data import own_benchmark
from mipha.files import read_json, read_json_object


@dataclass(frozen=True)
class PairedRow:
    """One metric of one benchmark.

    Args:
        benchmark: Name of the benchmark's folder in the results, with the split and `-blind`.
        metric: Name of the metric; the headline comes first.
        unit: Unit of the difference.
        paired: The first model minus the second.
        p_holm: The headline's p-value, adjusted for the number of benchmarks; None for other
            metrics.
    """

    benchmark: str
    metric: str
    unit: str
    paired: PairedDifference
    p_holm: float | None


def compare_paired(a: str | Path, b: str | Path, num_resamples: int = 2000) -> list[PairedRow]:
    """Return the difference a - b on every metric of every benchmark that both have scores of.

    Args:
        a: A run, a folder of results (`mipha evaluate -o`), or a file of `mipha score --json`.
        b: The same of the other model.
        num_resamples: Resamples of the intervals, and swaps of the permutation tests.

    Raises:
        FileNotFoundError: No results.
        ValueError: No benchmark in common, or other questions on one that is.
    """
    left, right = results_of(Path(a)), results_of(Path(b))
    shared = [name for name in left if name in right]
    if not shared:
        raise ValueError(
            f"{a} has {', '.join(left)} and {b} has {', '.join(right)}: nothing to pair, "
            "evaluate both on one benchmark"
        )

    # Every metric of every shared benchmark.
    benchmarks = {name: _benchmark_of(left[name]) for name in shared}
    found = {}
    for name, benchmark in benchmarks.items():
        if left[name].get("own_metric") != right[name].get("own_metric"):
            raise ValueError(
                f"{name}: {a} is scored by {left[name].get('own_metric')} and {b} by "
                f"{right[name].get('own_metric')}: evaluate both with one --metric"
            )
        if left[name]["ids_sha256"] != right[name]["ids_sha256"]:
            raise ValueError(
                f"{name}: {a} and {b} did not answer the same questions: "
                "evaluate both on the same set, to the end"
            )
        tallies = read_tally(left[name]), read_tally(right[name])
        found[name] = paired_differences(*tallies, benchmark.measure, num_resamples)

    # Adjust the headlines for their number. A headline that is undefined for one of the two (an F1
    # without a right yes) has no test, and no other metric takes its place.
    headlines = {name: benchmark.headline.name for name, benchmark in benchmarks.items()}
    tested = [name for name in shared if headlines[name] in found[name]]
    p_values = [found[name][headlines[name]].p_value for name in tested]
    adjusted = dict(zip(tested, holm(p_values), strict=True))

    return [
        PairedRow(
            name,
            metric,
            benchmarks[name].metric(metric).unit,
            paired,
            adjusted.get(name) if metric == headlines[name] else None,
        )
        for name in shared
        for metric, paired in found[name].items()
    ]


def _benchmark_of(tally: dict[str, Any]) -> Benchmark:
    """Return the benchmark whose sums a tally holds."""
    if metric := tally.get("own_metric"):
        return own_benchmark(metric)
    return load_benchmark(tally["benchmark"])


def results_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return name of a benchmark's results to the content of their tally.json.

    Raises:
        FileNotFoundError: There are none.
    """
    if path.is_file():
        content = read_json(path)
        if not isinstance(content, dict) or "tally" not in content:
            raise ValueError(
                f"{path} is not a file that `mipha score --json` wrote: give one, or a run"
            )
        return {content["tally"]["benchmark"]: content["tally"]}

    folder = path / "evaluation" if (path / "evaluation").is_dir() else path
    found = {
        file.parent.name: read_json_object(file) for file in sorted(folder.glob("*/tally.json"))
    }
    if not found:
        if not path.is_dir():
            raise FileNotFoundError(
                f"no file or folder {path}: give a run, a folder of results, or a file of "
                "`mipha score --json`"
            )
        scored = [file.parent.name for file in sorted(folder.glob("*/scores.json"))]
        if scored:
            raise FileNotFoundError(
                f"{path} has no tally.json beside the scores of {', '.join(scored)}: evaluate "
                "again, or copy it too"
            )
        raise missing_scores(path)
    return found
