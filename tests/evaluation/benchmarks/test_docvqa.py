"""DocVQA: both forms of its files, the score, and the upload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mipha.evaluation.benchmarks import docvqa
from tests.evaluation.official import (
    EXAMPLES,
    BrokenLabel,
    Official,
    Upload,
    check_example,
    make_image,
    read_expected,
    read_texts,
    write_file,
    write_images,
    write_parquet,
    write_table,
)

SHORT = "\nAnswer the question using a single word or phrase."
ROWS = [(601, "a_1.png", ["Gresham Mills"]), (602, "a_1.png", ["12", "A"]), (603, "b_2.png", ["B"])]


def record(question_id: int, image: str, answers: list[str] | None) -> dict[str, Any]:
    labels = {"answers": answers} if answers else {}
    named = {"questionId": question_id, "question": f"What is {question_id}?"}
    return named | {"image": f"documents/{image}", "docId": 1} | labels


def write_json(path: Path, rows: list[Any]) -> Path:
    write_file(path, {"dataset_name": "SP-DocVQA", "data": [record(*row) for row in rows]})
    return path


def write_official(folder: Path) -> None:
    write_json(folder / "val_v1.0_withQT.json", ROWS)
    write_json(folder / "test_v1.0.json", [(701, "a_1.png", None), (702, "b_2.png", None)])
    write_images(folder / "spdocvqa_images", ["a_1.png", "b_2.png"])


def as_upload(texts: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"questionId": int(name), "answer": text} for name, text in texts.items()]


@pytest.mark.parametrize("annotations", ["annotations.json", "validation.parquet"])
def test_the_official_scorer_says_the_same(annotations: str) -> None:
    content = check_example("docvqa", annotations)
    assert content["submission"] == read_expected("docvqa")["submission"]


def check_upload(benchmark: Any, image_key: str, folder: Path) -> None:
    """Write the upload of an example's answers to the private split, as the server takes it."""
    example = EXAMPLES / benchmark.name
    shutil.copy(example / "test_v1.0.json", folder / "questions.json")
    asked_file = json.loads((example / "test_v1.0.json").read_text(encoding="utf-8"))
    names = {Path(row[image_key]).name for row in asked_file["data"]}
    write_images(folder / "images", names, kind="PNG")

    asked = benchmark.read(folder / "questions.json", "test")
    (content,) = benchmark.submission(asked, read_texts(benchmark.name)).values()
    wanted = json.loads((example / "submission.json").read_text(encoding="utf-8"))
    assert json.loads(content) == wanted


def test_the_upload_is_what_the_server_takes(tmp_path: Path) -> None:
    check_upload(docvqa.BENCHMARK, "image", tmp_path)


def test_both_forms_of_the_files_ask_the_same(tmp_path: Path) -> None:
    write_official(tmp_path)
    rows = [
        record(*row)
        | {
            "questionId": str(row[0]),
            "image": {"bytes": make_image(f"spdocvqa_images/{row[1]}"), "path": None},
        }
        for row in ROWS
    ]
    for number, part in enumerate((rows[:2], rows[2:])):
        name = f"validation-0000{number}-of-00002.parquet"
        write_parquet(tmp_path / "table" / "DocVQA" / name, part)
    official = docvqa.BENCHMARK.questions(tmp_path)
    table = docvqa.BENCHMARK.questions(tmp_path / "table")
    assert [question.id for question in official] == [question.id for question in table]
    assert official[0].text == "What is 601?" + SHORT
    for ours, theirs in zip(official, table, strict=True):
        assert ours.text == theirs.text and ours.facts["answers"] == theirs.facts["answers"]
        assert isinstance(ours.image, Path) and ours.image.read_bytes() == theirs.image
    assert len({question.facts["image"] for question in table}) == 2
    assert docvqa.BENCHMARK.questions(tmp_path, "test")[0].facts.keys() == {"image", "groups"}


def test_the_table_of_vlmevalkit_asks_the_same(tmp_path: Path) -> None:
    write_official(tmp_path)
    pages: dict[str, Any] = {}
    rows = []
    for number, image, answers in ROWS:  # the first question of a page has it, others its index
        shown = pages.setdefault(image, number)
        cell = shown if shown != number else make_image(f"spdocvqa_images/{image}")
        named = {"index": number, "question": f"What is {number}?", "answer": repr(answers)}
        rows.append(named | {"image": cell})
    path = write_table(tmp_path / "table" / "DocVQA_VAL.tsv", rows[::-1])

    official = docvqa.BENCHMARK.questions(tmp_path)
    table = docvqa.BENCHMARK.questions(path.parent)[::-1]
    assert [question.id for question in official] == [question.id for question in table]
    for ours, theirs in zip(official, table, strict=True):
        assert ours.text == theirs.text and ours.facts["answers"] == theirs.facts["answers"]
        assert isinstance(ours.image, Path) and ours.image.read_bytes() == theirs.image
    assert len({question.facts["image"] for question in table}) == 2
    with pytest.raises(ValueError, match="has no questionId, which the server asks for"):
        docvqa.BENCHMARK.questions(path, "test")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([ROWS[0], ROWS[0]], r"data\[1\] has the questionId 601 of .*data\[0\]: keep one"),
        ([(601, "a.png", None)], r"data\[0\] has no answers: give the validation file"),
        ([("x", "a.png", ["A"])], r"data\[0\]: questionId 'x' is no number"),
    ],
)
def test_a_malformed_record_is_named(rows: list[Any], sentence: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "val_v1.0.json", rows)
    with pytest.raises(ValueError, match=rf"val_v1\.0\.json {sentence}"):
        docvqa.BENCHMARK.read_labels(path)


# Official files in small, for the tests of the command line and of the evaluation.

OFFICIAL = Official(
    write=write_official,
    gold={"601": "gresham  mills", "602": "a", "603": "B"},
    size="5,349",
    readings=("submission",),
    broken_label=BrokenLabel(
        "val_v1.0_withQT.json",
        '"answers": ["B"]',
        '"answers": []',
        ("val_v1.0_withQT.json data[2]: answers [] should have at least 1 item",),
    ),
    metric="anls",
    image="spdocvqa_images/b_2.png",
    upload="docvqa.json",
    served={
        "test": Upload("docvqa.json", "questionId", [701, 702], "rrc.cvc.uab.es", content=as_upload)
    },
    prompts=("    <image>\n    What is 601?\n    Answer the question using a single word",),
)
