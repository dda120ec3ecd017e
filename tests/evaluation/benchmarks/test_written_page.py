from __future__ import annotations

from pathlib import Path

import pytest

from mipha.evaluation.benchmark import Question, load_benchmark
from mipha.evaluation.benchmarks import written_page
from mipha.evaluation.benchmarks.written_page import read_answer
from mipha.evaluation.score import grade

MINI = load_benchmark("written_page_mini")


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return list(MINI.questions(split="validation"))


def scores_of(asked: list[Question], predictions: dict[str, str]) -> dict[str, float]:
    scores, _ = grade(MINI, written_page.score(asked, predictions))
    return {score.metric: score.value for score in scores}


def test_right_answers_score_100_in_every_group(asked: list[Question]) -> None:
    assert len(asked) == MINI.splits["validation"].size == 1200
    assert len({question.id for question in asked}) == 1200
    found = scores_of(asked, {one.id: f"it is {one.facts['answer']}." for one in asked})
    assert list(found) == [metric.name for metric in MINI.metrics]
    assert found.pop("unreadable") == 0 and set(found.values()) == {100.0}


def test_groups_are_of_the_height_of_their_digits(asked: list[Question]) -> None:
    """Answers that read the large digits alone."""
    large = {one.id: one.facts["answer"] if one.facts["height"] == 16 else "no" for one in asked}
    found = scores_of(asked, large)
    assert (found["height_16"], found["height_8"], found["count"]) == (100, 0, 0)
    assert 0 < found["number"] < 100
    wrong = sum(one.facts["height"] != 16 for one in asked)
    assert found["unreadable"] == wrong


def test_the_baseline_knows_no_page(asked: list[Question]) -> None:
    """A digit of ten, and one count of three."""
    found = scores_of(asked, MINI.baselines["majority"](asked))
    assert 5 < found["number"] < 16 and 25 < found["count"] < 42


@pytest.mark.parametrize(
    ("text", "answer"),
    [("7", "7"), ("It is 07.", "07"), ("12 or 34", "34"), ("seven", None), ("", None)],
)
def test_the_last_digits_are_the_answer(text: str, answer: str | None) -> None:
    assert read_answer(text) == answer


def test_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="drawn and reads no files"):
        MINI.questions(tmp_path)


OFFICIAL = None  # drawn: there are no files that could be missing or wrong
