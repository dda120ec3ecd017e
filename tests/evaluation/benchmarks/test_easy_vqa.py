from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from mipha.evaluation.benchmark import Question
from mipha.evaluation.benchmarks import easy_vqa
from mipha.evaluation.benchmarks.easy_vqa import (
    BENCHMARK,
    majority_baseline,
    question_only_baseline,
    read_answer,
)
from mipha.evaluation.score import Score, grade
from tests.evaluation.official import BrokenLabel, Official, write_file, write_images

packaged = pytest.mark.skipif(find_spec("easy_vqa") is None, reason="needs the package easy-vqa")


@pytest.fixture(scope="module")
def official() -> list[Question]:
    return BENCHMARK.questions()


def score(asked: list[Question], predictions: dict[str, str]) -> list[Score]:
    return list(grade(BENCHMARK, easy_vqa.score(asked, predictions))[0])


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {score.metric: score for score in scores}


def ask(*rows: tuple[str, str, int, str | None]) -> list[Question]:
    """Questions by hand: text, gold answer, image, usual answer."""
    facts = [
        {"answer": a, "kind": easy_vqa._kind(a), "image": i, "usual": usual, "most_frequent": "yes"}
        for _, a, i, usual in rows
    ]
    return [
        Question(str(number), row[0], None, fact)
        for number, (row, fact) in enumerate(zip(rows, facts, strict=True))
    ]


@packaged
def test_every_official_question_is_asked_once_with_its_image(official: list[Question]) -> None:
    assert len(official) == len({question.id for question in official}) == 9673
    assert Counter(question.facts["kind"] for question in official) == {
        "yes_no": 7136,
        "shape": 1257,
        "colour": 1280,
    }
    images = {question.image for question in official}
    assert len(images) == 1000 and all(
        isinstance(image, Path) and image.is_file() for image in images
    )
    assert (official[0].id, official[0].text) == ("test/0/0", "what is the red shape?")


@packaged
def test_baselines_are_the_published_ones(official: list[Question]) -> None:
    """Counted once from the published files: majority 37.3 %, question only 67.0 %.

    Of the latter, yes/no is 82.5 %, shape 34.8 % and colour 12.0 %.
    """
    majority = by_name(score(official, majority_baseline(official)))
    assert round(majority["accuracy"].value, 1) == 37.3
    blind = by_name(score(official, question_only_baseline(official)))
    assert [round(blind[name].value, 1) for name in ("accuracy", "yes_no", "shape", "colour")] == [
        67.0,
        82.5,
        34.8,
        12.0,
    ]
    assert (
        blind["yes_no_usual"].value,
        blind["yes_no_minority"].value,
        blind["unreadable"].value,
    ) == (100, 0, 0)
    assert blind["yes_no_usual"].n + blind["yes_no_minority"].n == 7136


@packaged
def test_perfect_answers_score_100_everywhere_and_every_metric_is_given(
    official: list[Question],
) -> None:
    scores = score(
        official,
        {
            question.id: f"It is what it is, so {question.facts['answer'].upper()}."
            for question in official
        },
    )
    assert [row.metric for row in scores] == [metric.name for metric in easy_vqa.BENCHMARK.metrics]
    assert (
        all(row.value == row.low == row.high == 100 for row in scores[:-1])
        and scores[-1].value == 0
    )


@packaged
def test_validation_asks_about_training_images_only() -> None:
    validation = BENCHMARK.questions(split="validation")
    images = {question.image for question in validation}
    assert len(images) == 400 and all(
        "train" in image.parts for image in images if isinstance(image, Path)
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("it is a red circle, so no", "no"),
        ("Yes.", "yes"),
        ("**TEAL** !", "teal"),
        ("a red circle\n", "circle"),
        ("yes it is", None),
        ("a circles", None),
        ("", None),
        ("...", None),
    ],
)
def test_the_last_word_is_the_answer(text: str, answer: str | None) -> None:
    assert read_answer(text) == answer


def test_scores_by_hand() -> None:
    asked = ask(
        ("is there a circle?", "yes", 1, "no"),
        ("is there a circle?", "no", 2, "no"),
        ("is there a circle?", "no", 3, "no"),
        ("what is it?", "circle", 1, "triangle"),
        ("what color?", "red", 1, "blue"),
        ("is it new?", "no", 2, None),
    )
    scores = by_name(
        score(
            asked, {"0": "no", "1": "no", "2": "so no", "3": "a circle", "4": "maroon", "5": "no"}
        )
    )
    assert scores["accuracy"].value == pytest.approx(100 * 4 / 6) and scores["accuracy"].n == 6
    assert (scores["yes_no"].value, scores["yes_no"].n) == (75, 4)
    assert (scores["yes_no_minority"].value, scores["yes_no_minority"].n) == (0, 1)
    assert (scores["yes_no_usual"].value, scores["yes_no_usual"].n) == (100, 2)
    assert (scores["shape"].value, scores["colour"].value) == (100, 0)
    assert (scores["open"].value, scores["open"].n) == (50, 2)
    assert (scores["answer_no"].value, scores["answer_no"].n, scores["answer_yes"].value) == (
        100,
        3,
        0,
    )
    assert (scores["unreadable"].value, scores["unreadable"].low) == (1, None)
    assert "answer_teal" not in scores, "no question, no score"


def test_the_blind_baseline_answers_a_new_question_with_the_most_frequent_answer() -> None:
    asked = [
        replace(question, facts={**question.facts, "most_frequent": "blue"})
        for question in ask(("is it?", "yes", 1, "no"), ("is it new?", "no", 2, None))
    ]
    assert BENCHMARK.baselines["question_only"](asked) == {"0": "no", "1": "blue"}


def test_interval_is_by_image_not_by_question() -> None:
    rows = [
        ("is it?", "yes" if image < 20 else "no", image, "no")
        for image in range(40)
        for _ in range(25)
    ]
    asked = ask(*rows)
    accuracy = score(asked, dict.fromkeys((question.id for question in asked), "yes"))[0]
    assert accuracy.low is not None and accuracy.high is not None and accuracy.value == 50
    assert accuracy.high - accuracy.low > 20, (
        "1000 questions on 40 images are 40 observations; taken for 1000, the width would be 6"
    )


def test_a_missing_prediction_is_an_error_not_a_wrong_answer() -> None:
    with pytest.raises(KeyError):
        score(ask(("is it?", "yes", 1, "no")), {})


def test_own_folder_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'val'"):
        BENCHMARK.questions(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match=r"questions\.json"):
        BENCHMARK.questions(tmp_path)
    for split, rows in {
        "train": [["is it?", "no", 0], ["is it?", "no", 1], ["is it?", "yes", 2]],
        "test": [["is it?", "yes", 7]],
    }.items():
        (tmp_path / split).mkdir()
        (tmp_path / split / "questions.json").write_text(json.dumps(rows))
    with pytest.raises(FileNotFoundError, match=r"no image .*7\.png"):
        BENCHMARK.questions(tmp_path)
    assert [question.facts["answer"] for question in easy_vqa.read_labels(tmp_path)] == ["yes"]
    (tmp_path / "test" / "images").mkdir()
    (tmp_path / "test" / "images" / "7.png").touch()
    (question,) = BENCHMARK.questions(tmp_path)
    assert question.image == tmp_path / "test" / "images" / "7.png"
    assert (question.facts["answer"], question.facts["usual"], question.facts["most_frequent"]) == (
        "yes",
        "no",
        "no",
    )


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    red = "is there a red shape?"
    rows = {
        "train": [
            [red, "no", 0],
            [red, "no", 1],
            [red, "yes", 2],
            ["what color is the shape?", "blue", 0],
        ],
        "test": [
            *(
                [red, "yes", 0],
                ["what shape is in the image?", "circle", 0],
                ["is there a blue shape?", "no", 0],
            ),
            *(
                [red, "no", 1],
                ["what color is the shape?", "teal", 1],
                ["is there not a circle?", "yes", 1],
            ),
        ],
    }
    for part, questions in rows.items():
        write_file(folder / part / "questions.json", questions)
        write_images(folder / part / "images", [f"{number}.png" for number in range(3)])


OFFICIAL = Official(
    write=write_official,
    gold={
        **{"test/0/0": "yes", "test/0/1": "it is a circle", "test/0/2": "no"},
        **{"test/1/0": "no", "test/1/1": "teal", "test/1/2": "so yes"},
    },
    size="9,673",
    readings=("parsed",),
    broken_label=BrokenLabel(
        "test/questions.json",
        '"circle"',
        '"star"',
        ("questions.json, row 1", "one of the 13 answers"),
    ),
    image="test/images/1.png",
)
