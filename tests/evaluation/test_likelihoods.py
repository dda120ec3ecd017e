"""Likelihoods instead of answers: what is written, what is read, and who can give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mipha.evaluation.benchmark import Question
from mipha.evaluation.evaluate import Subject, evaluate
from mipha.evaluation.likelihoods import MeasuredTexts, read_likelihoods
from tests.evaluation.benchmarks.test_arc import write_official


def test_what_is_written_is_read() -> None:
    measured = MeasuredTexts([(-12.50004, 3), (-9.25, 4)])
    assert measured.text == "[[-12.5, 3], [-9.25, 4]]"
    assert measured.num_tokens == 7 and measured.finished
    question = Question("7", "", None, {"continuations": ("a", "b")})
    assert read_likelihoods(question, {"7": measured.text}) == [-12.5, -9.25]


@pytest.mark.parametrize("text", ["A", "[[-1, 2]]", "[-1, -2]", "{}", '[["a", 1], ["b", 1]]', ""])
def test_anything_else_is_named(text: str) -> None:
    question = Question("7", "", None, {"continuations": ("a", "b")})
    with pytest.raises(ValueError, match=r"question 7 is .* not a JSON list of 2 pairs"):
        read_likelihoods(question, {"7": text})


def test_a_model_that_gives_none_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    write_official(tmp_path)

    def opened(*_: object) -> None:
        raise AssertionError("opened")

    subject = Subject("http://localhost:1/v1", tmp_path / "out", opened)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"arc is measured by the likelihood of texts, which http"):
        evaluate(subject, ["arc"], tmp_path)
