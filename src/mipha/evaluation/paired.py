"""Two models on the same questions: is the difference more than chance?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipha.comparison.statistics import PairedDifference, holm, paired_differences, read_tally
from mipha.evaluation.benchmark import describe, load_benchmark
from mipha.evaluation.files import read_json


@dataclass(frozen=True)
class PairedRow:
    """One metric of one benchmark.

    Args:
        benchmark: Its folder's name in the results: the split and `-blind` are part of it.
        metric: Headline first.
        unit: Of the difference.
        paired: Of the first model minus the second.
        p_holm: The headline's p-value, adjusted for the number of benchmarks; None for other metrics.
    """

    benchmark: str
    metric: str
    unit: str
    paired: PairedDifference
    p_holm: float | None


def compare_paired(a: str | Path, b: str | Path, num_resamples: int = 2000) -> list[PairedRow]:
    """The difference a - b on every metric of every benchmark that both have scores of.

    Args:
        a: A run, a folder of results (`mipha evaluate -o`), or one file that `mipha score --json` wrote.
        b: The same.
        num_resamples: Of the intervals, and of the permutation tests.

    Raises:
        FileNotFoundError: No results.
        ValueError: No benchmark in common, or other questions on one that is.
    """
    left, right = results_of(Path(a)), results_of(Path(b))
    shared = [name for name in left if name in right]
    if not shared:
        raise ValueError(
            f"{a} has {', '.join(left)} and {b} has {', '.join(right)}: nothing to pair, evaluate both on one benchmark"
        )
    found = {}
    for name in shared:
        if left[name]["ids_sha256"] != right[name]["ids_sha256"]:
            raise ValueError(
                f"{name}: {a} and {b} did not answer the same questions: evaluate both on the same set, to the end"
            )
        measure = load_benchmark(left[name]["benchmark"]).measure
        found[name] = paired_differences(
            read_tally(left[name]), read_tally(right[name]), measure, num_resamples
        )
    headlines = {name: load_benchmark(left[name]["benchmark"]).METRICS[0].name for name in shared}
    # Where the headline is undefined for one of the two (an F1 without a right yes), no other metric takes its place.
    tested = [name for name in shared if headlines[name] in found[name]]
    adjusted = dict(
        zip(tested, holm([found[name][headlines[name]].p_value for name in tested]), strict=True)
    )
    rows = []
    for name in shared:
        benchmark = load_benchmark(left[name]["benchmark"])
        for metric, paired in found[name].items():
            unit = describe(benchmark, metric).unit
            rows.append(
                PairedRow(
                    name,
                    metric,
                    unit,
                    paired,
                    adjusted.get(name) if metric == headlines[name] else None,
                )
            )
    return rows


def results_of(path: Path) -> dict[str, dict[str, Any]]:
    """Name of a benchmark's results to the content of their tally.json.

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
    found = {file.parent.name: read_json(file) for file in sorted(folder.glob("*/tally.json"))}
    if not found:
        raise FileNotFoundError(
            f"{path} has no scores: make them with `mipha evaluate {path} -b ...`"
        )
    return found
