"""GQA on six questions worked out by hand: what the scorer forgives, its groups, its chi-square."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import intervals, tally, values
from mipha.evaluation.benchmarks import gqa
from tests.evaluation.official import BrokenLabel, Official, write_file, write_images

SHORT = "\nAnswer the question using a single word or phrase."
COLOUR = [("select", "car (7)"), ("query", "color")]

# id, image, question, answer, structural type, semantic type, program, group
ROWS: list[tuple[str, str, str, str, str, str, list[tuple[str, str]], str | None]] = [
    ("20", "n1", "What color is the car?", "red", "query", "attr", COLOUR, "colors"),
    ("3", "n1", "Which color is it?", "red", "query", "attr", COLOUR, "colors"),
    ("100", "n2", "What color is that bus?", "blue", "query", "attr", COLOUR, "colors"),
    (
        "4",
        "n2",
        "Is that a cat or a dog?",
        "cat",
        "choose",
        "cat",
        [("select", "animal"), ("choose name", "cat|dog")],
        "animals",
    ),
    (
        "5",
        "n3",
        "Is there a t-shirt?",
        "yes",
        "verify",
        "obj",
        [("select", "t-shirt"), ("exist", "?")],
        None,
    ),
    (
        "6",
        "n3",
        "Who is there?",
        "man",
        "query",
        "obj",
        [("select", "person"), ("relate", "on"), ("query", "name")],
        None,
    ),
]
TEXTS = {"20": "RED...", "3": "green", "100": "Blue", "4": "dog", "5": "Yes.", "6": "man"}


def record(
    row: tuple[str, str, str, str, str, str, list[tuple[str, str]], str | None],
) -> dict[str, Any]:
    _, image, question, answer, structural, semantic, program, group = row
    return {
        "semantic": [
            {"operation": operation, "argument": argument, "dependencies": []}
            for operation, argument in program
        ],
        "entailed": [],
        "equivalent": [],
        "question": question,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": group, "local": "x"},
        "answer": answer,
        "semanticStr": "",
        "annotations": {},
        "types": {"detailed": "x", "semantic": semantic, "structural": structural},
        "fullAnswer": "",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / gqa.FILE).write_text(json.dumps({row[0]: record(row) for row in ROWS}))
    (tmp_path / "images").mkdir()
    for image in ("n1", "n2", "n3"):
        (tmp_path / "images" / f"{image}.jpg").touch()
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    content = json.loads((folder / gqa.FILE).read_text())
    (folder / gqa.FILE).write_text(json.dumps(change(content)))


@pytest.mark.parametrize(
    ("text", "compared"),
    [
        ("YES...", "yes"),
        ("T-Shirt.", "t-shirt"),
        ("yes ", "yes "),
        (" yes", " yes"),
        ("Yes!", "yes!"),
        ("yes\n", "yes\n"),
        ("yes. .", "yes. "),
        (".yes", ".yes"),
        ("the left", "the left"),
        ("...", ""),
        ("", ""),
    ],
)
def test_only_trailing_periods_and_case_are_forgiven(text: str, compared: str) -> None:
    assert gqa.read_answer(text) == compared


def test_numbers_by_hand(folder: Path) -> None:
    judgement = gqa.score(gqa.read_labels(folder), TEXTS)
    assert judgement.per_question == {"20": 1, "3": 0, "100": 1, "4": 0, "5": 1, "6": 1}
    assert (
        judgement.normalised
        == {"20": "red", "3": "green", "100": "blue", "4": "dog", "5": "yes", "6": "man"}
        == judgement.submission
    )
    expected = {
        "accuracy": 100 * 4 / 6,
        "binary": 50,
        "open": 75,
        "structural.choose": 0,
        "structural.query": 75,
        "structural.verify": 100,
        "semantic.attr": 100 * 2 / 3,
        "semantic.cat": 0,
        "semantic.obj": 100,
        # To ask for a name, to choose a name and to ask for existence are no steps; to ask for a
        # colour is one.
        "steps.1": 50,
        "steps.2": 75,
        "words.3": 100,
        "words.4": 50,
        "words.5": 100,
        "words.7": 0,
    }
    found = values(tally(judgement.contributions), gqa.measure)
    assert found == pytest.approx(expected) and list(found) == list(expected)
    assert {name.partition(".")[0] for name in found} | set(judgement.extra) == {
        metric.name for metric in gqa.BENCHMARK.metrics
    }


def test_distribution_by_hand(folder: Path) -> None:
    """Colours give 3 x 1/2: red 2 -> 1 is 1/2, blue 1 -> 1 is 0, and green is not gold.

    Animals give 1: cat 1 -> 0. The sum is divided by the 4 answers.
    """
    judgement = gqa.score(gqa.read_labels(folder), TEXTS)
    assert judgement.extra == pytest.approx({"distribution": (0.5 * 3 + 1 * 1) / 4 / 100})
    perfect = gqa.score(gqa.read_labels(folder), {row[0]: row[3] for row in ROWS})
    assert perfect.extra == {"distribution": 0}
    without_groups = [
        question for question in gqa.read_labels(folder) if question.facts["group"] is None
    ]
    assert str(gqa.score(without_groups, TEXTS).extra["distribution"]) == "nan"


def test_images_are_the_clusters_and_metrics_resample(folder: Path) -> None:
    sums = tally(gqa.score(gqa.read_labels(folder), TEXTS).contributions)
    assert sums.clusters == ("n1", "n2", "n3")
    spread = intervals(sums, gqa.measure, num_resamples=200)
    assert spread["accuracy"] == (50, 100)  # the images are worth 1/2, 1/2 and 1


def test_lengths_are_in_the_order_of_numbers() -> None:
    names = (
        "words.10",
        "steps.2",
        "words.9",
        "accuracy",
        "semantic.rel",
        "open",
        "semantic.attr",
        "steps.11",
    )
    found = gqa.measure(tally([("n", dict.fromkeys(names, 1.0))]).totals())
    assert list(found) == [
        "accuracy",
        "open",
        "semantic.attr",
        "semantic.rel",
        "steps.2",
        "steps.11",
        "words.9",
        "words.10",
    ]


def test_questions_outside_the_balanced_set_count_for_nothing(folder: Path) -> None:
    rewrite(folder, lambda content: content | {"3": content["3"] | {"isBalanced": False}})
    asked = gqa.read_labels(folder)
    judgement = gqa.score(asked, TEXTS)
    assert values(tally(judgement.contributions), gqa.measure)["accuracy"] == pytest.approx(
        100 * 4 / 5
    )
    assert judgement.per_question["3"] == 0
    assert judgement.extra["distribution"] == pytest.approx((0 * 2 + 1 * 1) / 3 / 100)
    assert (
        "1 questions are not of the balanced set"
        in gqa.BENCHMARK.doubts(asked, "testdev_balanced")[0]
    )


def test_questions_are_those_of_the_protocol(folder: Path) -> None:
    asked = gqa.BENCHMARK.questions(folder, "testdev_balanced")
    assert [question.id for question in asked] == [row[0] for row in ROWS]
    assert asked[0].text == "What color is the car?" + SHORT
    assert asked[2].image == folder / "images" / "n2.jpg"
    assert gqa.read_labels(folder / gqa.FILE)[0].text == "What color is the car?"
    assert gqa.BENCHMARK.doubts(asked, "testdev_balanced") == []


def test_the_upload_is_the_official_predictions_file(folder: Path) -> None:
    files = gqa.BENCHMARK.submission(gqa.read_labels(folder), TEXTS)
    rows = json.loads(files["testdev_balanced_predictions.json"])
    assert rows[0] == {"questionId": "20", "prediction": "red"} and len(rows) == 6


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: list(content.values()), "not an object of questions by id"),
        (
            lambda content: {"8": content["3"] | {"answer": 3}},
            "question 8: answer 3 should be a valid string: get the official file again",
        ),
        (
            lambda content: {
                "8": {key: value for key, value in content["3"].items() if key != "types"}
            },
            "question 8 has no 'types'",
        ),
        (
            lambda content: {"8": content["3"] | {"types": {}}},
            "question 8 has no 'types\\.structural'",
        ),
        (
            lambda content: {"8": content["3"] | {"semantic": [{"operation": "x"}]}},
            "question 8 has no 'semantic\\.0\\.argument'",
        ),
    ],
)
def test_a_malformed_file_is_named(folder: Path, change: Any, sentence: str) -> None:
    rewrite(folder, change)
    with pytest.raises(ValueError, match=rf"testdev_balanced_questions\.json.*{sentence}"):
        gqa.read_labels(folder)


def test_missing_things_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test': choose testdev_balanced"):
        gqa.BENCHMARK.questions(folder, "test")
    with pytest.raises(ValueError, match=r"no packaged copy: get testdev_balanced_questions\.json"):
        gqa.BENCHMARK.questions(None, "testdev_balanced")
    (folder / "images" / "n3.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .*n3\.jpg"):
        gqa.BENCHMARK.questions(folder, "testdev_balanced")
    with pytest.raises(FileNotFoundError, match=r"has no testdev_balanced_questions\.json"):
        gqa.read_labels(folder / "images")


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    rows = [
        ("201", "n1", "Is there a cat?", "yes", "verify", "obj", "exist"),
        ("202", "n1", "Is the cat red?", "no", "verify", "attr", "verify color"),
        ("203", "n1", "What color is the car?", "red", "query", "attr", "query"),
        ("204", "n2", "Is it indoors?", "no", "verify", "global", "verify"),
        ("205", "n2", "Are there dogs?", "yes", "verify", "obj", "exist"),
        ("206", "n2", "Is that a cat or a dog?", "dog", "choose", "cat", "choose name"),
    ]
    questions = {
        name: {
            "semantic": [{"operation": operation, "argument": "it", "dependencies": []}],
            "question": question,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": semantic, "local": None},
            "answer": answer,
            "types": {"detailed": "x", "semantic": semantic, "structural": structural},
            "fullAnswer": "",
        }
        for name, image, question, answer, structural, semantic, operation in rows
    }
    write_file(folder / "testdev_balanced_questions.json", questions)
    write_images(folder / "images", ("n1.jpg", "n2.jpg"))


OFFICIAL = Official(
    write=write_official,
    gold={"201": "yes", "202": "No.", "203": "red", "204": "no", "205": "Yes", "206": "dog"},
    size="12,578",
    readings=("normalised", "submission"),
    broken_label=BrokenLabel(
        "testdev_balanced_questions.json",
        '"answer": "red"',
        '"answer": 3',
        ("questions.json question 203", "answer 3 should be a valid string"),
    ),
    image="images/n2.jpg",
    upload="testdev_balanced_predictions.json",
    without_sums=("distribution",),
)
