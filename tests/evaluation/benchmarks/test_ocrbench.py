"""OCRBench: both forms of its files, what stands in a text, and the points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmarks import ocrbench
from tests.evaluation.official import (
    BrokenLabel,
    Official,
    check_example,
    make_image,
    write_file,
    write_images,
    write_parquet,
    write_table,
)

FORMULA = "Handwritten Mathematical Expression Recognition"

# dataset, answers, type
ROWS: list[tuple[str, Any, str]] = [
    ("IIIT5K", "B", "Regular Text Recognition"),
    ("ORAND", "57", "Digit String Recognition"),
    ("STVQA", ["no", "none"], "Scene Text-centric VQA"),
    ("HME100k", "x _ { 1 }\n", FORMULA),
]
GOLD = {"0": "The word is b.", "1": "57", "2": "No", "3": "$x_{1}$"}


def records() -> list[dict[str, Any]]:
    """The ids of the official file repeat."""
    return [
        {"dataset_name": dataset, "id": 0, "image_path": f"{dataset}/1.png"}
        | {"question": f"what is in {dataset}?", "answers": answers, "type": kind}
        for dataset, answers, kind in ROWS
    ]


def write_official(folder: Path) -> None:
    write_file(folder / "OCRBench.json", records())
    for dataset, _, _ in ROWS:
        write_images(folder / "OCRBench_Images" / dataset, ["1.png"])


@pytest.mark.parametrize("annotations", ["annotations.json", "test.parquet"])
def test_the_official_scorer_says_the_same(annotations: str) -> None:
    content = check_example("ocrbench", annotations)
    assert content["metrics"]["final_score_norm"] == content["headline"] / 10


# The official results.
@pytest.mark.parametrize(
    ("text", "answers", "dataset", "is_right"),
    [
        *(
            ("The word is CENTRE.", ["centre"], "IC13_857", True),
            ("cent re", ["centre"], "", False),
        ),
        *(("I do not know", ["no"], "", True), ("2011", ["1"], "", True)),
        *(("5,743", ["5743"], "", False), ("５７４３", ["5743"], "", False)),
        *(("mcdonald’s", ["mcdonald's"], "", False), ("a\nb", ["A B"], "", True)),
        *(("a  b", ["a b"], "", False), ("anything", [""], "", True), ("", ["a"], "", False)),
        *(("b", ["a", "B"], "", True), ("x _ {1}", ["x_{1}"], "HME100k", True)),
        *(("X=y", ["x=y"], "HME100k", False), ("x\n=y", ["x = y\n"], "HME100k", True)),
        *(("$x_1=0$", ["x _ 1 = 0"], "HME100k", True), ("x\\,y", ["xy"], "HME100k", False)),
        ("x = y", ["x=y"], "STVQA", False),
    ],
)
def test_what_stands_in_a_text(text: str, answers: list[str], dataset: str, is_right: bool) -> None:
    assert ocrbench.is_right(text, answers, dataset) == is_right


def test_both_forms_of_the_files_ask_the_same(tmp_path: Path) -> None:
    write_official(tmp_path)
    rows = [
        {
            "dataset": dataset,
            "question": f"what is in {dataset}?",
            "question_type": kind,
            "answer": [answers] if isinstance(answers, str) else answers,
            "image": {"bytes": make_image(f"{dataset}/1.png"), "path": None},
        }
        for dataset, answers, kind in ROWS
    ]
    write_parquet(tmp_path / "table" / "data" / "test-00000-of-00001.parquet", rows)
    official = ocrbench.BENCHMARK.questions(tmp_path)
    table = ocrbench.BENCHMARK.questions(tmp_path / "table")
    assert [question.id for question in official] == [question.id for question in table]
    for ours, theirs in zip(official, table, strict=True):
        assert ours.text == theirs.text and ours.text.endswith(" using a single word or phrase.")
        assert {**ours.facts, "image": ""} == {**theirs.facts, "image": ""}
        assert isinstance(ours.image, Path) and ours.image.read_bytes() == theirs.image


def test_the_table_of_vlmevalkit_asks_the_same(tmp_path: Path) -> None:
    write_official(tmp_path)
    rows = [
        {
            "index": 10 + number,
            "image": make_image(f"{dataset}/1.png"),
            "question": f"what is in {dataset}?",
            "answer": repr([answers] if isinstance(answers, str) else answers),
            "category": kind,
        }
        for number, (dataset, answers, kind) in enumerate(ROWS)
    ]
    table = ocrbench.BENCHMARK.questions(write_table(tmp_path / "table" / "OCRBench.tsv", rows))
    official = ocrbench.BENCHMARK.questions(tmp_path)
    assert [question.id for question in table] == ["10", "11", "12", "13"]
    for ours, theirs in zip(official, table, strict=True):
        assert ours.text == theirs.text and ours.facts["answers"] == theirs.facts["answers"]
        assert isinstance(ours.image, Path) and ours.image.read_bytes() == theirs.image

    # Spaces do not count in a formula, and do elsewhere.
    texts = {str(10 + int(name)): text for name, text in GOLD.items()} | {"11": "5 7"}
    assert ocrbench.score(table, texts).per_question == {"10": 1, "11": 0, "12": 1, "13": 1}


def test_points_by_hand(tmp_path: Path) -> None:
    write_official(tmp_path)
    labelled = ocrbench.read_labels(tmp_path)
    judgement = ocrbench.score(labelled, GOLD | {"1": "58"})
    assert values(tally(judgement.contributions), ocrbench.measure) == {
        "final_score": 3,
        "final_score_norm": 0.3,
        "text_recognition": 1,
        "Regular Text Recognition": 1,
        "Digit String Recognition": 0,
        "Scene Text-centric VQA": 1,
        FORMULA: 1,
    }


def test_files_at_fault_are_named(tmp_path: Path) -> None:
    write_file(tmp_path / "OCRBench.json", [records()[0] | {"type": "Poetry"}])
    with pytest.raises(ValueError, match=r"record 0 \(from 0\): type 'Poetry' is none of Regular"):
        ocrbench.read_labels(tmp_path)
    write_file(tmp_path / "OCRBench.json", {"a": 1})
    with pytest.raises(ValueError, match=r"OCRBench\.json is not a list of questions"):
        ocrbench.read_labels(tmp_path)


# Official files in small, for the tests of the command line and of the evaluation.

OFFICIAL = Official(
    write=write_official,
    gold=GOLD,
    size="1,000",
    readings=(),
    broken_label=BrokenLabel(
        "OCRBench.json", '"57"', "57", ("record 1 (from 0): answers 57 should be a valid list",)
    ),
    metric="final_score",
    unit="points",
    best=4,
    image="OCRBench_Images/ORAND/1.png",
    prompts=("    <image>\n    what is in IIIT5K?\n    Answer the question using a single word",),
)
