"""What a benchmark is: its questions, and pure functions from answers to numbers.

official files --annotations / questions--> [Question]  --a model, or a file--> id -> text
               --score--> Judgement (question by question)  --measure--> every metric
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.lookup import did_you_mean, files_in

BENCHMARKS = Path(__file__).parent / "benchmarks"


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Args:
        id: Unique in the benchmark.
        text: The full prompt, without an image marker; the bare question where only labels were read.
        image: A path, the bytes of an image file, or None for a question without an image.
        facts: Whatever the scorer needs: gold answer, kind, image id; without a label for a private split. `optional`: a predictions
            file may do without it.
    """

    id: str
    text: str
    image: Path | bytes | None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """What a score measures: its name, its unit (`%`, `points`, `questions`), and one line of explanation.

    `subset` describes `subset.anything` as well.
    """

    name: str
    unit: str
    description: str


@dataclass(frozen=True)
class Judgement:
    """What answers are worth, question by question.

    Args:
        per_question: Question id to the official per-question score, mostly 0 to 1.
        contributions: One (cluster, name -> amount) a question, in any order: what the metrics add up. The cluster is what questions
            share: the image.
        parsed: Question id to what was read out of the text; None where nothing could be read.
        normalised: Question id to the text as it was compared.
        submission: Question id to the answer string that goes into the upload, for a benchmark with a server.
        extra: Further official numbers that no sum over questions gives; they get no interval.
        notes: What a reader must know about these numbers, a sentence each.
    """

    per_question: Mapping[str, float]
    contributions: Sequence[tuple[Hashable, Mapping[str, float]]]
    parsed: Mapping[str, str | None] | None = None
    normalised: Mapping[str, str] | None = None
    submission: Mapping[str, str] | None = None
    extra: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """One number.

    Args:
        metric: Its name; `group.member` for one of several alike.
        value: In `unit`; None where it is undefined (an F1 without a single yes).
        unit: `%`, `points` or `questions`.
        n: Questions that the number rests on.
        low: Lower end of the 95 % interval; None where there is none.
        high: Upper end.
    """

    metric: str
    value: float | None
    unit: str
    n: int
    low: float | None = None
    high: float | None = None


class Judge(Protocol):
    """A language model that grades; see `mipha.evaluation.judge`.

    Args:
        num_runs: How often every question was graded, where that was recorded; None: the benchmark decides.
    """

    @property
    def num_runs(self) -> int | None: ...

    def ask(
        self,
        question_id: str,
        prompt: str,
        *,
        run: int = 0,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 16,
    ) -> str:
        """The judge's reply to a prompt."""
        ...


class Benchmark(Protocol):
    """What a module in `evaluation/benchmarks` must have; nothing is registered, the folder is the list.

    Args:
        METRICS: Every metric that `measure` or `Judgement.extra` may give, the headline first.
        SPLITS: Names that `questions` takes, the one to report first.
        SIZES: Split to the official number of questions.
        SERVERS: Split whose labels are private to the server that scores an upload.
        PROTOCOL: One sentence that goes into scores.json: prompt, how an answer is read, what is averaged, clusters of the interval.
        SOURCE: One sentence: where the official files are had, and what they are called.
        MAX_NEW_TOKENS: Longest answer, in tokens.
        BASELINES: Name to a function that answers the questions without a model; empty where there is none.
        JUDGE: Whether a judge grades: `required` (no score without one), `optional`, or None. A judged module's `score` takes a
            third argument `judge: Judge | None = None`.
    """

    __name__: str
    METRICS: tuple[Metric, ...]
    SPLITS: tuple[str, ...]
    SIZES: Mapping[str, int]
    SERVERS: Mapping[str, str]
    PROTOCOL: str
    SOURCE: str
    MAX_NEW_TOKENS: int
    BASELINES: Mapping[str, Callable[[Sequence[Question]], dict[str, str]]]
    JUDGE: Literal["required", "optional"] | None

    def questions(self, root: Path | None, split: str) -> Sequence[Question]:
        """Every question of the split in the official order with prompt and image, unique ids.

        Args:
            root: Folder with the official files; None: the packaged copy, where there is one.

        Raises:
            FileNotFoundError: A file or an image is missing.
            ValueError: No such split, or a malformed file: names the file and the line or the record.
        """
        ...

    def annotations(self, path: Path) -> Sequence[Question]:
        """The labelled questions of the official annotation file (or of the folder with the official files), without images."""
        ...

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> Judgement:
        """What the answers are worth. Pure; the text is taken verbatim; every question has a prediction and a label."""
        ...

    def measure(self, totals: Totals) -> dict[str, np.ndarray]:
        """Every metric from the sums of contributions, headline first, in its unit and unrounded; on any shape of totals."""
        ...

    def submission(
        self, questions: Sequence[Question], predictions: Mapping[str, str]
    ) -> dict[str, bytes]:
        """File name to content of what the benchmark's server takes; empty where there is no server."""
        ...

    def doubts(self, questions: Sequence[Question], split: str) -> list[str]:
        """One sentence for each sign that these are not the files of the protocol, beyond the number of questions."""
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


def describe(benchmark: Benchmark, name: str) -> Metric:
    """The metric of this name, or of its group."""
    by_name = {metric.name: metric for metric in benchmark.METRICS}
    found = by_name.get(name) or by_name.get(name.partition(".")[0])
    assert found is not None, f"METRICS lacks {name}"
    return found
