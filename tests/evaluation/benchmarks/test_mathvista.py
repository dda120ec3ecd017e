"""MathVista: both forms of its files, what is extracted by rules, by a judge, and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mipha.evaluation.benchmark import Question, Reply
from mipha.evaluation.benchmarks import mathvista
from tests.evaluation.official import (
    EXAMPLES,
    BrokenLabel,
    Official,
    check_example,
    make_image,
    read_expected,
    read_texts,
    write_file,
    write_images,
    write_parquet,
)

METADATA = {
    "split": "testmini",
    "language": "english",
    "source": "IQTest",
    "category": "general-vqa",
    "task": "visual question answering",
    "context": "table",
    "grade": "college",
    "skills": ["arithmetic reasoning"],
}
HINT = "Hint: Please answer the question"


def record(pid: str, answer: str, kind: str = "integer", **changes: Any) -> dict[str, Any]:
    named = {
        "question": f"How many at {pid}?",
        "image": f"images/{pid}.png",
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": answer,
        "question_type": "free_form",
        "answer_type": kind,
        "pid": pid,
        "metadata": METADATA,
    }
    return named | changes


def multiple(pid: str, answer: str, choices: list[str]) -> dict[str, Any]:
    return record(pid, answer, "text", choices=choices, question_type="multi_choice")


RECORDS = [
    multiple("501", "red", ["red", "blue"]),
    record("502", "14", unit="cm"),
    record("503", "1.2", "float", precision=1),
    record("504", "[1, 2]", "list"),
]
GOLD = {"501": "red", "502": "14", "503": "1.24", "504": "The list is [1, 2]."}
REPLIES = [
    {"question_id": "501", "text": "B"},
    {"question_id": "502", "text": "14"},
    {"question_id": "503", "text": "none"},
    {"question_id": "504", "text": "[1, 2]"},
]


def write_official(folder: Path) -> None:
    write_file(folder / "testmini.json", {row["pid"]: row for row in RECORDS})
    write_images(folder / "images", [f"{row['pid']}.png" for row in RECORDS])


def question(answer: str, kind: str = "integer", **changes: Any) -> Question:
    facts = {"answer": answer, "choices": (), "answer_type": kind, "precision": None}
    return Question("1", "Hint", None, facts | {"groups": (), "image": "1"} | changes)


def choose(*choices: str) -> Question:
    return question(choices[0], "text", choices=choices)


class Judge:
    """A judge that says the same to everything, and counts how often it was asked."""

    num_runs = None
    notes = ()

    def __init__(self, *replies: str) -> None:
        self.replies = replies
        self.asked: list[tuple[str, int]] = []
        self.forgotten: list[str] = []

    def ask(self, question_id: str, prompt: str, *, attempt: int = 0, **_: Any) -> Reply:
        self.asked.append((question_id, attempt))
        return Reply(self.replies[min(attempt, len(self.replies) - 1)])

    def forget(self, question_id: str, run: int = 0) -> None:
        self.forgotten.append(question_id)


def test_the_official_program_with_its_judge_says_the_same() -> None:
    content = check_example("mathvista", "annotations", replies="judge_replies.jsonl")
    expected = read_expected("mathvista")
    assert content["submission"] == expected["extraction"]
    for name in ("without_judge", "response_as_extraction"):
        assert content["metrics"][name] == pytest.approx(expected[name]["metrics"]["overall"])


def test_without_a_judge_the_texts_are_compared() -> None:
    content = check_example(
        "mathvista", "annotations", case="response_as_extraction", without=("overall",)
    )
    assert content["metric"] == "response_as_extraction" and "overall" not in content["metrics"]
    assert "7 of 11 would need one" in content["notes"][-1]


def test_prompts_and_queries_are_the_official_ones() -> None:
    folder = EXAMPLES / "mathvista" / "annotations"
    texts, wanted = read_texts("mathvista"), read_expected("mathvista")["judge_prompt_sha256"]
    asked = {question.id: question for question in mathvista.read_labels(folder)}
    queries = json.loads((folder / "query.json").read_text(encoding="utf-8"))
    assert {name: asked[name].text for name in queries} == queries
    for name, digest in wanted.items():
        prompt = mathvista.extraction_prompt(asked[name].text, texts[name])
        assert hashlib.sha256(prompt.encode()).hexdigest() == digest


def test_queries_are_made_where_the_file_has_none(tmp_path: Path) -> None:
    folder = EXAMPLES / "mathvista" / "annotations"
    (tmp_path / "testmini.json").write_bytes((folder / "testmini.json").read_bytes())
    made = [question.text for question in mathvista.read_labels(tmp_path)]
    assert made == [question.text for question in mathvista.read_labels(folder)]


# The official results.
@pytest.mark.parametrize(
    ("text", "asked", "extraction"),
    [
        *(("", question("1"), ""), (" ", question("1"), None), ("red", choose("red", "a"), "red")),
        *(("A", choose("red", "a"), None), (" 14 ", question("1"), "14")),
        *(
            ("014", question("1"), "14"),
            ("1_4", question("1"), "14"),
            ("14.0", question("1"), None),
        ),
        *(("1e1", question("1", "float"), "10.0"), ("nan", question("1", "float"), "nan")),
        ("[1]", question("[1]", "list"), None),
    ],
)
def test_what_rules_extract(text: str, asked: Question, extraction: str | None) -> None:
    assert mathvista.extract_by_rule(text, asked) == extraction


# The official results.
@pytest.mark.parametrize(
    ("text", "asked", "compared"),
    [
        *((" B ", choose("red", "blue"), "blue"), ("f(x) (b)", choose("red", "blue"), "red")),
        *(("(b)", choose("red", "blue"), "blue"), ("A", choose("B", "A"), "B")),
        *(("", choose("blue", "red"), "red"), ("C", choose("red", "Cat"), "Cat")),
        *(("none", choose("no", "one"), "one"), ("14.9", question("1"), "14")),
        *(("-0.5", question("1"), "0"), ("1e3", question("1"), "1000")),
        *(("14 apples", question("1"), None), ("1,000", question("1"), None)),
        *(("inf", question("1"), None), ("nan", question("1"), None)),
        ("1.25", question("1", "float", precision=1), "1.2"),
        ("1.15", question("1", "float", precision=1), "1.1"),
        ("inf", question("1", "float", precision=1), "inf"),
        ("$1.2", question("1", "float", precision=1), None),
        ("[2007,2008]", question("[2007, 2008]", "list"), "[2007,2008]"),
    ],
)
def test_how_an_answer_is_compared(text: str, asked: Question, compared: str | None) -> None:
    assert mathvista.normalise(text, asked) == compared


def test_an_empty_reply_is_asked_for_again_and_one_of_spaces_is_empty() -> None:
    asked = [question("14")]
    judge = Judge("", "<think>so</think>14")
    assert mathvista.score(asked, {"1": "fourteen"}, judge).per_question == {"1": 1}
    assert judge.asked == [("1", 0), ("1", 1)]
    judgement = mathvista.score(asked, {"1": "fourteen"}, Judge(" "))
    assert judgement.submission == {"1": ""} and judgement.per_question == {"1": 0}
    # Short answers need no judge.
    judge = Judge("15")
    assert mathvista.score(asked, {"1": "14"}, judge).per_question == {"1": 1} and not judge.asked


def test_a_judge_that_says_nothing_fails_the_question_or_all() -> None:
    asked = [question("14"), Question("2", "Hint", None, question("7").facts)]
    judge = Judge("")
    judgement = mathvista.score(asked, {"1": "fourteen", "2": "7"}, judge)
    assert judgement.per_question == {"2": 1} and list(judgement.failed) == ["1"]
    assert judge.forgotten == ["1"] and len(judge.asked) == 5
    with pytest.raises(ValueError, match="no answer was extracted: no answer can be read in 5"):
        mathvista.score(asked, {"1": "fourteen", "2": "seven"}, Judge(""))


def test_both_forms_of_the_files_ask_the_same(tmp_path: Path) -> None:
    write_official(tmp_path)
    rows = [
        row
        | {"precision": None if row["precision"] is None else float(row["precision"])}
        | {"decoded_image": {"bytes": make_image(row["image"]), "path": None}, "query": None}
        for row in RECORDS
    ]
    write_parquet(tmp_path / "table" / "data" / "testmini-00000-of-00001.parquet", rows)
    official = mathvista.BENCHMARK.questions(tmp_path)
    table = mathvista.BENCHMARK.questions(tmp_path / "table")
    assert official[1].text == (
        f"{HINT} requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the "
        "end.\nQuestion: How many at 502? (Unit: cm)"
    )
    for ours, theirs in zip(official, table, strict=True):
        assert (ours.id, ours.text) == (theirs.id, theirs.text)
        assert {**ours.facts, "image": ""} == {**theirs.facts, "image": ""}
        assert isinstance(ours.image, Path) and ours.image.read_bytes() == theirs.image


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (multiple("1", "green", ["red"]), r"answer 'green' should be one of \['red'\]"),
        (record("1", "2", question_type="multi_choice"), "does not go with 0 choices"),
        (record("1", "2", "float"), "precision None should be 1 or 2"),
        (record("1", "2", "number"), "answer_type 'number' should be 'text'"),
    ],
)
def test_a_malformed_question_is_named(
    row: Mapping[str, Any], sentence: str, tmp_path: Path
) -> None:
    write_file(tmp_path / "testmini.json", {"1": row})
    with pytest.raises(ValueError, match=rf"testmini\.json, question 1: .*{sentence}"):
        mathvista.read_labels(tmp_path)


# Official files in small, for the tests of the command line and of the evaluation.

OFFICIAL = Official(
    write=write_official,
    gold={"501": "red", "502": "14", "503": "1.24", "504": "[1, 2]"},
    size="1,000",
    readings=("parsed", "submission"),
    broken_label=BrokenLabel(
        "testmini.json",
        '"answer": "red"',
        '"answer": "green"',
        ("testmini.json, question 501: answer 'green' should be one of ['red', 'blue']",),
    ),
    metric="overall",
    image="images/502.png",
    replies=REPLIES,
    prompts=(f"    <image>\n    {HINT} and provide the correct option letter",),
)
