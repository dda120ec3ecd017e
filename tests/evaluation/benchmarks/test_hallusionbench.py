"""HallusionBench: yes and no, figures and pairs, both forms of the files, and the judge."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmarks import hallusionbench
from tests.evaluation.benchmarks.test_mathvista import Judge
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

FILE = "HallusionBench.json"


def record(place: str, answer: str, visual_input: str = "1") -> dict[str, Any]:
    """A record by its id: category, subcategory, set, figure and question."""
    category, subcategory, set_id, figure, number = place.split("_")
    name = None if visual_input == "0" else f"./{category}/{subcategory}/{set_id}_{figure}.png"
    return {
        "category": category,
        "subcategory": subcategory,
        "visual_input": visual_input,
        "set_id": set_id,
        "figure_id": figure,
        "question_id": number,
        "question": f"Is {number} larger than {figure}?",
        "gt_answer": answer,
        "gt_answer_details": "It is larger." if answer == "1" else "It is not larger.",
        "filename": name,
    }


RECORDS = [
    record("VS_ocr_7_1_0", "1"),
    record("VS_ocr_7_1_1", "0"),
    record("VS_ocr_7_2_0", "0", "2"),
    record("VD_ocr_7_1_0", "1"),
    record("VS_ocr_7_0_0", "1", "0"),
]
GOLD = {"VS_ocr_7_1_0": "Yes.", "VS_ocr_7_1_1": "no", "VS_ocr_7_2_0": "No", "VD_ocr_7_1_0": "Yes"}


def write_official(folder: Path) -> None:
    write_file(folder / FILE, RECORDS)
    for name in {row["filename"] for row in RECORDS if row["filename"]}:
        path = folder / "hallusion_bench" / name
        write_images(path.parent, [path.name])


def test_the_official_scorers_say_the_same() -> None:
    content = check_example("hallusionbench", "annotations")
    assert content["notes"][-1].startswith("by rules, without a judge: 4 of 12")
    judged = check_example(
        "hallusionbench", "annotations", case="with_judge", replies="judge_replies.jsonl"
    )
    assert judged["metrics"]["unreadable"] == 0
    assert "asked about 4 of 12 answers" in judged["notes"][-1]


def test_the_prompt_to_the_judge_is_the_official_one() -> None:
    wanted = read_expected("hallusionbench")["with_judge"]["judge_prompt_sha256"]
    texts = read_texts("hallusionbench")
    asked = hallusionbench.read_labels(EXAMPLES / "hallusionbench" / "annotations")
    by_id = {question.id: question.text for question in asked}
    for name, digest in wanted.items():
        prompt = hallusionbench.matching_prompt(by_id[name], texts[name])
        assert hashlib.sha256(prompt.encode()).hexdigest() == digest


# The official results.
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *(("Yes.", "Yes"), ("YES", "Yes"), ("Yes,it is", "Yes"), ('"No"', "No"), ("(Yes)", "Yes")),
        *(("yes-ish", "Yes"), ("No. 1", "No"), ("no one is there", "No"), ("...yes", "Yes")),
        *(("There is no difference", "No"), ("Yes: it is", None), ("**Yes**", None)),
        *(("'Yes'", None), ("Yes.It is", None), ("no.1", None), ("Nope", None), ("True", None)),
        *(("Yes or no", None), ("No, yes was wrong", None), ("“Yes”", None), ("", None)),
        *(("1,000-yes", None), ("." * 33 + "yes", None), ("." * 32 + "yes", "Yes")),
    ],
)
def test_how_an_answer_is_read(text: str, answer: str | None) -> None:
    assert hallusionbench.read_answer(text) == answer


def test_figures_and_pairs_by_hand(tmp_path: Path) -> None:
    write_official(tmp_path)
    labelled = hallusionbench.read_labels(tmp_path)
    assert [question.facts["optional"] for question in labelled] == [False] * 4 + [True]
    texts = GOLD | {"VS_ocr_7_2_0": "Yes", "VS_ocr_7_0_0": "nobody asks"}
    judgement = hallusionbench.score(labelled, texts)
    assert judgement.per_question.keys() == GOLD.keys()
    found = values(tally(judgement.contributions), hallusionbench.measure)
    # Figures: VS 1, VS 2, VD 1. Pairs: VS question 0 (wrong on figure 2), VS question 1, VD.
    assert found["aAcc"] == 75 and found["unreadable"] == 0
    assert found["fAcc"] == found["qAcc"] == pytest.approx(200 / 3)
    assert found["average"] == pytest.approx((75 + 400 / 3) / 3)
    assert (found["fAcc_split.VS"], found["qAcc_split.VD_ocr"]) == (50, 100)


def test_questions_without_an_image_are_not_asked_in_either_form(tmp_path: Path) -> None:
    write_official(tmp_path)
    rows = [
        row | {"image": {"bytes": make_image(f"ocr/{Path(row['filename']).name}"), "path": None}}
        for row in RECORDS
        if row["filename"]
    ]
    write_parquet(tmp_path / "table" / "data" / "image-00000-of-00001.parquet", rows)
    official = hallusionbench.BENCHMARK.questions(tmp_path)
    table = hallusionbench.BENCHMARK.questions(tmp_path / "table")
    assert [question.id for question in official] == list(GOLD)
    for ours, theirs in zip(official, table, strict=True):
        assert (ours.id, ours.text, ours.facts) == (theirs.id, theirs.text, theirs.facts)
        assert isinstance(ours.image, Path) and ours.image.read_bytes() == theirs.image


def test_a_judge_reads_what_the_rule_cannot_and_nothing_else(tmp_path: Path) -> None:
    write_official(tmp_path)
    labelled = hallusionbench.read_labels(tmp_path)[:4]
    texts = GOLD | {"VS_ocr_7_1_0": "It is."}
    judge = Judge("Unknown", "yes")
    assert hallusionbench.score(labelled, texts, judge).per_question["VS_ocr_7_1_0"] == 1
    assert judge.asked == [("VS_ocr_7_1_0", 0), ("VS_ocr_7_1_0", 1)]
    # One that finds nothing makes the answer wrong; one that says nothing fails the question.
    judgement = hallusionbench.score(labelled, texts, Judge("Unknown"))
    assert judgement.per_question["VS_ocr_7_1_0"] == 0 and not judgement.failed
    judgement = hallusionbench.score(labelled, texts, Judge(""))
    assert list(judgement.failed) == ["VS_ocr_7_1_0"] and len(judgement.per_question) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gt_answer": "2"}, "record 1 .*gt_answer '2' should be '0' or '1'"),
        ({"question_id": "0"}, "record 1 .* has the id VS_ocr_7_1_0 of .*record 0"),
        ({"category": "VX"}, "record 1 .*category 'VX' should be 'VD' or 'VS'"),
    ],
)
def test_a_malformed_record_is_named(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_file(tmp_path / FILE, [RECORDS[0], RECORDS[1] | change])
    with pytest.raises(ValueError, match=sentence):
        hallusionbench.read_labels(tmp_path)


# Official files in small, for the tests of the command line and of the evaluation.

OFFICIAL = Official(
    write=write_official,
    gold=GOLD,
    size="951",
    readings=("parsed",),
    broken_label=BrokenLabel(
        FILE, '"gt_answer": "0"', '"gt_answer": "no"', ("gt_answer 'no' should be '0' or '1'",)
    ),
    metric="average",
    image="hallusion_bench/VS/ocr/7_2.png",
    replies=[{"question_id": name, "text": "Yes"} for name in GOLD],
    prompts=("    <image>\n    Is 0 larger than 1?<|im_end|>",),
)
