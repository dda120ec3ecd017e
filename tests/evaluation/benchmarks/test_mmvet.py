"""MM-Vet: the prompt, the reading of grades, the tries, the averages."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmark import Question
from mipha.evaluation.benchmarks import mmvet
from mipha.evaluation.benchmarks.mmvet import grading_prompt, read_grade
from mipha.evaluation.judge import Replay
from tests.evaluation.official import BrokenLabel, Official, write_file, write_images

RECORDS = {
    "v1_0": {
        "imagename": "a.png",
        "imagesource": "x",
        "question": "What is x?",
        "answer": "-1<AND>-5",
        "capability": ["ocr", "math"],
    },
    "v1_1": {
        "imagename": "a.png",
        "imagesource": "x",
        "question": "Who?",
        "answer": "Ann<OR>Bea",
        "capability": ["rec", "know", "gen"],
    },
    "v1_2": {
        "imagename": "b.png",
        "imagesource": "x",
        "question": "Where?",
        "answer": "left",
        "capability": ["rec"],
    },
    "v1_3": {
        "imagename": "b.png",
        "imagesource": "x",
        "question": "Why?",
        "answer": "fun",
        "capability": ["gen", "rec", "know"],
    },
}
ANSWERS = {"v1_0": "x = -1", "v1_1": "Bea", "v1_2": "right", "v1_3": ""}


def labelled(tmp_path: Path, **changed: Any) -> list[Question]:
    (tmp_path / "mm-vet.json").write_text(json.dumps(RECORDS | changed), encoding="utf-8")
    return mmvet.read_labels(tmp_path / "mm-vet.json")


def recorded(tmp_path: Path, *runs: Sequence[Sequence[str]]) -> Replay:
    """Replies to every question in the order of RECORDS, run by run."""
    rows = [
        {"question_id": name, "run": run, "responses": replies}
        for run, row in enumerate(runs)
        for name, replies in zip(RECORDS, row, strict=True)
    ]
    (tmp_path / "replies.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return Replay(tmp_path / "replies.jsonl")


class Judge:
    """Gives one reply to everything, and remembers how it was asked."""

    def __init__(self, reply: str, num_runs: int | None) -> None:
        self.reply, self.num_runs = reply, num_runs
        self.asked: list[tuple[str, int, int, float, int]] = []
        self.prompts: list[str] = []

    def ask(
        self,
        question_id: str,
        prompt: str,
        *,
        run: int = 0,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 16,
    ) -> str:
        self.asked.append((question_id, run, attempt, temperature, max_tokens))
        self.prompts.append(prompt)
        return self.reply


def test_the_grading_prompt_is_the_official_one() -> None:
    prompt = grading_prompt("Q?", "a<AND>b<OR>c", "It's a | b")
    few_shot, _, asked = prompt.rpartition("\n")
    # The table ends with a line break of its own.
    assert asked == "Q? | a <AND> b <OR> c | It's a | b | " and few_shot.endswith(
        "characteristics. | 1.0\n"
    )
    # Of the few-shot table in the official notebook.
    assert (
        hashlib.sha256(few_shot.encode()).hexdigest()
        == "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"
    )


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        *(
            ("0.5", 0.5),
            ("1", 1.0),
            ("0.0", 0.0),
            ("0.55", 0.55),
            (".5", 0.5),
            ("1e-1", 0.1),
            ("-0.0", 0.0),
            ("\n0.3\n", 0.3),
        ),
        *(
            ("0.5 because", 0.5),
            ("0.5 / 1", 0.5),
            (" 0.8", None),
            ("0.5/1", None),
            ("1.1", None),
            ("-0.1", None),
            ("inf", None),
        ),
        *(("", None), ("half", None), ("0,5", None), ("0.5.", None)),
    ],
)
def test_reading_a_grade(reply: str, grade: float | None) -> None:
    assert read_grade(reply) == grade
    assert math.isnan(read_grade("nan") or 0.0)  # slips through, as officially


def test_averages(tmp_path: Path) -> None:
    replay = recorded(
        tmp_path,
        [["0.5"], ["1.0"], ["0.0"], ["0.1"]],
        [["0.7"], ["hm", "x", "1.0 yes"], ["0.2"], [*"abcde", "0.9"]],
    )
    judgement = mmvet.score(labelled(tmp_path), ANSWERS, replay)
    # Grades: 0.5 1.0 0.0 0.1, then 0.7 1.0 0.2 0.0: five unreadable replies are a 0, whatever the
    # sixth would be.
    means = {"v1_0": 0.6, "v1_1": 1.0, "v1_2": 0.1, "v1_3": 0.05}
    assert judgement.per_question == pytest.approx(means)
    measured = values(tally(judgement.contributions), mmvet.measure)
    assert next(iter(measured)) == "total"
    assert measured == pytest.approx(
        {
            **{"total": 43.75, "rec": 115 / 3, "ocr": 60, "know": 52.5, "gen": 52.5, "math": 60},
            **{
                "capability_set.gen_know_rec": 52.5,
                "capability_set.math_ocr": 60,
                "capability_set.rec": 10,
            },
        }
    )
    # Totals of the runs are 1.6 / 4 and 1.9 / 4.
    assert judgement.extra == pytest.approx({"std": 3.75, "runs.0": 40, "runs.1": 47.5})
    assert [cluster for cluster, _ in judgement.contributions] == [
        "a.png",
        "a.png",
        "b.png",
        "b.png",
    ]
    assert judgement.submission == ANSWERS
    assert judgement.notes == (
        "graded by the judge in 2 runs; the published numbers are grades of gpt-4-0613",
        "1 of 8 gradings had no readable grade in 5 tries and count as 0, as officially",
    )


def test_an_unreadable_grade_is_asked_for_again_as_officially(tmp_path: Path) -> None:
    judge = Judge("I think", num_runs=1)
    assert set(mmvet.score(labelled(tmp_path), ANSWERS, judge).per_question.values()) == {0.0}
    # Temperature 0 for the first repetition as well, then half a degree more each.
    tries = [(0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0), (4, 1.5)]
    assert judge.asked == [
        (name, 0, attempt, temperature, 3) for name in RECORDS for attempt, temperature in tries
    ]
    assert judge.prompts[0].endswith("| 1.0\n\nWhat is x? | -1 <AND> -5 | x = -1 | ")
    assert (
        judge.prompts[1:5]
        == [judge.prompts[0] + "\nPredict the correctness of the answer (digit): "] * 4
    )


def test_a_judge_without_recorded_runs_grades_five_times(tmp_path: Path) -> None:
    judge = Judge("1", num_runs=None)
    judgement = mmvet.score(labelled(tmp_path), ANSWERS, judge)
    assert [(name, run) for name, run, *_ in judge.asked] == [
        (name, run) for run in range(5) for name in RECORDS
    ]
    assert judgement.extra["std"] == 0 and judgement.notes[0].startswith(
        "graded by the judge in 5 runs"
    )


def test_no_judge_no_score(tmp_path: Path) -> None:
    asked = labelled(tmp_path)
    with pytest.raises(ValueError, match="graded by a judge: give one with --judge"):
        mmvet.score(asked, ANSWERS)
    with pytest.raises(ValueError, match=r"no reply for question v1_0 \(run 0, try 2\)"):
        mmvet.score(asked, ANSWERS, recorded(tmp_path, [["hm"], ["1"], ["1"], ["1"]]))


def test_questions_come_with_their_images(tmp_path: Path) -> None:
    labelled(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"images/b\.png"):
        mmvet.BENCHMARK.questions(tmp_path, "test")
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "b.png")
    asked = mmvet.BENCHMARK.questions(tmp_path, "test")
    assert [question.id for question in asked] == list(RECORDS)
    assert (asked[2].text, asked[2].image) == ("Where?", tmp_path / "images" / "b.png")
    with pytest.raises(ValueError, match="no split 'val': choose test"):
        mmvet.BENCHMARK.questions(tmp_path, "val")
    with pytest.raises(ValueError, match="give its folder with --data-root"):
        mmvet.BENCHMARK.questions(None, "test")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            {"imagename": "a.png", "question": "Q", "answer": "a"},
            "question v1_1 has no 'capability'",
        ),
        (
            {"imagename": "a.png", "question": "Q", "answer": 3, "capability": ["rec"]},
            "question v1_1: answer 3 should be a valid string",
        ),
        (
            {"imagename": "a.png", "question": "Q", "answer": "a", "capability": "rec"},
            "question v1_1: capability 'rec' should be a valid list",
        ),
        (
            {"imagename": "a.png", "question": "Q", "answer": "a", "capability": ["rec", "seq"]},
            "question v1_1: capability .* has 'seq', but MM-Vet knows rec, ocr",
        ),
    ],
)
def test_a_malformed_record_is_named(record: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        labelled(tmp_path, v1_1=record)


def test_files_for_others(tmp_path: Path) -> None:
    asked = labelled(tmp_path)
    (content,) = mmvet.BENCHMARK.submission(asked, ANSWERS).values()
    assert json.loads(content) == ANSWERS and list(json.loads(content)) == list(RECORDS)
    assert mmvet.BENCHMARK.doubts(asked, "test") == []
    assert (
        "such as v2_0, are not of MM-Vet version 1"
        in mmvet.BENCHMARK.doubts(labelled(tmp_path, v2_0=RECORDS["v1_0"]), "test")[0]
    )


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    rows = [
        ("v1_0", "a.png", "What is x?", "-1<AND>-5", ["ocr", "math"]),
        ("v1_1", "a.png", "What is there?", "car<OR>red car", ["rec"]),
        ("v1_2", "b.png", "Where?", "left", ["rec", "spat"]),
        ("v1_3", "b.png", "Why is it fun?", "names", ["rec", "know", "gen"]),
    ]
    records = {
        name: {
            "imagename": image,
            "imagesource": "x",
            "question": question,
            "answer": answer,
            "capability": capabilities,
        }
        for name, image, question, answer, capabilities in rows
    }
    write_file(folder / "mm-vet.json", records)
    write_images(folder / "images", ("a.png", "b.png"))


# Two runs of grades: 0.5 + 1 + 0.5 + 0.2 and 0.7 + 1 + 0.5 + 0.4 of 4 are 55 % and 65 %.
GRADES = {
    "v1_0": ("0.5", "0.7"),
    "v1_1": ("1.0", "1"),
    "v1_2": ("0.5", "0.5 or so"),
    "v1_3": ("0.2", "0.4"),
}
OFFICIAL = Official(
    write=write_official,
    gold={
        "v1_0": "x = -1 or x = -5",
        "v1_1": "A red car",
        "v1_2": "On the left",
        "v1_3": "It pokes fun at names",
    },
    size="218",
    readings=("submission",),
    broken_label=BrokenLabel(
        "mm-vet.json", '"math"', '"smell"', ("mm-vet.json, question v1_0", "has 'smell'")
    ),
    metric="total",
    best=60.0,
    image="images/b.png",
    upload="mmvet.json",
    replies=[
        {"question_id": name, "run": run, "responses": [reply]}
        for name, runs in GRADES.items()
        for run, reply in enumerate(runs)
    ],
    prompts=("  v1_0\n    <|im_start|>user\n    <image>\n    What is x?<|im_end|>\n",),
    without_sums=("std", "runs.0", "runs.1"),
)
