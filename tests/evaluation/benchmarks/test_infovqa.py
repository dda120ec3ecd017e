"""InfographicVQA: what it shares with DocVQA, and the mean scores by kind of question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mipha.evaluation.benchmarks import infovqa
from tests.evaluation.benchmarks.test_docvqa import as_upload, check_upload
from tests.evaluation.official import (
    BrokenLabel,
    Official,
    Upload,
    check_example,
    read_expected,
    write_file,
    write_images,
)

FILE = "infographicsVQA_val_v1.0_withQT.json"
TEST_FILE = "infographicsVQA_test_v1.0.json"


def record(question_id: int, answers: list[str], **labels: Any) -> dict[str, Any]:
    named = {"questionId": question_id, "question": f"What is {question_id}?", "answers": answers}
    return named | {"image_local_name": f"{question_id // 2}.png"} | labels


RECORDS = [
    record(70, ["red, blue"], answer_type=["multiple spans"], evidence=["textual", "map"]),
    record(71, ["3"], answer_type=["non span"], **{"operation/reasoning": ["counting"]}),
    record(72, ["B"], evidence=["photo/pciture/visual_objects"], **{"operation/reasoning": None}),
]


def write_official(folder: Path) -> None:
    write_file(folder / FILE, {"data": RECORDS})
    asked = [
        {key: value for key, value in record(number, []).items() if key != "answers"}
        for number in (80, 81)
    ]
    write_file(folder / TEST_FILE, {"data": asked})
    write_images(folder / "images", ["35.png", "36.png", "40.png"])


@pytest.mark.parametrize(
    ("annotations", "without"),
    [("annotations.json", ()), ("validation.parquet", ("evidence",))],
)
def test_the_official_scorer_says_the_same(annotations: str, without: tuple[str, ...]) -> None:
    content = check_example("infovqa", annotations, without=without)
    assert content["submission"] == read_expected("infovqa")["submission"]
    assert ("evidence" in content["metrics"]) != bool(without)


def test_the_upload_is_what_the_server_takes(tmp_path: Path) -> None:
    check_upload(infovqa.BENCHMARK, "image_local_name", tmp_path)


def test_an_unknown_label_is_named(tmp_path: Path) -> None:
    write_file(tmp_path / FILE, {"data": [RECORDS[0] | {"evidence": ["photo"]}]})
    with pytest.raises(ValueError, match=r"data\[0\]: evidence 'photo' is none of 'table/list'"):
        infovqa.BENCHMARK.read_labels(tmp_path)


# Official files in small, for the tests of the command line and of the evaluation.

OFFICIAL = Official(
    write=write_official,
    gold={"70": "Red,  blue", "71": "3", "72": "b"},
    size="2,801",
    readings=("submission",),
    broken_label=BrokenLabel(
        FILE, '["non span"]', '["no span"]', (f"{FILE} data[1]: answer_type 'no span' is none of",)
    ),
    metric="anls",
    image="images/36.png",
    upload="infovqa.json",
    served={
        "test": Upload("infovqa.json", "questionId", [80, 81], "rrc.cvc.uab.es", content=as_upload)
    },
    prompts=("    <image>\n    What is 70?\n    Answer the question using a single word",),
)
