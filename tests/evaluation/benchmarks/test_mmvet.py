"""MM-Vet: the prompt, the reading of grades, the tries, the averages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmark import Question, Reply
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

    notes = ()

    def __init__(self, reply: str, num_runs: int | None) -> None:
        self.reply, self.num_runs = reply, num_runs
        self.asked: list[tuple[str, int, int, float, int]] = []
        self.prompts: list[str] = []
        self.forgotten: list[tuple[str, int]] = []

    def ask(
        self,
        question_id: str,
        prompt: str,
        *,
        run: int = 0,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 16,
    ) -> Reply:
        self.asked.append((question_id, run, attempt, temperature, max_tokens))
        self.prompts.append(prompt)
        return Reply(self.reply)

    def forget(self, question_id: str, run: int = 0) -> None:
        self.forgotten.append((question_id, run))


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
            ("0.5 / 1", 0.5),
            ("1. The prediction", 1.0),
            ("1.1", None),
            ("-0.1", None),
            ("inf", None),
            ("nan", None),
        ),
        *(("", None), ("half", None), ("0,5", None), ("5%", None), ("50 %", None)),
    ],
)
def test_reading_a_grade_as_officially(reply: str, grade: float | None) -> None:
    assert read_grade(Reply(reply)) == grade


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        # White space and marks before the number, and anything behind it but another number.
        *((" 0.8", 0.8), ("**1.0**", 1.0), ("1.0\n\nBecause it is red.", 1.0), ("0.5.", 0.5)),
        *(("0.5/1", 0.5), ("0.5/1.0", 0.5), ("`0.5`", 0.5), ("\n\n 1\n", 1.0), ("0.4, since", 0.4)),
        *(("7/10", None), ("1/10", None), ("1/100", None), ("0.5%", None), (" 0,5", None)),
        *(("0.4-0.6", None), (" 0.4 to 0.6", None), ("1) it is red", None), ("1st", None)),
        *((" 1.5", None), ("1.0.0", None), ("0.5e", None)),
        # The number after a name, if there is one.
        *(("Score: 1.0", 1.0), ("**Score:** 0.5", 0.5), ("Grade = .5", 0.5), ("score is 0", 0.0)),
        *(('{"score": 0.5, "why": "2 of 3"}', 0.5), ("I get \\boxed{0.7}.", 0.7)),
        ("It lacks -5.\n\nFinal score: 0.5", 0.5),
        ("The correctness score of the prediction would be 0.3.", 0.3),
        ("Correctness of the answer (digit): 0.6", 0.6),
        ("Score: 0.5, or rather, score: 0.5", 0.5),
        *(("Score: 0.5, or rather, score: 0.6", None), ("Score 0 to 1: 0.5", None)),
        *(("Score: 30", None), ("Score: -0.5", None), ("The answer is 1 dog", None)),
        *(("a score between 0 and 1", None), ("Score: 1/10", None), ("underscore: 1", None)),
        # The part in which a judge thinks.
        *(("<think>\n0.1 at first</think>\n\n0.5", 0.5), ("0.1, no</think> 0.5 it is", 0.5)),
        *(("<think>\nOkay,", None), ("<think>score: 1.0", None), ("<think>1</think>", None)),
    ],
)
def test_reading_a_grade_that_the_official_rule_does_not_read(
    reply: str, grade: float | None
) -> None:
    assert read_grade(Reply(reply)) == grade


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        *(("0.5", 0.5), ("0", 0.0)),  # officially a grade has three tokens and is always cut
        *(("Score: 0", None), ("**0.", None), (" 0.5", None), ("Score: 1.0 **", None)),
        *((" 0.5\n\nThe answer", 0.5), ("Score: 0.5, be", 0.5)),
    ],
)
def test_a_number_at_the_end_of_a_cut_reply_is_no_grade(reply: str, grade: float | None) -> None:
    assert read_grade(Reply(reply, is_cut=True)) == grade


def test_averages(tmp_path: Path) -> None:
    replay = recorded(
        tmp_path,
        [["0.5"], ["1.0"], ["0.0"], ["0.1"]],
        [["0.7"], ["hm", "x", "1.0 yes"], ["0.2"], [*"abcde", "0.9"]],
    )
    judgement = mmvet.score(labelled(tmp_path), ANSWERS, replay)
    # Grades: 0.5 1.0 0.0, then 0.7 1.0 0.2. Five unreadable replies are a fault of the judge,
    # whatever the sixth would be, so v1_3 counts in neither run.
    means = {"v1_0": 0.6, "v1_1": 1.0, "v1_2": 0.1}
    assert judgement.per_question == pytest.approx(means)
    measured = values(tally(judgement.contributions), mmvet.measure)
    assert next(iter(measured)) == "total"
    assert measured == pytest.approx(
        {
            **{"total": 170 / 3, "rec": 55, "ocr": 60, "know": 100, "gen": 100, "math": 60},
            **{
                "capability_set.gen_know_rec": 100,
                "capability_set.math_ocr": 60,
                "capability_set.rec": 10,
            },
        }
    )
    # Totals of the runs are 1.5 / 3 and 1.9 / 3.
    assert judgement.extra == pytest.approx({"std": 20 / 3, "runs.0": 50, "runs.1": 190 / 3})
    assert [cluster for cluster, _ in judgement.contributions] == [
        "a.png",
        "a.png",
        "b.png",
    ]
    assert judgement.submission == ANSWERS
    assert judgement.notes == (
        "graded by the judge in 2 runs; the published numbers are grades of gpt-4-0613",
    )
    assert list(judgement.failed) == ["v1_3"]
    assert judgement.failed["v1_3"].startswith(
        "no grade can be read in 5 replies of the judge, the first being 'a': use a judge that"
    )


def test_an_unreadable_grade_is_asked_for_again_as_officially(tmp_path: Path) -> None:
    judge = Judge("I think", num_runs=2)
    with pytest.raises(ValueError, match=r"no answer has a grade: .* the first being 'I think'"):
        mmvet.score(labelled(tmp_path), ANSWERS, judge)
    assert judge.forgotten == [(name, 0) for name in RECORDS]
    # Temperature 0 for the first repetition as well, then half a degree more each. A question that
    # has no grade in one run is not asked about in the next.
    tries = [(0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0), (4, 1.5)]
    assert judge.asked == [
        (name, 0, attempt, temperature, 3) for name in RECORDS for attempt, temperature in tries
    ]
    assert judge.prompts[0].endswith("| 1.0\n\nWhat is x? | -1 <AND> -5 | x = -1 | ")
    assert (
        judge.prompts[1:5]
        == [judge.prompts[0] + "\nPredict the correctness of the answer (digit): "] * 4
    )


@pytest.mark.parametrize("reply", ["<think>\nOkay,", ""])
def test_a_judge_that_says_nothing_is_stopped_with_advice(reply: str, tmp_path: Path) -> None:
    records = {f"v1_{number}": RECORDS["v1_1"] for number in range(4, 40)}
    asked = labelled(tmp_path, **records)
    judge = Judge(reply, num_runs=None)
    with pytest.raises(
        ValueError, match=r"^20 answers in a row have no grade.*--judge-request max_tokens=4096"
    ):
        mmvet.score(asked, {question.id: "red" for question in asked}, judge)
    assert len(judge.asked) == 20 * 5


def test_grades_that_the_official_rule_does_not_read_are_counted(tmp_path: Path) -> None:
    replay = recorded(tmp_path, [["Score: 0.5"], ["1.0"], ["<think>no</think>0.0"], ["0.1"]])
    judgement = mmvet.score(labelled(tmp_path), ANSWERS, replay)
    assert judgement.per_question == {"v1_0": 0.5, "v1_1": 1.0, "v1_2": 0.0, "v1_3": 0.1}
    assert judgement.failed == {} and judgement.notes[1] == (
        "2 of 4 grades do not begin the judge's reply and were read all the same; "
        "the official program would have asked again"
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
