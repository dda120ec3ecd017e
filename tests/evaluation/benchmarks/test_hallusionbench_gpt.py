"""HallusionBench as its repository scores it: verdicts of a judge on all questions."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmarks import hallusionbench_gpt
from tests.evaluation.benchmarks.test_hallusionbench import FILE, record
from tests.evaluation.benchmarks.test_mathvista import Judge
from tests.evaluation.official import (
    EXAMPLES,
    BrokenLabel,
    Official,
    check_example,
    read_expected,
    read_texts,
    write_file,
    write_images,
)

RECORDS = [
    record("VS_chart_8_0_0", "1", "0"),
    record("VS_chart_8_1_0", "1"),
    record("VS_chart_8_2_0", "0", "2"),
    record("VD_math_9_1_0", "1"),
]
IDS = ["VS_chart_8_0_0", "VS_chart_8_1_0", "VS_chart_8_2_0", "VD_math_9_1_0"]
REPLIES = [
    {"question_id": IDS[0], "text": "unclear"},
    {"question_id": IDS[1], "text": "“correct”"},
    {"question_id": IDS[2], "text": "Incorrect."},
    {"question_id": IDS[3], "text": "correct"},
]


def write_official(folder: Path) -> None:
    write_file(folder / FILE, RECORDS)
    write_images(folder / "hallusion_bench" / "VS" / "chart", ["8_1.png", "8_2.png"])
    write_images(folder / "hallusion_bench" / "VD" / "math", ["9_1.png"])


def test_the_official_script_says_the_same() -> None:
    content = check_example(
        "hallusionbench_gpt",
        "annotations",
        example="hallusionbench",
        case="official_with_judge",
        replies="official_judge_replies.jsonl",
        # Causes of errors, which feed no accuracy, and another form of the split.
        without=("figure_", "errors_", "by_category"),
    )
    by_category = read_expected("hallusionbench")["official_with_judge"]["metrics"]["by_category"]
    assert content["metrics"]["aAcc_split"] == {
        name: numbers["aAcc"] for name, numbers in by_category.items()
    }


def test_the_prompt_to_the_judge_is_the_official_one() -> None:
    wanted = read_expected("hallusionbench")["official_with_judge"]["judge_prompt_sha256"]["check"]
    texts = read_texts("hallusionbench")
    asked = hallusionbench_gpt.read_labels(EXAMPLES / "hallusionbench" / "annotations")
    assert {question.id for question in asked} == wanted.keys()
    for question in asked:
        prompt = hallusionbench_gpt.grading_prompt(
            question.text, question.facts["reference"], texts[question.id]
        )
        assert hashlib.sha256(prompt.encode()).hexdigest() == wanted[question.id]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("CORRECT", "1"), ("not correct", "1"), ("correct or incorrect?", "0"), ("unclear", "2")],
)
def test_verdicts(reply: str, verdict: str) -> None:
    assert hallusionbench_gpt.read_verdict(reply) == verdict


def test_unclear_is_right_where_the_figure_was_left_out(tmp_path: Path) -> None:
    write_official(tmp_path)
    asked = hallusionbench_gpt.BENCHMARK.questions(tmp_path)
    assert [len(question.images) for question in asked] == [0, 1, 1, 1]
    judgement = hallusionbench_gpt.score(asked, dict.fromkeys(IDS, "hm"), Judge("unclear"))
    assert judgement.per_question == {IDS[0]: 1, IDS[1]: 0, IDS[2]: 0, IDS[3]: 0}
    found = values(tally(judgement.contributions), hallusionbench_gpt.measure)
    assert found["aAcc"] == 25 and found["fAcc"] == found["qAcc"] == 0
    # A wrong answer to a question whose answer is no says yes.
    assert found["yes_bias_difference"] == 2 / 4 - 3 / 4
    assert found["false_positive_ratio"] == pytest.approx(1 / 3)


def test_an_empty_reply_is_no_verdict(tmp_path: Path) -> None:
    write_official(tmp_path)
    asked = hallusionbench_gpt.read_labels(tmp_path)
    texts = dict.fromkeys(IDS, "hm")
    judge = Judge("", "correct")
    assert hallusionbench_gpt.score(asked, texts, judge).per_question == dict.fromkeys(IDS, 1)
    with pytest.raises(ValueError, match="no answer has a verdict: no verdict can be read in 5"):
        hallusionbench_gpt.score(asked, texts, Judge(""))
    with pytest.raises(ValueError, match="hallusionbench_gpt is graded by a judge"):
        hallusionbench_gpt.score(asked, texts)


# Official files in small, for the tests of the command line and of the evaluation.

OFFICIAL = Official(
    write=write_official,
    gold=dict.fromkeys(IDS, "It is larger."),
    size="1,129",
    readings=("parsed",),
    broken_label=BrokenLabel(
        FILE, '"gt_answer": "0"', '"gt_answer": "no"', ("gt_answer 'no' should be '0' or '1'",)
    ),
    metric="qAcc",
    best=50,
    image="hallusion_bench/VS/chart/8_2.png",
    replies=REPLIES,
    num_bare=1,
)
