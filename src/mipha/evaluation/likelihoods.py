"""Likelihoods of texts, for benchmarks that measure a language model and ask it nothing.

The text of a prediction is then a JSON list with a pair for each continuation: its log-likelihood
(natural logarithm) and its number of tokens.

    {"question_id": "0", "text": "[[-12.5, 3], [-9.25, 4]]", ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mipha.evaluation.benchmark import Question

_DECIMALS = 4
"""Decimals that are kept: more than the same model gives again on another machine."""


@dataclass(frozen=True)
class MeasuredTexts:
    """What a model gives instead of an answer.

    Args:
        likelihoods: Log-likelihood and number of tokens of each continuation.
    """

    likelihoods: Sequence[tuple[float, int]]

    @property
    def text(self) -> str:
        """The text of the prediction."""
        return json.dumps([[round(value, _DECIMALS), num] for value, num in self.likelihoods])

    @property
    def num_tokens(self) -> int:
        """Tokens that were measured."""
        return sum(num for _, num in self.likelihoods)

    @property
    def finished(self) -> bool:
        """Nothing is generated, so no limit cuts it off."""
        return True


def read_likelihoods(question: Question, predictions: Mapping[str, str]) -> list[float]:
    """Return the log-likelihood of each continuation of a question.

    Raises:
        ValueError: The text is something else, or of another number of continuations.
    """
    text = predictions[question.id]
    num = len(question.facts["continuations"])
    try:
        values = [float(value) for value, _ in json.loads(text)]
    except (ValueError, TypeError):
        values = []
    if len(values) != num:
        raise ValueError(
            f"the prediction of question {question.id} is {text[:60]!r}, and not a JSON list of "
            f"{num} pairs [log-likelihood, number of tokens]: measure the model with "
            "`mipha evaluate`"
        )
    return values
