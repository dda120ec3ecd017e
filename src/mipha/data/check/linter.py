"""The linter: a whole data set read as training will read it, and everything that is wrong with it, row by row.

load --> rows --check_rows, on all cores--> RowFacts --whole_set, in order--> findings, histograms, steps, packing
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
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

from mipha.data.check.findings import Finding
from mipha.data.check.pool import check_rows
from mipha.data.check.result import Answers, CheckResult, Histogram, Training, histogram
from mipha.data.check.rows import Job, RowFacts
from mipha.data.check.source import Source
from mipha.data.check.whole_set import Seen, gather_evaluation
from mipha.recipe import StageRecipe

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    from mipha.data.check.packing import Length

_TOP_ANSWERS = 12


def check_data(
    source: Source,
    stage: StageRecipe | None = None,
    processor: LlavaProcessor | None = None,
    seed: int = 0,
    against: Source | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> CheckResult:
    """Check every row of a data set; nothing is changed.

    Pictures are compared by their pixels, so a copy in another lossless format is found, one compressed anew is not.

    Args:
        source: Rows, as `open_source` gives them.
        stage: The recipe's stage; with the processor, tokens are checked too.
        processor: Of the recipe's model.
        seed: The recipe's: the order that packing is predicted in.
        against: An evaluation set whose pictures and questions must not be in this one.
        workers: Processes; null: one for each core.
        progress: Draw a bar on standard error.

    Raises:
        OSError: A process was killed.
    """
    assert (stage is None) == (processor is None), "tokens need both, a stage and a processor"
    begin = time.monotonic()
    workers = workers or os.cpu_count() or 1
    evaluation = None
    if against is not None:
        evaluation = gather_evaluation(
            against.name, _all_rows(Job(against), workers, "reading " + against.name, progress)
        )
    seen = Seen(evaluation)
    columns = _Columns()
    findings: list[Finding] = []
    for facts in _all_rows(
        Job(source, processor, stage), workers, "checking " + source.name, progress
    ):
        columns.add(facts)
        findings += facts.findings
        findings += seen.add(facts)
    findings += seen.balance()
    if evaluation is not None and evaluation.num_unread:
        findings.append(
            Finding(
                "uncompared",
                None,
                "",
                f"{evaluation.num_unread} rows of {evaluation.name} could not be read",
            )
        )
    num_guessed, num_guessable = seen.blind_guess()
    top = tuple(seen.answers.most_common(_TOP_ANSWERS))
    return CheckResult(
        source=source,
        findings=tuple(findings),
        num_samples=columns.num_samples,
        num_images=columns.num_images,
        num_pictures=len(columns.pictures),
        seconds=time.monotonic() - begin,
        histograms=tuple(columns.histograms()),
        answers=Answers(seen.answers.total(), len(seen.answers), top, num_guessable, num_guessed),
        training=columns.training(stage, seed, source) if stage is not None else None,
        against=evaluation.name if evaluation else None,
        processor=processor,
    )


@dataclass
class _Columns:
    """Numbers of all rows, a few bytes each."""

    num_samples: int = 0
    num_images: int = 0
    pictures: set[bytes] = field(default_factory=set)
    answer_words: array[int] = field(default_factory=lambda: array("l"))
    sides: array[int] = field(default_factory=lambda: array("l"))
    lengths: list[Length] = field(default_factory=list)
    tokens: array[int] = field(default_factory=lambda: array("l"))
    trained: array[int] = field(default_factory=lambda: array("l"))

    def add(self, facts: RowFacts) -> None:
        if facts.content is None:
            return
        self.num_samples += 1
        self.num_images += len(facts.images)
        self.answer_words.append(facts.num_answer_words)
        for image in facts.images:
            if image.digest and image.digest not in self.pictures:
                self.pictures.add(image.digest)
                self.sides.append(max(image.width, image.height))
        if facts.tokens is not None:
            from mipha.data.check.packing import Length

            tokens = facts.tokens
            self.tokens.append(tokens.num_uncut)
            self.trained.append(tokens.num_trained)
            self.lengths.append(
                Length(tokens.num_tokens, tokens.prefix, tokens.prefix_key, facts.image_key)
            )

    def histograms(self) -> Iterator[Histogram]:
        for name, unit, values in (
            ("sample length", "tokens", self.tokens),
            ("trained", "tokens", self.trained),
            ("answers of a sample", "words", self.answer_words),
            ("longer side of a picture", "pixels", self.sides),
        ):
            if len(values):
                yield histogram(name, unit, np.asarray(values))

    def training(self, stage: StageRecipe, seed: int, source: Source) -> Training:
        from mipha.data.check.packing import packings
        from mipha.data.order import count_steps, samples_shown

        usable = len(self.lengths)
        data = source.as_trained_on(stage)
        weight, cap = (data.weight, data.cap) if data else (1.0, None)
        shown = samples_shown(usable, weight, cap)
        steps, samples_read = count_steps(stage, shown) if shown else (0, 0)
        num_tokens = sum(length.num_tokens for length in self.lengths)
        return Training(
            stage,
            usable,
            num_tokens,
            sum(self.trained),
            steps,
            samples_read,
            tuple(packings(self.lengths, stage, seed, weight, cap)),
        )


def _all_rows(job: Job, workers: int, title: str, progress: bool) -> Iterator[RowFacts]:
    chunks = check_rows(job, range(len(job.source)), workers)
    first = next(chunks, [])  # the processes are forked here, before the bar's thread begins
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not progress) as bar:
        task = bar.add_task(title, total=len(job.source))
        while first:
            yield from first
            bar.advance(task, len(first))
            first = next(chunks, [])


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} rows/s" if task.speed else "", style="cyan")
