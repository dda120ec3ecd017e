"""POPE: what is read as no, the numbers of each subset, and the mean of the three F1."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import intervals, tally, values
from mipha.evaluation.benchmark import Question
from mipha.evaluation.benchmarks import pope
from tests.evaluation.official import BrokenLabel, Official, write_file, write_images

# subset -> (id, image, label)
ROWS = {
    "adversarial": [
        (1, "a.jpg", "yes"),
        (2, "a.jpg", "yes"),
        (3, "b.jpg", "no"),
        (4, "b.jpg", "no"),
    ],
    "random": [(1, "a.jpg", "yes"), (2, "b.jpg", "no"), (5, "c.jpg", "yes")],
    "popular": [(1, "a.jpg", "yes"), (2, "c.jpg", "no")],
}
# Adversarial: TP 1, FN 1, FP 1, TN 1. Random: TP 2, TN 1. Popular: TP 1, FP 1.
TEXTS = {
    "1": "Yes", "2": "No", "3": "NO", "4": "No, not there.",
    "10000001": "yes", "10000002": "There is no car", "10000005": "",
    "20000001": "Yes, it is", "20000002": "None",
}  # fmt: skip


def write(folder: Path, subset: str, rows: list[tuple[Any, Any, Any]], name: str = "") -> None:
    lines = [
        {"question_id": i, "image": image, "text": "Is there a car in the image?", "label": label}
        for i, image, label in rows
    ]
    (folder / (name or f"coco_pope_{subset}.json")).write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "val2014").mkdir()
    for image in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / "val2014" / image).touch()
    for subset, rows in ROWS.items():
        write(tmp_path, subset, rows)
    (tmp_path / "README.md").write_text("other files do not matter")
    return tmp_path


def numbers(folder: Path, texts: dict[str, str]) -> dict[str, float]:
    return values(tally(pope.score(pope.read_labels(folder), texts).contributions), pope.measure)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No", "no"),
        ("no", "no"),
        ("No.", "no"),
        ("No, it is", "no"),
        ("n,o", "no"),
        ("There is not a car", "no"),
        ("Yes and no", "no"),
        ("I see no  car", "no"),
        ("Yes. There is no dog.", "yes"),
        (".No", "yes"),
        ("NO", "yes"),
        ("Not", "yes"),
        ("No!", "yes"),
        ("no\nit is not there", "no"),
        ("no\nthere is none", "yes"),
        ("no\t", "yes"),
        ("None", "yes"),
        ("cannot", "yes"),
        ("it isn't", "yes"),
        ("nothing", "yes"),
        ("", "yes"),
        ("unsure", "yes"),
    ],
)
def test_which_answer_is_read(text: str, answer: str) -> None:
    assert pope.read_answer(text) == answer


def test_numbers_by_hand(folder: Path) -> None:
    judgement = pope.score(pope.read_labels(folder), TEXTS)
    assert judgement.per_question == {
        "1": 1, "2": 0, "3": 0, "4": 1, "10000001": 1, "10000002": 1, "10000005": 1,
        "20000001": 1, "20000002": 0,
    }  # fmt: skip
    assert judgement.parsed is not None
    assert [judgement.parsed[name] for name in ("2", "3", "4", "10000002", "20000002")] == [
        "no",
        "yes",
        "no",
        "no",
        "yes",
    ]
    found = numbers(folder, TEXTS)
    subset = ("f1", "accuracy", "precision", "recall", "yes_ratio", "TP", "FP", "TN", "FN")
    rows = {
        "adversarial": (50, 50, 50, 50, 50, 1, 1, 1, 1),
        "random": (100, 100, 100, 100, 100 * 2 / 3, 2, 0, 1, 0),
        "popular": (100 * 2 / 3, 50, 50, 100, 100, 1, 1, 0, 0),
    }
    expected = {"f1": (50 + 100 + 200 / 3) / 3}
    expected |= {
        f"{name}.{metric}": value
        for name, row in rows.items()
        for metric, value in zip(subset, row, strict=True)
    }
    assert found == pytest.approx(expected) and list(found) == list(expected)


def test_a_division_by_zero_is_undefined_not_zero(folder: Path) -> None:
    """No yes in adversarial, no precision; no right yes, no F1: the official script stops there."""
    found = numbers(folder, TEXTS | {"1": "no", "2": "no", "3": "no", "4": "no"})
    assert {
        name: str(found[name]) for name in ("f1", "adversarial.f1", "adversarial.precision")
    } == {
        "f1": "nan",
        "adversarial.f1": "nan",
        "adversarial.precision": "nan",
    }
    assert (
        found["adversarial.recall"],
        found["adversarial.yes_ratio"],
        found["adversarial.accuracy"],
    ) == (0, 0, 50)
    only_wrong = numbers(folder, TEXTS | {"1": "no", "2": "no"})
    assert (only_wrong["adversarial.precision"], only_wrong["adversarial.recall"]) == (0, 0)
    assert str(only_wrong["adversarial.f1"]) == "nan"
    assert only_wrong["random.f1"] == 100


def test_images_are_the_clusters_across_subsets_and_names_do_not_depend_on_answers(
    folder: Path,
) -> None:
    sums = tally(pope.score(pope.read_labels(folder), TEXTS).contributions)
    assert sums.clusters == ("a.jpg", "b.jpg", "c.jpg")
    other = tally(pope.score(pope.read_labels(folder), dict.fromkeys(TEXTS, "no")).contributions)
    assert sums.names == other.names
    low, high = intervals(sums, pope.measure, num_resamples=200)["adversarial.accuracy"]
    assert (low, high) == (50, 50)  # either image is worth one of two


def test_questions_are_those_of_the_protocol(folder: Path) -> None:
    asked = pope.BENCHMARK.questions(folder, "test")
    assert [question.id for question in asked] == list(TEXTS)
    assert (
        asked[0].text
        == "Is there a car in the image?\nAnswer the question using a single word or phrase."
    )
    assert asked[5].image == folder / "val2014" / "b.jpg"
    assert asked[5].facts == {"answer": "no", "image": "b.jpg", "subset": "random"}
    assert pope.read_labels(folder)[0].text == "Is there a car in the image?"


def test_the_three_files_may_lie_in_coco(folder: Path) -> None:
    (folder / "coco").mkdir()
    for subset in ROWS:
        (folder / f"coco_pope_{subset}.json").rename(folder / "coco" / f"coco_pope_{subset}.json")
    assert len(pope.BENCHMARK.questions(folder, "test")) == 9


@pytest.mark.parametrize(("num_random", "num_doubts"), [(2910, 0), (3000, 1)])
def test_the_later_random_file_is_doubted(num_random: int, num_doubts: int) -> None:
    asked = [Question(str(i), "", None, {"subset": "random"}) for i in range(num_random)]
    asked += [Question(str(-i), "", None, {"subset": "popular"}) for i in range(3000)]
    found = pope.BENCHMARK.doubts(asked, "test")
    assert len(found) == num_doubts and all(
        "2,910" in doubt and "e3e3926" in doubt for doubt in found
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [(1, "a.jpg", "yes"), (2, "a.jpg", "maybe")],
            "line 2: label 'maybe' should be 'yes' or 'no'",
        ),
        ([(1, "a.jpg", "yes"), (1, "b.jpg", "no")], "line 2 has the question_id 1 of .* line 1"),
        (
            [(10_000_001, "a.jpg", "yes")],
            "line 1: question_id 10000001 should be less than 10000000",
        ),
        ([("1", "a.jpg", "yes")], "line 1: question_id '1' should be a valid integer"),
        ([(1, None, "yes")], "line 1: image None should be a valid string"),
    ],
)
def test_a_malformed_line_is_named(
    folder: Path, rows: list[tuple[Any, Any, Any]], sentence: str
) -> None:
    write(folder, "random", rows)
    with pytest.raises(ValueError, match=rf"coco_pope_random\.json {sentence}"):
        pope.read_labels(folder)


def test_missing_things_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="no split 'coco': choose test"):
        pope.BENCHMARK.questions(folder, "coco")
    with pytest.raises(ValueError, match=r"no packaged copy: get coco_pope_adversarial\.json"):
        pope.BENCHMARK.questions(None, "test")
    with pytest.raises(ValueError, match=r"coco_pope_random\.json is one file: give the folder"):
        pope.read_labels(folder / "coco_pope_random.json")
    (folder / "val2014" / "c.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .*c\.jpg"):
        pope.BENCHMARK.questions(folder, "test")
    (folder / "coco_pope_popular.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no coco_pope_popular\.json"):
        pope.read_labels(folder)


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    """`coco_pope_*.json` and `val2014/`."""
    first, second = (f"COCO_val2014_{number:012d}.jpg" for number in (42, 139))
    subsets = {
        "adversarial": [(1, first, "yes"), (2, first, "no"), (3, second, "no"), (4, second, "yes")],
        "random": [(1, first, "yes"), (2, first, "no"), (3, second, "yes")],
        "popular": [(1, first, "no"), (2, first, "yes"), (3, second, "no"), (4, second, "yes")],
    }
    for subset, rows in subsets.items():
        write_subset(folder, subset, rows)
    write_images(folder / "val2014", (first, second))


def write_subset(folder: Path, subset: str, rows: Iterable[tuple[int, str, str]]) -> None:
    """One of POPE's three files from (question id, image, label)."""
    lines = [
        {
            "question_id": number,
            "image": image,
            "text": f"Is there a {subset} thing, number {number}, in the image?",
            "label": label,
        }
        for number, image, label in rows
    ]
    write_file(
        folder / f"coco_pope_{subset}.json", "".join(json.dumps(line) + "\n" for line in lines)
    )


OFFICIAL = Official(
    write=write_official,
    gold={
        **{"1": "Yes", "2": "No", "3": "no", "4": "Yes, there is"},
        **{"10000001": "Yes", "10000002": "No", "10000003": "yes"},
        **{"20000001": "There is not", "20000002": "Yes", "20000003": "No", "20000004": "yes"},
    },
    size="8,910",
    readings=("parsed",),
    broken_label=BrokenLabel(
        "coco_pope_random.json",
        '"no"',
        '"maybe"',
        ("coco_pope_random.json line 2", "label 'maybe' should be 'yes' or 'no'"),
    ),
    metric="f1",
    image="val2014/COCO_val2014_000000000139.jpg",
    other_files=("coco_pope_adversarial.json", "coco_pope_popular.json"),
    prompts=(
        "  1\n    <|im_start|>user\n    <image>\n"
        "    Is there a adversarial thing, number 1, in the image?\n"
        "    Answer the question using a single word or phrase.<|im_end|>\n",
    ),
)
