"""What a check gives: findings, and how lengths, answers and steps come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mipha.data.check.findings import SEVERITIES, Finding, Severity
from mipha.data.check.source import Source
from mipha.recipe import StageRecipe

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    from mipha.data.check.packing import Packing

NO_RECIPE = "Tokens, loss mask, truncation, packing and steps were not checked, because they depend on the model: give a recipe (--recipe NAME)."
_BINS = 30


class Histogram(NamedTuple):
    """How one quantity is spread over the samples.

    Args:
        name: What is counted.
        unit: In what.
        edges: Of the bins, `(bins + 1,)`.
        counts: In the bins, `(bins,)`; all that lies beyond the last edge is in the last bin.
        minimum: Of all, likewise the rest.
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
        top: The most frequent, and how often.
        num_guessable: Answers to questions asked at least five times.
        num_guessed: Of them, those that are the most frequent answer of their question: what a model knows without the image.
    """

    num_short: int
    num_distinct: int
    top: tuple[tuple[str, int], ...]
    num_guessable: int
    num_guessed: int


class Training(NamedTuple):
    """What a stage of the recipe makes of the set.

    Args:
        stage: Its settings.
        num_samples: That can be trained on.
        num_tokens: Of them all, image tokens included.
        num_trained: Trained tokens.
        steps: Optimizer steps.
        samples_read: In those steps, over all epochs.
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
        source: The rows; read again for examples and for a cleaned copy.
        findings: By row; those of the whole set last.
        num_samples: Rows that are samples.
        num_images: Images read, one for each time a sample shows it.
        num_pictures: Different ones.
        seconds: It took.
        histograms: Of words, pixels and, with a recipe, tokens.
        answers: How they are spread.
        training: None without a recipe.
        against: Name of the evaluation set it was compared with.
        processor: Of the recipe's model.
    """

    source: Source
    findings: tuple[Finding, ...]
    num_samples: int
    num_images: int
    num_pictures: int
    seconds: float
    histograms: tuple[Histogram, ...]
    answers: Answers
    training: Training | None = None
    against: str | None = None
    processor: LlavaProcessor | None = field(default=None, repr=False)

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return len(self.source)

    def count(self, severity: Severity) -> int:
        """Findings of this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def num_errors(self) -> int:
        """Findings that make the set unfit to train on."""
        return self.count(SEVERITIES[0])


def histogram(name: str, unit: str, values: np.ndarray) -> Histogram:
    """Whole numbers in equal bins; the longest hundredth shares the last one, so that one outlier does not flatten the rest."""
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
    """Kind to how many, the most severe kinds first, then the most frequent."""
    findings = list(findings)
    severity = {finding.kind: SEVERITIES.index(finding.severity) for finding in findings}
    counts = Counter(finding.kind for finding in findings)
    return {
        kind: counts[kind]
        for kind in sorted(counts, key=lambda kind: (severity[kind], -counts[kind]))
    }
