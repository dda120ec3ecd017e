"""What a benchmark is: its questions, and a pure function from answers to scores."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from mipha.lookup import did_you_mean, files_in

BENCHMARKS = Path(__file__).parent / "benchmarks"


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Args:
        id: Unique in the benchmark.
        text: The full prompt, without an image marker.
        image: A path, the bytes of an image file, or None for a question without an image.
        facts: Whatever the scorer needs: gold answer, kind, image id.
    """

    id: str
    text: str
    image: Path | bytes | None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """What a score measures: its name, its unit, and one line of explanation."""

    name: str
    unit: str
    description: str


@dataclass(frozen=True)
class Score:
    """One number.

    Args:
        metric: Name of a `Metric`.
        value: In `unit`.
        unit: `%`, `points` or `questions`.
        n: Questions that the number rests on.
        low: Lower end of the 95 % interval; None where there is none (a count).
        high: Upper end.
    """

    metric: str
    value: float
    unit: str
    n: int
    low: float | None = None
    high: float | None = None


class Benchmark(Protocol):
    """What a module in `evaluation/benchmarks` must have; nothing is registered, the folder is the list.

    Args:
        METRICS: Every metric that `score` may give, the headline first.
        SPLITS: Names that `questions` takes, the one to report first.
        PROTOCOL: One sentence that goes into scores.json: prompt, how an answer is read, how the interval is made.
        MAX_NEW_TOKENS: Longest answer, in tokens.
        BASELINES: Name to a function that answers the questions without a model; empty where there is none.
    """

    METRICS: tuple[Metric, ...]
    SPLITS: tuple[str, ...]
    PROTOCOL: str
    MAX_NEW_TOKENS: int
    BASELINES: Mapping[str, Callable[[Sequence[Question]], dict[str, str]]]

    def questions(self, root: Path | None, split: str) -> Sequence[Question]:
        """Every question of the split in the official order, unique ids; root None: the packaged copy, where there is one."""
        ...

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> list[Score]:
        """Scores of the answers, headline first. Pure; every question has a prediction, because `evaluation.score` drops
        and counts the questions that failed."""
        ...


def list_benchmarks() -> list[str]:
    """Names of the benchmarks."""
    return files_in(BENCHMARKS, ".py")


def load_benchmark(name: str) -> Benchmark:
    """Import one benchmark.

    Raises:
        ValueError: No such benchmark.
    """
    if name not in list_benchmarks():
        raise ValueError(f"no benchmark {name!r}: {did_you_mean(name, list_benchmarks())}")
    return cast(Benchmark, importlib.import_module(f"mipha.evaluation.benchmarks.{name}"))
