"""The benchmark object: its questions, and pure functions from answers to numbers.

A benchmark is one module in `evaluation/benchmarks` that ends with `BENCHMARK = Benchmark(...)`:

official files --read / read_labels--> [Question] --a model, or a file--> id -> text
               --score--> Judgement (question by question) --measure--> every metric
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.data.images import ImageSource
from mipha.data.regions import Numbers
from mipha.data.sample import IMAGE, Message
from mipha.lookup import did_you_mean, files_in

BENCHMARKS = Path(__file__).parent / "benchmarks"

Image = ImageSource
"""A path, the bytes of an image file, or a place in a larger file."""


@dataclass(frozen=True)
class Question:
    """One question to a model.

    Args:
        id: Unique in the benchmark.
        text: The full prompt, without an image marker. Where only labels were read, it may be the
            bare question.
        image: A path, the bytes of an image file, a tuple of several of these in the order in which
            they are shown, or None for a question without an image. A place in a larger file stands
            in a tuple.
        facts: Whatever the scorer needs: gold answer, kind, image id. A private split has no label
            here. `optional`: a predictions file need not answer this question.
        before: Earlier turns, a system turn in front. Where there are some, or `text` holds an
            image marker, every image has its marker in the turns; else images stand in front.
    """

    id: str
    text: str
    image: Image | tuple[Image, ...] | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[Message, ...] = ()

    @property
    def asked(self) -> str | tuple[Message, ...]:
        """The question as models are asked it: its text, or a conversation with markers."""
        if not self.before and IMAGE not in self.text:
            return self.text
        return (*self.before, Message("user", self.text))

    @property
    def images(self) -> tuple[Image, ...]:
        """Its images in the order in which they are shown; empty without one."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)


@dataclass(frozen=True)
class Metric:
    """The name, the unit and the meaning of a number.

    Args:
        name: Unique in the benchmark. `subset` describes `subset.anything` as well.
        unit: `%`, `points` or `questions`.
        description: One line for readers of scores.json.
        column: Column of comparison tables that shows this metric beside the headline's; None: no
            column of its own.
    """

    name: str
    unit: str
    description: str
    column: str | None = None


@dataclass(frozen=True)
class Split:
    """One part of a benchmark.

    Args:
        size: Official number of questions.
        server: Where an upload is scored; None where the labels are public.
    """

    size: int
    server: str | None = None


@dataclass(frozen=True)
class Judgement:
    """The worth of answers, question by question.

    Args:
        per_question: Question id to the official per-question score, mostly 0 to 1.
        contributions: One (cluster, name -> amount) per question, in any order; metrics are made
            from their sums. A cluster is what questions share: the image.
        parsed: Question id to what was read out of the text; None where nothing could be read.
        normalised: Question id to the text as it was compared.
        boxes: Question id to the boxes that were read, as fractions of its first image.
        submission: Question id to the answer in the upload, for a benchmark with a server.
        extra: Further official numbers that are not made from sums; they get no interval.
        failed: Question id to the reason that its answer could not be judged. Such a question is in
            none of the numbers, and the score is not complete.
        notes: Sentences that a reader of these numbers must know.
        rules: Whose prompt and rules these numbers have, where the files or the judge decide that;
            None: the benchmark's.
    """

    per_question: Mapping[str, float]
    contributions: Sequence[tuple[Hashable, Mapping[str, float]]]
    parsed: Mapping[str, str | None] | None = None
    normalised: Mapping[str, str] | None = None
    boxes: Mapping[str, tuple[Numbers, ...]] = field(default_factory=dict)
    submission: Mapping[str, str] | None = None
    extra: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rules: str | None = None


class Reply(str):
    """A judge's reply, verbatim.

    Args:
        text: The reply.
        is_cut: The server ended it at the limit of its tokens.
    """

    is_cut: bool

    def __new__(cls, text: str, is_cut: bool = False) -> Reply:
        reply = super().__new__(cls, text)
        reply.is_cut = is_cut
        return reply


class Judge(Protocol):
    """A language model that grades; see `mipha.evaluation.judge`.

    Args:
        num_runs: How often every question was graded, where that was recorded; None: the benchmark
            decides.
        notes: Sentences on requests that were not as the benchmark makes them.
    """

    @property
    def num_runs(self) -> int | None: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def ask(
        self,
        question_id: str,
        prompt: str,
        *,
        run: int = 0,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 16,
    ) -> Reply:
        """Return the judge's reply to a prompt."""
        ...

    def forget(self, question_id: str, run: int = 0) -> None:
        """Ask about a question anew in the next call, because no reply could be read."""
        ...


@dataclass(frozen=True)
class Benchmark:
    """Everything that the program knows about a benchmark.

    Args:
        name: As on the command line; also the name of its module.
        metrics: Every metric that `measure` or `Judgement.extra` may give, the headline first.
        splits: Name to split, the one to report first.
        protocol: One sentence for scores.json: prompt, reading of answers, averaging, clusters.
        source: Where the official files come from, and their names. It begins with "get", and
            stands in the middle of error messages.
        max_new_tokens: Longest answer, in tokens.
        read: `read(root, split)` returns every question of a split in the official order, with
            prompt and image and unique ids. It raises FileNotFoundError for a missing file or
            image, and ValueError for a malformed file, with the file and the line or record.
        read_labels: `read_labels(path)` returns the labelled questions of an official annotation
            file, or of the folder with the official files; the images need not be there.
        score: `score(questions, predictions, judge)` judges the answers. It is pure, takes the
            text verbatim, and every question has a prediction and a label. `judge` is None for a
            benchmark without a judge. It raises ValueError where not one answer could be judged.
        measure: `measure(totals)` returns every metric, headline first, unrounded, from the sums
            of contributions. It works on any shape of totals.
        submission: `submission(questions, predictions)` returns the files that the benchmark's
            server takes, as name to content.
        doubts: `doubts(questions, split)` returns one sentence for each sign that these are not
            the files of the protocol, beyond the number of questions.
        judge: Whether a language model grades: `required` (no score without one), `optional`, or
            None.
        baselines: Name to a function that answers the questions without a model.
        id_advice: How a predictions file numbers the questions, for errors about ids, where they
            are not simply the official ids.
        read_answer_folder: `read_answer_folder(folder, questions)` yields place, id and text of
            every answer in a folder of predictions files, where the official scorer reads several.
        by_likelihood: The model is not asked. It gives the log-likelihood of each text in
            `facts["continuations"]` after the question's text, without a chat template; see
            `mipha.evaluation.likelihoods`.
        rules: Whose prompt and rules they are: `official`, `lmms-eval` or `VLMEvalKit`. Tables with
            published numbers say where these differ.
        packaged: An installed package brings the files, so `read` and `read_labels` take None as
            their root.
        own_metric: Metric of an own test set, see `own_data`; None for a benchmark of the list.
        in_form: `in_form(form)` returns the benchmark for models that write boxes in a form of
            `region_text.FORMS`; None where no answer is a box.
    """

    name: str
    metrics: tuple[Metric, ...]
    splits: Mapping[str, Split]
    protocol: str
    source: str
    max_new_tokens: int
    read: Callable[..., Sequence[Question]]
    read_labels: Callable[..., Sequence[Question]]
    score: Callable[[Sequence[Question], Mapping[str, str], Judge | None], Judgement]
    measure: Callable[[Totals], dict[str, np.ndarray]]
    submission: Callable[[Sequence[Question], Mapping[str, str]], dict[str, bytes]] | None = None
    doubts: Callable[[Sequence[Question], str], list[str]] | None = None
    judge: Literal["required", "optional"] | None = None
    baselines: Mapping[str, Callable[[Sequence[Question]], dict[str, str]]] = field(
        default_factory=dict
    )
    id_advice: str = ""
    read_answer_folder: (
        Callable[[Path, Sequence[Question]], Iterator[tuple[str, str, str]]] | None
    ) = None
    by_likelihood: bool = False
    rules: str = "official"
    packaged: bool = False
    own_metric: str | None = None
    in_form: Callable[[str], Benchmark] | None = None

    @property
    def headline(self) -> Metric:
        """The metric to report."""
        return self.metrics[0]

    @property
    def main_split(self) -> str:
        """The split to report."""
        return next(iter(self.splits))

    def questions(self, root: Path | None = None, split: str | None = None) -> Sequence[Question]:
        """Return every question of a split.

        Args:
            root: Folder with the official files; None: the packaged copy, where there is one.
            split: Name of the split; None: the one to report.

        Raises:
            FileNotFoundError: A file or an image is missing.
            ValueError: No such split, no folder, or a malformed file.
        """
        split = split or self.main_split
        if split not in self.splits:
            raise ValueError(
                f"benchmark {self.name} has no split {split!r}: choose {' or '.join(self.splits)}"
            )
        if root is None and not self.packaged:
            raise ValueError(
                f"{self.name} has no packaged copy: {self.source}, "
                "and give its folder with --data-root"
            )

        return self.read(root, split)

    def metric(self, name: str) -> Metric:
        """Return the metric with this name, or the one of its group."""
        by_name = {metric.name: metric for metric in self.metrics}
        found = by_name.get(name) or by_name.get(name.partition(".")[0])
        assert found is not None, f"the metrics of {self.name} lack {name}"
        return found


@dataclass(frozen=True)
class Plan:
    """The questions of one benchmark that a model is asked.

    Args:
        benchmark: The benchmark.
        split: Name of one of its splits.
        questions: All questions of the split.
        doubts: Signs that these are not the files of the protocol, a sentence each.
        limit: Only the first N questions are asked; None: all.
        blind: The model is shown grey instead of every image.
    """

    benchmark: Benchmark
    split: str
    questions: Sequence[Question]
    doubts: tuple[str, ...] = ()
    limit: int | None = None
    blind: bool = False

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return self.benchmark.name

    @property
    def asked(self) -> Sequence[Question]:
        """The questions that are asked."""
        return self.questions[: self.limit]

    @property
    def key(self) -> str:
        """Name of the folder with the results."""
        split = "" if self.split == self.benchmark.main_split else f"-{self.split}"
        return f"{self.name}{split}{'-blind' if self.blind else ''}"


def list_benchmarks() -> list[str]:
    """Return the names of the benchmarks: the folder is the list."""
    return files_in(BENCHMARKS, ".py")


def load_benchmark(name: str) -> Benchmark:
    """Import one benchmark.

    Raises:
        ValueError: No such benchmark.
    """
    if name not in list_benchmarks():
        raise ValueError(f"no benchmark {name!r}: {did_you_mean(name, list_benchmarks())}")
    return importlib.import_module(f"mipha.evaluation.benchmarks.{name}").BENCHMARK
