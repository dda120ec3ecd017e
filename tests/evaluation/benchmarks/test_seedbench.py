"""SEED-Bench: nothing but the letter counts; images are the headline, answered videos beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import intervals, tally, values
from mipha.evaluation.benchmarks import seedbench
from tests.evaluation.official import BrokenLabel, Official, write_file, write_images

TYPES = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}

# id, image, type, answer, kind
ROWS: list[tuple[Any, str, int, str, str]] = [
    ("101669", "1454426_2591111986", 5, "A", "image"),
    ("104933", "1454426_2591111986", 1, "B", "image"),
    (89257, "90_1", 5, "D", "image"),
    ("v1738", "94328.webm", 10, "C", "video"),
]


def record(question_id: Any, image: str, type_id: int, answer: str, kind: str) -> dict[str, Any]:
    choices = dict(
        zip(
            ("choice_a", "choice_b", "choice_c", "choice_d"),
            ("One", "Two", "Three", "Four"),
            strict=True,
        )
    )
    names = {
        "answer": answer,
        "data_id": image,
        "data_type": kind,
        "question": "How many towels?",
        "question_id": question_id,
    }
    return choices | names | {"question_type_id": type_id}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "SEED-Bench.json").write_text(
        json.dumps({"questions": [record(*row) for row in ROWS], "question_type": TYPES})
    )
    (tmp_path / "SEED-Bench-image").mkdir()
    for image in ("1454426_2591111986", "90_1"):
        (tmp_path / "SEED-Bench-image" / image).touch()
    return tmp_path


def test_numbers_by_hand(folder: Path) -> None:
    judgement = seedbench.score(
        seedbench.read_labels(folder), {"101669": "A", "104933": "C", "89257": "D", "v1738": "C"}
    )
    assert judgement.per_question == {"101669": 1, "104933": 0, "89257": 1, "v1738": 1}
    found = values(tally(judgement.contributions), seedbench.measure)
    expected = {
        "image": 100 * 2 / 3,
        "video": 100,
        "total": 75,
        "type.Action Recognition": 100,
        "type.Instances Counting": 100,
        "type.Scene Understanding": 0,  # LLaVA's script stops here: no right answer
    }
    assert found == pytest.approx(expected) and list(found) == list(expected)


def test_videos_may_be_left_out(folder: Path) -> None:
    asked = seedbench.read_labels(folder)
    assert [question.id for question in asked if question.facts["optional"]] == ["v1738"]
    images = [question for question in asked if not question.facts["optional"]]
    found = values(
        tally(seedbench.score(images, {"101669": "A", "104933": "B", "89257": "B"}).contributions),
        seedbench.measure,
    )
    assert found == pytest.approx(
        {"image": 100 * 2 / 3, "type.Instances Counting": 50, "type.Scene Understanding": 100}
    )


@pytest.mark.parametrize(
    "text", ["A.", "(A)", "a", "A. One", " A", "A ", "A\n", "", "AB", "One", "The answer is A."]
)
def test_the_text_must_be_the_letter(folder: Path, text: str) -> None:
    judgement = seedbench.score(seedbench.read_labels(folder)[:1], {"101669": text})
    assert judgement.per_question == {"101669": 0} and judgement.parsed == {"101669": None}
    assert seedbench.score(seedbench.read_labels(folder)[:1], {"101669": "B"}).parsed == {
        "101669": "B"
    }


def test_images_are_the_clusters_and_metrics_resample(folder: Path) -> None:
    judgement = seedbench.score(
        seedbench.BENCHMARK.questions(folder, "image"), {"101669": "A", "104933": "B", "89257": "A"}
    )
    sums = tally(judgement.contributions)
    assert sums.clusters == ("1454426_2591111986", "90_1")
    assert intervals(sums, seedbench.measure, num_resamples=200)["image"] == (0, 100)


def test_questions_are_about_images_only_and_those_of_the_protocol(folder: Path) -> None:
    asked = seedbench.BENCHMARK.questions(folder, "image")
    assert [question.id for question in asked] == ["101669", "104933", "89257"]
    assert asked[0].text == (
        "How many towels?\nA. One\nB. Two\nC. Three\nD. Four\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert asked[2].image == folder / "SEED-Bench-image" / "90_1"
    assert seedbench.read_labels(folder / "SEED-Bench.json")[3].text == "How many towels?"


def test_the_upload_has_the_official_ids(folder: Path) -> None:
    texts = {"101669": "A", "104933": "B. Two", "89257": "é"}
    (content,) = seedbench.BENCHMARK.submission(
        seedbench.BENCHMARK.questions(folder, "image"), texts
    ).values()
    rows = [json.loads(line) for line in content.decode().splitlines()]
    assert rows == [
        {"question_id": "101669", "prediction": "A"},
        {"question_id": "104933", "prediction": "B. Two"},
        {"question_id": 89257, "prediction": "é"},
    ]
    assert (
        seedbench.score(seedbench.BENCHMARK.questions(folder, "image"), texts).submission == texts
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": "E"}, "question number 1 .*: answer 'E' should be 'A', 'B', 'C' or 'D'"),
        ({"answer": "AB"}, "question number 1 .*: answer 'AB' should be 'A', 'B', 'C' or 'D'"),
        ({"answer": ""}, "question number 1 .*: answer '' should be 'A', 'B', 'C' or 'D'"),
        ({"answer": 1}, "question number 1 .*: answer 1 should be 'A', 'B', 'C' or 'D'"),
        (
            {"data_type": "Single Image"},
            "question number 1 .*: data_type 'Single Image' should be 'image' or 'video'",
        ),
        ({"question_type_id": 13}, "question number 1 .* has the question_type_id 13"),
        (
            {"question_id": 101669},
            "question number 1 .* has the question_id 101669 of .* question number 0",
        ),
    ],
)
def test_a_malformed_question_is_named(folder: Path, change: dict[str, Any], sentence: str) -> None:
    content = json.loads((folder / "SEED-Bench.json").read_text())
    content["questions"][1] |= change
    (folder / "SEED-Bench.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"SEED-Bench\.json {sentence}"):
        seedbench.read_labels(folder)


def test_missing_things_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test': choose image"):
        seedbench.BENCHMARK.questions(folder, "test")
    with pytest.raises(ValueError, match=r"no packaged copy: get SEED-Bench\.json"):
        seedbench.BENCHMARK.questions(None, "image")
    (folder / "SEED-Bench-image" / "90_1").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .*90_1"):
        seedbench.BENCHMARK.questions(folder, "image")
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": {}, "question_type": TYPES}))
    with pytest.raises(
        ValueError, match=r"SEED-Bench\.json: questions \{\} should be a valid list"
    ):
        seedbench.read_labels(folder)
    (folder / "SEED-Bench.json").write_text("{}")
    with pytest.raises(ValueError, match=r"SEED-Bench\.json has no 'question_type'"):
        seedbench.read_labels(folder)


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    rows = [
        ("101669", "1454426_2591111986", 5, "A", "image"),
        ("104933", "1454426_2591111986", 1, "B", "image"),
        ("104934", "90_1", 1, "B", "image"),
        (89257, "90_1", 5, "D", "image"),
        ("v1738", "94328.webm", 10, "C", "video"),
    ]
    names = ("question_id", "data_id", "question_type_id", "answer", "data_type")
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    questions = [
        dict(zip(names, row, strict=True)) | choices | {"question": f"How many in number {row[0]}?"}
        for row in rows
    ]
    types = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    write_file(folder / "SEED-Bench.json", {"questions": questions, "question_type": types})
    write_images(folder / "SEED-Bench-image", ("1454426_2591111986", "90_1"), kind="JPEG")


OFFICIAL = Official(
    write=write_official,
    gold={"101669": "A", "104933": "B", "104934": "B", "89257": "D"},
    size="14,233",
    readings=("parsed", "submission"),
    broken_label=BrokenLabel(
        "SEED-Bench.json",
        '"answer": "D"',
        '"answer": "E"',
        ("SEED-Bench.json question number 3", "answer 'E' should be 'A', 'B', 'C' or 'D'"),
    ),
    metric="image",
    image="SEED-Bench-image/90_1",
    upload="seedbench_predictions.jsonl",
)
