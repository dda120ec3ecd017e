"""RefCOCO: rows become expressions, boxes are read in the form of the model, errors are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mipha.cli import app
from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmark import load_benchmark
from mipha.evaluation.benchmarks import refcoco
from mipha.evaluation.evaluate import box_form, plan_benchmarks
from tests.evaluation.official import BrokenLabel, Official, make_image, write_parquet

FILE = "data/val-00000-of-00001.parquet"


def record(bbox: list[float], *expressions: str, image: str = "a", **changes: Any) -> dict:
    """Return a row about an image of 8 x 6 pixels."""
    named = {"bbox": bbox, "answer": list(expressions), "question_id": "1"}
    return named | {"image": {"bytes": make_image(image), "path": None}} | changes


RECORDS = [
    record([2.0, 3.0, 4.0, 3.0], "the left cat", "a cat"),
    record([0.0, 0.0, 8.0, 3.0], "the sky", image="b"),
]


def test_an_expression_is_a_question(tmp_path: Path) -> None:
    write_parquet(tmp_path / FILE, RECORDS)
    asked = refcoco.BENCHMARK.questions(tmp_path)
    assert [(one.id, one.text.removeprefix(refcoco.PROMPT)) for one in asked] == [
        ("0/0", "the left cat"),
        ("0/1", "a cat"),
        ("1/0", "the sky"),
    ]
    assert asked[0].facts["boxes"][0].numbers == (0.25, 0.5, 0.75, 1.0)
    assert asked[0].image is asked[1].image and asked[2].image == make_image("b")
    labelled = refcoco.BENCHMARK.read_labels(tmp_path)
    assert [one.facts for one in labelled] == [one.facts for one in asked]
    assert {one.image for one in labelled} == {None}


def test_an_iou_of_one_half_is_right(tmp_path: Path) -> None:
    write_parquet(tmp_path / FILE, RECORDS)
    asked = refcoco.BENCHMARK.questions(tmp_path)
    said = {"0/0": "[250, 500, 750, 750]", "0/1": "[250, 500, 750, 740]", "1/0": "the sky"}
    found = refcoco.BENCHMARK.score(asked, said, None)
    assert found.per_question == {"0/0": 1, "0/1": 0, "1/0": 0}
    numbers = values(tally(found.contributions), refcoco.BENCHMARK.measure)
    assert numbers == pytest.approx({"accuracy": 100 / 3, "mean_iou": 98 / 3})
    assert found.parsed == {
        "0/0": "0.250, 0.500, 0.750, 0.750",
        "0/1": "0.250, 0.500, 0.750, 0.740",
        "1/0": None,
    }
    assert found.notes == ("1 of 3 answers hold no box in the form thousand, and count as wrong",)


@pytest.mark.parametrize("name", ["refcoco", "refcoco_plus", "refcocog"])
def test_the_form_is_that_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / FILE, RECORDS)
    (tmp_path / "processor_config.json").write_text(json.dumps({"boxes": "loc"}))
    form = box_form(tmp_path)
    (plan,) = plan_benchmarks([name], tmp_path, form=form)
    assert plan.name == name and "as loc" in plan.benchmark.protocol
    said = dict.fromkeys(("0/0", "0/1", "1/0"), "<loc0512><loc0256><loc1023><loc0768>")
    assert plan.benchmark.score(plan.questions, said, None).per_question["0/0"] == 1
    assert load_benchmark(name).score(plan.questions, said, None).per_question["0/0"] == 0


def test_the_checkpoint_decides_and_other_models_may_say(tmp_path: Path) -> None:
    assert box_form(None) == box_form(tmp_path) == "thousand"
    assert box_form(None, "bbox_2d") == box_form(tmp_path, "bbox_2d") == "bbox_2d"
    (tmp_path / "processor_config.json").write_text(json.dumps({"boxes": "unit3"}))
    assert box_form(tmp_path) == box_form(tmp_path, "unit3") == "unit3"
    with pytest.raises(ValueError, match="was trained to write boxes as unit3, and not as loc"):
        box_form(tmp_path, "loc")
    with pytest.raises(ValueError, match="no form of boxes 'unit': did you mean unit3"):
        box_form(None, "unit")


def test_predictions_of_other_programs_name_their_form(tmp_path: Path) -> None:
    write_parquet(tmp_path / FILE, RECORDS)
    said = {"0/0": "[0.25, 0.5, 0.75, 1]", "0/1": "[0.25, 0.5, 0.75, 1]", "1/0": "[0, 0, 1, 0.5]"}
    lines = [json.dumps({"question_id": name, "text": text}) + "\n" for name, text in said.items()]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    found = {}
    for form in ("unit3", "thousand"):
        arguments = ["score", "refcoco", "--annotations", tmp_path, "--boxes", form]
        more = ["--predictions", tmp_path / "p.jsonl", "--json", tmp_path / f"{form}.json"]
        done = CliRunner().invoke(app, [str(one) for one in (*arguments, *more)])
        assert done.exit_code == 0, done.stderr
        found[form] = json.loads((tmp_path / f"{form}.json").read_text())["headline"]
    assert found == {"unit3": 100, "thousand": 0}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bbox": [2.0, 3.0, 40.0, 3.0]}, r"row 1: the region .* reaches outside"),
        ({"bbox": [2.0, 3.0, 0.0, 3.0]}, r"row 1: the box .* has no area"),
        ({"bbox": [2.0, 3.0]}, r"row 1: bbox .* should have at least 4"),
        ({"answer": []}, r"row 1: answer .* should have at least 1"),
        ({"image": {"bytes": None, "path": "a.jpg"}}, r"row 1 has no image"),
    ],
)
def test_a_malformed_row_is_named(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / FILE, [RECORDS[0], RECORDS[1] | change])
    with pytest.raises(ValueError, match=rf"parquet,? {sentence}"):
        refcoco.BENCHMARK.questions(tmp_path)


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    write_parquet(folder / FILE, RECORDS)


def official(size: str) -> Official:
    return Official(
        write=write_official,
        gold={
            "0/0": "[250, 500, 750, 1000]",
            "0/1": "It is at [250, 500, 750, 1000].",
            "1/0": "[0, 0, 1000, 500]",
        },
        size=size,
        readings=("parsed",),
        broken_label=BrokenLabel(FILE, "\x08@", "\x08A", ("row 0", "reaches outside")),
        without_file="val-*.parquet",
        prompts=(f"    <image>\n    {refcoco.PROMPT}the left cat",),
    )


OFFICIAL = official("10,834")
