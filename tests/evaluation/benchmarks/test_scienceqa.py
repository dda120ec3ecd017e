"""ScienceQA: which texts are read as which letter, and which questions the paper's number has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import intervals, tally, values
from mipha.evaluation.benchmarks import scienceqa
from tests.evaluation.official import BrokenLabel, Official, write_file, write_images

LETTER = "\nAnswer with the option's letter from the given choices directly."
PROBLEMS: dict[str, dict[str, Any]] = {
    "7": {
        "question": "Which state?",
        "choices": ["Maine", "Utah", "Ohio", "Iowa"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
    },
    "4": {
        "question": "Which figure?",
        "choices": ["chiasmus", "apostrophe"],
        "answer": 0,
        "hint": "Read.\n\nThen answer.",
        "image": None,
    },
    "12": {
        "question": "Select one.",
        "choices": list("vwxyz"),
        "answer": 4,
        "hint": "Look.",
        "image": "image.png",
    },
    "1": {
        "question": "Trained on?",
        "choices": ["yes", "no"],
        "answer": 0,
        "hint": "",
        "image": None,
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rest = {
        "task": "closed choice",
        "grade": "grade2",
        "subject": "x",
        "topic": "x",
        "category": "x",
        "skill": "x",
        "lecture": "",
        "solution": "",
    }
    (tmp_path / "problems.json").write_text(
        json.dumps({name: problem | rest for name, problem in PROBLEMS.items()})
    )
    (tmp_path / "pid_splits.json").write_text(
        json.dumps({"train": ["1"], "test": ["4", "7", "12"]})
    )
    for name in ("7", "12"):
        image = tmp_path / "images" / "test" / name / "image.png"
        image.parent.mkdir(parents=True)
        image.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", None),
        ("a", None),
        ("", None),
        ("AB", None),
        ("A.", None),
        ("(A)", None),
        (" A", None),
        ("A\n", None),
        ("A. ", "A"),
        ("B. Utah", "B"),
        ("B.Utah", None),
        ("F. none", None),
        ("The answer is C.", "C"),
        ("So. The answer is C, I think", "C"),
        ("The answer is AB.", "A"),
        ("The answer is Z!", "Z"),
        ("The answer is C", None),
        ("The answer is C\n", None),
        ("the answer is C.", None),
        ("The answer is c.", None),
        ("The answer is A. The answer is B.", None),
        ("The answer is A. The answer is B", "A"),
        ("B. The answer is C.", "B"),
    ],
)
def test_which_letter_is_read(text: str, letter: str | None) -> None:
    assert scienceqa.read_letter(text) == letter


def test_numbers_by_hand(folder: Path) -> None:
    judgement = scienceqa.score(
        scienceqa.read_labels(folder),
        {"4": "The answer is A.", "7": "B. Utah", "12": "The answer is E"},
    )
    assert judgement.per_question == {"4": 1, "7": 1, "12": 0}
    assert judgement.parsed == {"4": "A", "7": "B", "12": None}
    found = values(tally(judgement.contributions), scienceqa.measure)
    assert found == pytest.approx(
        {"img_accuracy": 50, "accuracy": 100 * 2 / 3, "correct": 2, "total": 3}
    )
    assert list(found) == [metric.name for metric in scienceqa.BENCHMARK.metrics]


def test_a_letter_that_is_not_offered_is_wrong(folder: Path) -> None:
    judgement = scienceqa.score(scienceqa.read_labels(folder), {"4": "C", "7": "E", "12": "E"})
    assert judgement.per_question == {"4": 0, "7": 0, "12": 1}
    assert judgement.parsed == {"4": "C", "7": "E", "12": "E"}
    beyond = scienceqa.score(
        scienceqa.read_labels(folder), dict.fromkeys(("4", "7", "12"), "The answer is Q.")
    )
    assert set(beyond.per_question.values()) == {0}


def test_every_question_is_its_own_cluster_and_metrics_resample(folder: Path) -> None:
    sums = tally(
        scienceqa.score(
            scienceqa.read_labels(folder), {"4": "A", "7": "B", "12": "A"}
        ).contributions
    )
    assert sums.clusters == ("4", "7", "12")
    assert intervals(sums, scienceqa.measure, num_resamples=200)["img_accuracy"] == (0, 100)


def test_questions_are_those_of_the_protocol(folder: Path) -> None:
    asked = scienceqa.BENCHMARK.questions(folder, "test")
    assert [question.id for question in asked] == ["4", "7", "12"]
    assert [question.text for question in asked] == [
        "Context: Read.\n\nThen answer.\nWhich figure?\nA. chiasmus\nB. apostrophe" + LETTER,
        "Which state?\nA. Maine\nB. Utah\nC. Ohio\nD. Iowa" + LETTER,
        "Context: Look.\nSelect one.\nA. v\nB. w\nC. x\nD. y\nE. z" + LETTER,
    ]
    assert [question.image for question in asked] == [
        None,
        *(folder / "images" / "test" / name / "image.png" for name in ("7", "12")),
    ]
    assert scienceqa.read_labels(folder)[1].text == "Which state?"


def test_prompts_are_llavas_where_its_file_lies_there(folder: Path) -> None:
    turns = {
        "4": "Which figure?\nA. c\nB. a",
        "7": "<image>\nContext: x\nWhich state?\nA. Maine",
        "12": "<image>\nSelect one.",
    }
    rows = [
        {
            "id": name,
            "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}],
        }
        for name, text in turns.items()
    ]
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(rows))
    asked = scienceqa.BENCHMARK.questions(folder, "test")
    assert [question.text for question in asked] == [
        "Which figure?\nA. c\nB. a" + LETTER,
        "Context: x\nWhich state?\nA. Maine" + LETTER,
        "Select one." + LETTER,
    ]
    assert asked[1].facts == {"answer": "B", "has_image": True}
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(ValueError, match=r"llava_test_CQM-A\.json has no '4'"):
        scienceqa.BENCHMARK.questions(folder, "test")


def test_a_test_split_with_other_images_is_doubted(folder: Path) -> None:
    question = scienceqa.read_labels(folder)
    whole = [question[1]] * 2017 + [question[0]] * 2224
    assert (
        scienceqa.BENCHMARK.doubts(whole, "test")
        == []
        == scienceqa.BENCHMARK.doubts(question, "test")
    )
    assert (
        "2,018 questions have an image, not the 2,017"
        in scienceqa.BENCHMARK.doubts([question[1], *whole[:-1]], "test")[0]
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": 4}, "problem 7 has the answer 4, not the index of one of its 4 choices"),
        ({"answer": -1}, "problem 7 has the answer -1"),
        ({"answer": "B"}, "problem 7: answer 'B' should be a valid integer"),
        ({"choices": ["one"]}, "problem 7: choices .* should have at least 2 items, not 1"),
        ({"choices": list("abcdef")}, "problem 7: choices .* should have at most 5 items, not 6"),
        ({"question": None}, "problem 7: question None should be a valid string"),
    ],
)
def test_a_malformed_problem_is_named(folder: Path, change: dict[str, Any], sentence: str) -> None:
    problems = json.loads((folder / "problems.json").read_text())
    (folder / "problems.json").write_text(json.dumps(problems | {"7": problems["7"] | change}))
    with pytest.raises(ValueError, match=rf"problems\.json {sentence}"):
        scienceqa.read_labels(folder)


def test_missing_things_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="no split 'val': choose test"):
        scienceqa.BENCHMARK.questions(folder, "val")
    with pytest.raises(ValueError, match=r"no packaged copy: get problems\.json"):
        scienceqa.BENCHMARK.questions(None, "test")
    with pytest.raises(ValueError, match=r"problems\.json is one file: give the folder"):
        scienceqa.read_labels(folder / "problems.json")
    (folder / "images/test/12/image.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .*12.image\.png"):
        scienceqa.BENCHMARK.questions(folder, "test")
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["4", "99"]}))
    with pytest.raises(ValueError, match=r"has no problem 99, which .*pid_splits\.json names"):
        scienceqa.read_labels(folder)
    (folder / "pid_splits.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no pid_splits\.json"):
        scienceqa.read_labels(folder)


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    rows = {
        "1": ("Trained on?", ["yes", "no"], 0, "", None),
        "4": ("Which figure?", ["chiasmus", "apostrophe"], 0, "Read.", None),
        "7": ("Which state?", ["Maine", "Utah", "Ohio", "Iowa"], 1, "", "image.png"),
        "12": ("Select one.", list("vwxyz"), 4, "Look.", "image.png"),
        "15": ("Is it warm?", ["yes", "no"], 0, "", "image.png"),
        "20": ("Is it cold?", ["yes", "no"], 1, "", "image.png"),
    }
    rest = dict.fromkeys(
        ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), "x"
    )
    problems = {
        name: rest | dict(zip(("question", "choices", "answer", "hint", "image"), row, strict=True))
        for name, row in rows.items()
    }
    write_file(folder / "problems.json", problems)
    write_file(folder / "pid_splits.json", {"train": ["1"], "test": ["4", "7", "12", "15", "20"]})
    for name, row in rows.items():
        write_images(folder / "images" / "test" / name, ("image.png",) if row[4] else ())


OFFICIAL = Official(
    write=write_official,
    gold={"4": "A", "7": "B", "12": "The answer is E.", "15": "A. yes", "20": "B"},
    size="4,241",
    readings=("parsed",),
    broken_label=BrokenLabel(
        "problems.json",
        '"answer": 4',
        '"answer": 5',
        ("problems.json problem 12 has the answer 5", "of its 5 choices"),
    ),
    metric="img_accuracy",
    image="images/test/12/image.png",
    other_files=("pid_splits.json",),
    prompts=(
        "  4\n    <|im_start|>user\n    Context: Read.\n    Which figure?\n"
        "    A. chiasmus\n    B. apostrophe\n"
        "    Answer with the option's letter from the given choices directly.<|im_end|>\n",
    ),
    num_bare=1,
)
