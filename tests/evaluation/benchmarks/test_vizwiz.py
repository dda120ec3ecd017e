"""VizWiz on official-format files: normalisation, LLaVA's capitals, the upload, wrong files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import tally
from mipha.evaluation.benchmarks import vizwiz
from tests.evaluation.official import BrokenLabel, Official, Upload, write_file, write_images

HINT = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)


def _record(
    number: int, answers: Sequence[str], answer_type: str = "other", question: str = "What is this?"
) -> dict[str, Any]:
    return {
        "image": f"VizWiz_val_{number:08d}.jpg",
        "question": question,
        "answers": [{"answer": answer, "answer_confidence": "maybe"} for answer in answers],
        "answer_type": answer_type,
        "answerable": int(answer_type != "unanswerable"),
    }


def _write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize(
    ("answers", "text", "api", "both_sides", "verbatim"),
    [
        (["coke"] * 10, "Coke.", 1, 1, 1),
        # A human answer that normalising would change is out of the API's reach.
        (["t-shirt"] * 4 + ["shirt"] * 6, "t-shirt", 0, 1, 0),
        (["the dog"] * 10, "the dog", 0, 1, 0),
        (["dr. pepper"] * 10, "Dr. Pepper", 0, 1, 0),
        (["Coke"] * 10, "Coke", 0, 1, 0),
        (["two"] * 10, "two", 0, 1, 0),
        # m4c goes first: it cuts off 's, and completes contractions before the curly table can.
        (["campbell's"] * 10, "campbell's", 0, 1, 1),
        (["campbell 's"] * 10, "campbell's", 1, 1, 0),
        (["don't know"] * 10, "dont know", 1, 1, 0),
        (["don’t know"] * 10, "dont know", 0, 0, 1),
        (["redblue"] * 10, "red,blue", 1, 1, 0),
        (["red blue"] * 10, "red,blue", 0, 0, 1),
        # An answer like any other; confidence does not count.
        (
            ["unanswerable"] * 3 + ["unsuitable", "unsuitable image"] + ["dog"] * 5,
            "Unanswerable",
            0.9,
            0.9,
            0.9,
        ),
        (["unsuitable"] * 2 + ["unsuitable image"] * 8, "unsuitable", 0.6, 0.6, 0.6),
        (["cat"] + ["dog"] * 9, "cat", 0.3, 0.3, 0.3),
    ],
)
def test_the_three_numbers(
    answers: list[str], text: str, api: float, both_sides: float, verbatim: float, tmp_path: Path
) -> None:
    questions = vizwiz.read_labels(_write(tmp_path / "val.json", [_record(0, answers)]))
    judgement = vizwiz.score(questions, {"VizWiz_val_00000000.jpg": text})
    ((cluster, amounts),) = judgement.contributions
    assert cluster == "VizWiz_val_00000000.jpg"
    assert judgement.per_question == pytest.approx({cluster: api})
    expected = {
        "vizwiz_api": api,
        "perAnswerType.other": api,
        "m4c_both_sides": both_sides,
        "vizwiz_api_verbatim": verbatim,
    }
    assert amounts == pytest.approx(expected)


def test_judgement_and_metrics(tmp_path: Path) -> None:
    records = [
        _record(0, ["can"] * 10),
        _record(1, ["unanswerable"] * 10, "unanswerable"),
        _record(2, ["5"] * 3 + ["6"] * 7, "number"),
    ]
    questions = vizwiz.read_labels(_write(tmp_path / "val.json", records))
    first, second, third = (question.id for question in questions)
    judgement = vizwiz.score(questions, {first: "A can", second: "I don't know", third: "five"})
    assert judgement.submission == {first: "can", second: "i don't know", third: "5"}
    metrics = vizwiz.measure(tally(judgement.contributions).totals())
    assert next(iter(metrics)) == "vizwiz_api"
    expected = {"vizwiz_api": 190 / 3, "m4c_both_sides": 190 / 3, "vizwiz_api_verbatim": 190 / 3}
    expected |= {
        "perAnswerType.other": 100,
        "perAnswerType.unanswerable": 0,
        "perAnswerType.number": 90,
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected)


def test_both_passes_show_in_what_was_compared(tmp_path: Path) -> None:
    questions = vizwiz.read_labels(_write(tmp_path / "val.json", [_record(0, ["x"] * 10)]))
    # 40 periods: m4c takes 32, the API the remaining 8.
    judgement = vizwiz.score(questions, {questions[0].id: "x" + 40 * "."})
    assert list(judgement.submission.values()) == ["x" + 8 * "."]
    assert list(judgement.normalised.values()) == ["x"]


def _images(root: Path, split: str, count: int) -> None:
    (root / split).mkdir(exist_ok=True)
    for number in range(count):
        (root / split / f"VizWiz_{split}_{number:08d}.jpg").touch()


def test_questions_are_asked_as_in_llavas_file(tmp_path: Path) -> None:
    records = [
        _record(0, ["x"] * 10, question="what is this? And is it a TV? "),
        _record(1, ["x"] * 9),
    ]
    (tmp_path / "Annotations").mkdir()
    _write(tmp_path / "Annotations" / "val.json", records)
    _images(tmp_path, "val", 2)
    first, second = vizwiz.BENCHMARK.questions(tmp_path, "val")
    assert first.text == "What is this? and is it a tv? " + HINT
    assert (first.id, first.image) == (
        "VizWiz_val_00000000.jpg",
        tmp_path / "val" / "VizWiz_val_00000000.jpg",
    )
    assert vizwiz.BENCHMARK.submission([first], {}) == {}
    assert vizwiz.BENCHMARK.doubts([first], "val") == []
    assert vizwiz.BENCHMARK.doubts([first, second], "val") == [
        "1 questions do not have ten human answers: get the official annotation file"
    ]
    assert (
        "2 images are not of split test, such as VizWiz_val_00000000.jpg"
        in vizwiz.BENCHMARK.doubts([first, second], "test")[0]
    )
    (tmp_path / "val" / "VizWiz_val_00000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"VizWiz_val_00000001\.jpg"):
        vizwiz.BENCHMARK.questions(tmp_path, "val")


@pytest.mark.parametrize("name", ["test.json", "llava_test.jsonl"])
def test_the_upload_of_test(name: str, tmp_path: Path) -> None:
    _images(tmp_path, "test", 2)
    images = [f"VizWiz_test_{number:08d}.jpg" for number in range(2)]
    if name == "test.json":
        _write(tmp_path / name, [{"image": image, "question": "what is this?"} for image in images])
    else:
        lines = [
            {
                "question_id": n,
                "image": image,
                "text": "What is this?" + HINT,
                "category": "default",
            }
            for n, image in enumerate(images)
        ]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions = vizwiz.BENCHMARK.questions(tmp_path, "test")
    assert [(question.id, question.text) for question in questions] == [
        (image, "What is this?" + HINT) for image in images
    ]
    (content,) = vizwiz.BENCHMARK.submission(
        questions, {images[1]: "The T-shirt", images[0]: ""}
    ).values()
    assert json.loads(content) == [
        {"image": images[0], "answer": ""},
        {"image": images[1], "answer": "t shirt"},
    ]
    assert vizwiz.BENCHMARK.doubts(questions, "test") == []


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ({"image": "x"}, "is not a list of questions"),
        (
            [_record(0, ["x"]), _record(0, ["x"])],
            r"\[1\] has the image VizWiz_val_00000000\.jpg of .*\[0\]: keep one",
        ),
        ([{"question": "x"}], r"\[0\] has no 'image'"),
        ([_record(0, ["x"]) | {"image": 7}], r"\[0\]: image 7 should be a valid string"),
        ([_record(0, ["x"]) | {"answers": [{}]}], r"\[0\]: its answers are not a list"),
        (
            [{"image": "x", "question": "y", "answers": [{"answer": "z"}]}],
            r"\[0\] has no 'answer_type'",
        ),
    ],
)
def test_a_malformed_file_is_named(records: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"val\.json.*{sentence}"):
        vizwiz.read_labels(_write(tmp_path / "val.json", records))


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no packaged copy"):
        vizwiz.BENCHMARK.questions(None, "val")
    with pytest.raises(ValueError, match="no split 'train': choose val or test"):
        vizwiz.BENCHMARK.questions(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"val\.json"):
        vizwiz.read_labels(tmp_path)
    (tmp_path / "llava_test.jsonl").write_text(
        json.dumps({"question_id": 0, "image": "a.jpg", "text": "What is this?"})
    )
    with pytest.raises(ValueError, match=r"llava_test\.jsonl line 1: its text does not end with"):
        vizwiz.BENCHMARK.questions(tmp_path, "test")


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    answers = [
        ["unanswerable"] * 7 + ["no"] * 3,
        ["no"] * 10,
        ["2"] * 4 + ["yes"] * 6,
        ["yes"] * 10,
    ]
    kinds = ("unanswerable", "yes/no", "number", "yes/no")
    val = [
        {
            **{
                "image": f"VizWiz_val_{number:08d}.jpg",
                "question": f"Is this can number {number}? What is it?",
                "answer_type": kind,
            },
            **{
                "answers": [{"answer": text, "answer_confidence": "yes"} for text in texts],
                "answerable": int(number > 0),
            },
        }
        for number, (kind, texts) in enumerate(zip(kinds, answers, strict=True))
    ]
    test = [
        {"image": f"VizWiz_test_{number:08d}.jpg", "question": f"Is this number {number}?"}
        for number in range(5)
    ]
    for split, records in (("val", val), ("test", test)):
        write_file(folder / f"{split}.json", records)
        write_images(folder / split, [record["image"] for record in records])


OFFICIAL = Official(
    write=write_official,
    gold={
        **{"VizWiz_val_00000000.jpg": "unanswerable", "VizWiz_val_00000001.jpg": "No."},
        **{"VizWiz_val_00000002.jpg": "2", "VizWiz_val_00000003.jpg": "yes"},
    },
    size="4,319",
    readings=("normalised", "submission"),
    broken_label=BrokenLabel(
        "val.json", '"answers"', '"captions"', ("val.json [0] has no 'answers'",)
    ),
    metric="vizwiz_api",
    image="val/VizWiz_val_00000002.jpg",
    served={
        "test": Upload(
            "vizwiz_test.json",
            "image",
            [f"VizWiz_test_{number:08d}.jpg" for number in range(5)],
            "EvalAI challenge 2185",
        )
    },
)
