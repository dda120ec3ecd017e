"""The linter: a whole data set read as training will read it, and everything that is wrong with it.

load_data --> records --check_rows, on all cores--> RowFacts
    --whole_set, in order--> findings, histograms, steps, packing: a CheckResult --> reports
"""

from __future__ import annotations

import os
import time
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mipha.data.check.findings import SEVERITIES, Finding, Severity
from mipha.data.check.rows import CheckInputs, RowFacts, check_rows
from mipha.data.check.shards import (
    Shard,
    describe_check,
    has_facts,
    read_facts,
    write_facts,
)
from mipha.data.check.whole_set import Seen, gather_evaluation
from mipha.data.dataset import LoadedData
from mipha.recipe import StageRecipe
from mipha.terminal import Console

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    from mipha.data.check.packing import Length, Packing

NO_RECIPE = (
    "Tokens, loss mask, truncation, packing and steps were not checked, because they depend on the "
    "model: give a recipe (--recipe NAME)."
)
_TOP_ANSWERS = 12
_BINS = 30


class Histogram(NamedTuple):
    """How one quantity is spread over the samples.

    Args:
        name: What is counted.
        unit: Its unit.
        edges: Edges of the bins, `(bins + 1,)`.
        counts: Values in each bin, `(bins,)`; all beyond the last edge are in the last bin.
        minimum: Of all values; likewise the rest.
    """

    name: str
    unit: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    minimum: float
    median: float
    p95: float
    maximum: float


class Answers(NamedTuple):
    """How short answers are spread.

    Args:
        num_short: Answers of at most 60 characters.
        num_distinct: Different ones among them, case aside.
        top: The most frequent answers, and how often each is given.
        num_guessable: Answers to questions asked at least five times.
        num_guessed: Answers of those that are the most frequent answer of their question: what a
            model knows without the image.
    """

    num_short: int
    num_distinct: int
    top: tuple[tuple[str, int], ...]
    num_guessable: int
    num_guessed: int


class FileCounts(NamedTuple):
    """What one file of the data holds.

    Args:
        file: Path from the data's folder; empty for rows that lie in no file.
        rows: Its records.
        samples: Those that are samples.
        text_only: Samples without an image.
        images: Images of the samples, one for each time that one is shown.
        turns: Questions with an answer; a document is one.
        findings: Number of findings of each kind, of its rows.
    """

    file: str
    rows: int
    samples: int
    text_only: int
    images: int
    turns: int
    findings: dict[str, int]


class Training(NamedTuple):
    """What a stage of the recipe makes of the set.

    Args:
        stage: Settings of the stage.
        num_samples: Samples that can be trained on.
        num_tokens: Tokens of them all, image tokens included.
        num_trained: Trained tokens.
        steps: Optimizer steps.
        samples_read: Samples read in those steps, over all epochs.
        packings: How full rows will be.
    """

    stage: StageRecipe
    num_samples: int
    num_tokens: int
    num_trained: int
    steps: int
    samples_read: int
    packings: tuple[Packing, ...]


@dataclass(frozen=True)
class CheckResult:
    """All that was found.

    Args:
        data: The data set; read again for examples and for a cleaned copy.
        findings: By row; those of the whole set last.
        num_samples: Rows that are samples.
        num_images: Images read, one for each time a sample shows it.
        num_distinct: Different images among them.
        seconds: Duration of the check.
        histograms: Of words, pixels and, with a recipe, tokens.
        answers: How they are spread.
        files: Counts of each file, in the order of the data.
        training: None without a recipe.
        against: Name of the evaluation set it was compared with.
        processor: Processor of the recipe's model.
    """

    data: LoadedData
    findings: tuple[Finding, ...]
    num_samples: int
    num_images: int
    num_distinct: int
    seconds: float
    histograms: tuple[Histogram, ...]
    answers: Answers
    files: tuple[FileCounts, ...] = ()
    training: Training | None = None
    against: str | None = None
    processor: LlavaProcessor | None = field(default=None, repr=False)

    @property
    def num_rows(self) -> int:
        """Number of rows of the data set."""
        return len(self.data)

    @property
    def num_errors(self) -> int:
        """Number of findings that make the set unfit to train on."""
        return self.count(SEVERITIES[0])

    def count(self, severity: Severity) -> int:
        """Count the findings of this severity."""
        return sum(finding.severity == severity for finding in self.findings)


def check_data(
    data: LoadedData,
    stage: StageRecipe | None = None,
    processor: LlavaProcessor | None = None,
    seed: int = 0,
    against: LoadedData | None = None,
    workers: int | None = None,
    progress: bool = False,
    folder: Path | None = None,
) -> CheckResult:
    """Check every row of a data set; nothing is changed.

    Images are compared by their pixels, so a copy in another lossless format is found. Those of the
    evaluation set are also looked for compressed anew, resized, padded and mirrored.

    Args:
        data: The data set, as `load_data` gives it.
        stage: Stage of the recipe; with the processor, tokens are checked too.
        processor: Processor of the recipe's model.
        seed: Seed of the recipe: the order that packing is predicted in.
        against: An evaluation set whose images and questions must not be in this one.
        workers: Number of processes; None for one on each core.
        progress: Whether to draw a bar on standard error.
        folder: Facts of all rows, which `check_shard` wrote; None: the rows are read here.

    Raises:
        OSError: A process was killed.
        FileNotFoundError, ValueError: As `shards.read_facts`.
    """
    assert (stage is None) == (processor is None), "tokens need both, a stage and a processor"
    begin = time.monotonic()
    workers = workers or os.cpu_count() or 1

    # Read the evaluation set.
    evaluation = None
    if against is not None:
        rows = _all_rows(
            CheckInputs(against, near=True), workers, f"reading {against.name}", progress
        )
        evaluation = gather_evaluation(against.name, rows)

    # Check each row, then compare it with those before it.
    seen = Seen(evaluation)
    columns = _Columns()
    findings: list[Finding] = []
    inputs = CheckInputs(data, processor, stage, near=evaluation is not None)
    if folder is not None:
        found = read_facts(folder, describe_check(inputs))
    else:
        found = _all_rows(inputs, workers, f"checking {data.name}", progress)
    for facts in found:
        columns.add(facts)
        findings += facts.findings
        findings += seen.add(facts)

    # Judge the whole set.
    findings += seen.unread_keys()
    findings += seen.balance()
    if data.left_out:
        findings.append(Finding("left-out", None, "", data.left_out))
    if evaluation is not None and evaluation.num_unread:
        what = f"{evaluation.num_unread} rows of {evaluation.name} could not be read"
        findings.append(Finding("uncompared", None, "", what))
    num_guessed, num_guessable = seen.blind_guess()
    top = tuple(seen.answers.most_common(_TOP_ANSWERS))
    return CheckResult(
        data=data,
        findings=tuple(findings),
        num_samples=columns.num_samples,
        num_images=columns.num_images,
        num_distinct=len(columns.digests),
        seconds=time.monotonic() - begin,
        histograms=tuple(columns.histograms()),
        answers=Answers(seen.answers.total(), len(seen.answers), top, num_guessable, num_guessed),
        files=tuple(columns.files(findings)),
        training=columns.training(stage, seed, data) if stage is not None else None,
        against=evaluation.name if evaluation else None,
        processor=processor,
    )


def check_shard(
    inputs: CheckInputs,
    shard: Shard,
    folder: Path,
    workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Read a part of the rows for a check that many machines share; see `shards`.

    Args:
        inputs: The data set, and what else the check needs.
        shard: Part of the rows.
        folder: Folder of the facts; a part that is there already is not read again.

    Returns:
        File of the facts.
    """
    check = describe_check(inputs)
    if has_facts(folder, shard, check):
        return shard.file(folder)
    title = f"checking {shard.number}/{shard.of} of {inputs.data.name}"
    rows = _all_rows(
        inputs, workers or os.cpu_count() or 1, title, progress, shard.rows(len(inputs.data))
    )
    return write_facts(folder, shard, check, rows)


def histogram(name: str, unit: str, values: np.ndarray) -> Histogram:
    """Count whole numbers in equal bins.

    The longest hundredth shares the last bin, so that one outlier does not flatten the rest.
    """
    low, high = int(values.min()), int(np.quantile(values, 0.99, method="higher"))
    width = max(1, -(-(high - low + 1) // _BINS))
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), bins=edges)
    median, p95 = np.quantile(values, [0.5, 0.95])
    return Histogram(
        name,
        unit,
        tuple(edges.tolist()),
        tuple(counts.tolist()),
        float(low),
        float(median),
        float(p95),
        float(values.max()),
    )


def counts_by_kind(findings: Iterable[Finding]) -> dict[str, int]:
    """Count the findings of each kind, the most severe kinds first, then the most frequent."""
    findings = list(findings)
    severity = {finding.kind: SEVERITIES.index(finding.severity) for finding in findings}
    counts = Counter(finding.kind for finding in findings)
    order = sorted(counts, key=lambda kind: (severity[kind], -counts[kind]))
    return {kind: counts[kind] for kind in order}


@dataclass
class _Columns:
    """Numbers of all rows, a few bytes each."""

    num_samples: int = 0
    num_images: int = 0
    digests: set[bytes] = field(default_factory=set)
    answer_words: array[int] = field(default_factory=lambda: array("l"))
    sides: array[int] = field(default_factory=lambda: array("l"))
    lengths: list[Length] = field(default_factory=list)
    tokens: array[int] = field(default_factory=lambda: array("l"))
    trained: array[int] = field(default_factory=lambda: array("l"))
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    first_rows: list[tuple[int, str]] = field(default_factory=list)

    def add(self, facts: RowFacts) -> None:
        counts = self.counts[facts.file]
        counts["rows"] += 1
        if counts["rows"] == 1:
            self.first_rows.append((facts.row, facts.file))
        if facts.content is None:
            return
        counts["samples"] += 1
        counts["text_only"] += not facts.images
        counts["images"] += len(facts.images)
        counts["turns"] += facts.num_turns
        self.num_samples += 1
        self.num_images += len(facts.images)
        self.answer_words.append(facts.num_answer_words)
        for image in facts.images:
            if image.digest and image.digest not in self.digests:
                self.digests.add(image.digest)
                self.sides.append(max(image.width, image.height))

        if facts.tokens is not None:
            from mipha.data.check.packing import Length

            tokens = facts.tokens
            self.tokens.append(tokens.num_uncut)
            self.trained.append(tokens.num_trained)
            self.lengths.append(
                Length(tokens.num_tokens, tokens.prefix, tokens.prefix_key, facts.image_key)
            )

    def files(self, findings: Iterable[Finding]) -> Iterator[FileCounts]:
        """Yield the counts of each file; the rows of one follow one another."""
        starts = [row for row, _ in self.first_rows]
        kinds: dict[str, Counter[str]] = defaultdict(Counter)
        for finding in findings:
            if finding.row is not None:
                _, file = self.first_rows[bisect_right(starts, finding.row) - 1]
                kinds[file][finding.kind] += 1
        names = [name for name in FileCounts._fields if name not in ("file", "findings")]
        for file, counts in self.counts.items():
            numbers = {name: counts[name] for name in names}
            yield FileCounts(file, **numbers, findings=dict(kinds[file]))

    def histograms(self) -> Iterator[Histogram]:
        for name, unit, values in (
            ("sample length", "tokens", self.tokens),
            ("trained", "tokens", self.trained),
            ("answers of a sample", "words", self.answer_words),
            ("longer side of an image", "pixels", self.sides),
        ):
            if len(values):
                yield histogram(name, unit, np.asarray(values))

    def training(self, stage: StageRecipe, seed: int, data: LoadedData) -> Training:
        from mipha.data.check.packing import packings
        from mipha.data.order import count_steps, samples_shown

        usable, is_pairs = len(self.lengths), data.rejected is not None
        entry = data.as_trained_on(stage)
        weight, cap = (entry.weight, entry.cap) if entry else (1.0, None)
        shown = samples_shown(usable, weight, cap)
        steps, samples_read = count_steps(stage, shown) if shown else (0, 0)
        packed = () if is_pairs else tuple(packings(self.lengths, stage, seed, weight, cap))
        return Training(
            stage=stage,
            num_samples=usable,
            num_tokens=sum(length.num_tokens for length in self.lengths),
            num_trained=sum(self.trained),
            steps=steps,
            samples_read=samples_read,
            packings=packed,
        )


def _all_rows(
    inputs: CheckInputs, workers: int, title: str, progress: bool, rows: range | None = None
) -> Iterator[RowFacts]:
    rows = range(len(inputs.data)) if rows is None else rows
    chunks = check_rows(inputs, rows, workers)
    first = next(chunks, [])  # the processes are forked here, before the bar's thread begins

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(title, total=len(rows))
        while first:
            yield from first
            bar.advance(task, len(first))
            first = next(chunks, [])


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} rows/s" if task.speed else "", style="cyan")
