"""TextVQA on official-format files: m4c on both sides, either OCR file, files that are wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import tally
from mipha.evaluation.answers import SHORT
from mipha.evaluation.benchmarks import textvqa
from tests.evaluation.official import BrokenLabel, Official, write_file, write_images


def _record(
    question_id: int, answers: Sequence[str], image_id: str = "003a", question: str = "what is it?"
) -> dict[str, Any]:
    return {
        "question": question,
        "image_id": image_id,
        "image_classes": ["Camera"],
        "answers": list(answers),
        "question_tokens": question.split(),
        "question_id": question_id,
        "set_name": "val",
    }


def _write(root: Path, *records: Any, version: str = "0.5.1") -> Path:
    path = root / "TextVQA_0.5.1_val.json"
    path.write_text(
        json.dumps(
            {
                "dataset_type": "val",
                "dataset_name": "textvqa",
                "dataset_version": version,
                "data": records,
            }
        )
    )
    return path


@pytest.mark.parametrize(
    ("answers", "text", "accuracy", "normalised"),
    [
        (["dakota"] * 4 + ["x"] * 6, "Dakota.", 1, "dakota"),
        # Unlike the VQA scorer's, both sides are normalised even if all ten are equal.
        (["Yes"] * 10, "yes", 1, "yes"),
        (["1/2"] * 10, "1-2", 1, "1 2"),
        (["mcdonald's"] * 10, "McDonald 's", 1, "mcdonald 's"),
        (["two", "2", "Two,"] + ["x"] * 7, "2", 0.9, "2"),
        (["the sign"] * 2 + ["x"] * 8, "a sign", 0.6, "sign"),
        (["none"] + ["x"] * 9, "0", 0.3, "0"),
        (["x"] * 10, "", 0, ""),
        (["an"] * 10, "", 1, ""),
    ],
)
def test_accuracy_of_one_question(
    answers: list[str], text: str, accuracy: float, normalised: str, tmp_path: Path
) -> None:
    judgement = textvqa.score(
        textvqa.read_labels(_write(tmp_path, _record(34602, answers))), {"34602": text}
    )
    assert judgement.per_question == pytest.approx({"34602": accuracy})
    assert judgement.normalised == {"34602": normalised}


def test_mean_over_questions_with_images_as_clusters(tmp_path: Path) -> None:
    records = [
        _record(1, ["a b"] * 10),
        _record(2, ["no"] * 10, question="is it?"),
        _record(3, ["5"] * 3 + ["6"] * 7, image_id="b9dc"),
    ]
    questions = textvqa.read_labels(_write(tmp_path, *records).parent)
    judgement = textvqa.score(questions, {"1": "b", "2": "yes", "3": "five"})
    assert [cluster for cluster, _ in judgement.contributions] == ["003a", "003a", "b9dc"]
    metrics = textvqa.measure(tally(judgement.contributions).totals())
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"accuracy": 190 / 3}
    )
    assert judgement.submission is None
    assert textvqa.BENCHMARK.submission is None
    assert textvqa.BENCHMARK.doubts(questions, "val") == []


def _folder(root: Path) -> Path:
    # The image without a token is one of 115 whose line is empty.
    records = [
        _record(1, ["x"] * 10),
        _record(2, ["x"] * 10, question="how much is it ?"),
        _record(3, ["x"] * 10, image_id="b9dc"),
    ]
    _write(root, *records)
    (root / "train_images").mkdir()
    for image_id in ("003a", "b9dc"):
        (root / "train_images" / f"{image_id}.jpg").touch()
    return root


def _write_ocr(root: Path, name: str) -> None:
    if name.endswith(".json"):
        data = [
            {"image_id": "b9dc", "ocr_tokens": [], "ocr_info": []},
            {"image_id": "003a", "ocr_tokens": ["S,,", "$5"], "ocr_info": []},
        ]
        (root / name).write_text(json.dumps({"dataset_version": 0.2, "data": data}))
        return
    asked = [
        ("003a", "What is it?", "S,,, $5"),
        ("003a", "How much is it ?", "S,,, $5"),
        ("b9dc", "What is it?", ""),
    ]
    lines = [
        {
            "question_id": image_id,
            "image": f"{image_id}.jpg",
            "text": f"{text}\nReference OCR token: {tokens}{SHORT}",
            "category": "default",
        }
        for image_id, text, tokens in asked
    ]
    (root / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "name", ["llava_textvqa_val_v051_ocr.jsonl", "TextVQA_Rosetta_OCR_v0.2_val.json"]
)
def test_the_prompt_has_the_ocr_line(name: str, tmp_path: Path) -> None:
    root = _folder(tmp_path)
    _write_ocr(root, name)
    questions = textvqa.BENCHMARK.questions(root, "val")
    assert [question.text for question in questions] == [
        f"What is it?\nReference OCR token: S,,, $5{SHORT}",
        f"How much is it ?\nReference OCR token: S,,, $5{SHORT}",
        f"What is it?\nReference OCR token: {SHORT}",
    ]
    assert [question.id for question in questions] == ["1", "2", "3"]
    assert questions[2].image == root / "train_images" / "b9dc.jpg"
    assert questions[2].facts["answers"] == ("x",) * 10
    (root / "train_images" / "b9dc.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"b9dc\.jpg"):
        textvqa.BENCHMARK.questions(root, "val")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "llava_textvqa_val_v051_ocr.jsonl",
            {"question_id": "003a", "text": f"What is it?{SHORT}"},
            "line 1: its text is not a question, a line",
        ),
        (
            "llava_textvqa_val_v051_ocr.jsonl",
            {"question_id": "003a", "text": f"What is it?\nReference OCR token: {SHORT}"},
            r"lacks the question 'how much is it \?' \(question_id 2, image 003a\)",
        ),
        (
            "TextVQA_Rosetta_OCR_v0.2_val.json",
            {"data": [{"image_id": "003a", "ocr_tokens": []}]},
            "lacks the question .* image b9dc",
        ),
        (
            "TextVQA_Rosetta_OCR_v0.2_val.json",
            {"data": [{"image_id": "003a", "ocr_tokens": "x"}]},
            r"data\[0\]: ocr_tokens 'x' should be a valid list",
        ),
        ("TextVQA_Rosetta_OCR_v0.2_val.json", {}, "has no 'data'"),
    ],
)
def test_a_wrong_ocr_file_is_named(name: str, content: Any, sentence: str, tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name}.*{sentence}"):
        textvqa.BENCHMARK.questions(root, "val")


def test_doubts(tmp_path: Path) -> None:
    records = [
        _record(1, ["x"] * 10, question="what\nis it?"),
        _record(2, ["x"] * 10),
        _record(3, ["x"] * 10, question="What is it?"),
    ]
    version, newline, twice = textvqa.BENCHMARK.doubts(
        textvqa.read_labels(_write(tmp_path, *records, version="0.5")), "val"
    )
    assert "says it is 0.5 val, wanted 0.5.1 val" in version
    assert "1 questions have more than one line, such as 1:" in newline
    assert "1 questions stand twice at one image" in twice


def test_a_file_that_says_half_of_its_edition_is_not_doubted_for_it(tmp_path: Path) -> None:
    path = _write(tmp_path, _record(1, ["x"] * 10))
    content = json.loads(path.read_text())
    del content["dataset_type"]
    path.write_text(json.dumps(content))
    (question,) = textvqa.read_labels(path)
    assert question.facts["edition"] is None


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (_record(2, ["x"] * 9), r"data\[1\]: answers .* should have at least 10 items, not 9"),
        (_record(2, ["x"] * 11), r"data\[1\]: answers .* should have at most 10 items, not 11"),
        (
            _record(2, ["x"] * 10) | {"answers": [2] * 10},
            r"data\[1\]: answers\.0 2 should be a valid string",
        ),
        (
            _record(1, ["x"] * 10),
            r"data\[1\] has the question_id 1 of .*data\[0\]: keep one of the two",
        ),
        (
            _record(2, ["x"] * 10) | {"question_id": "2"},
            r"data\[1\]: question_id '2' should be a valid integer",
        ),
        ({"question_id": 2}, r"data\[1\] has no 'image_id'"),
    ],
)
def test_a_malformed_record_is_named(record: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"val\.json {sentence}"):
        textvqa.read_labels(_write(tmp_path, _record(1, ["x"] * 10), record))


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no packaged copy"):
        textvqa.BENCHMARK.questions(None, "val")
    with pytest.raises(ValueError, match="no split 'test': choose val"):
        textvqa.BENCHMARK.questions(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=r"TextVQA_0\.5\.1_val\.json"):
        textvqa.read_labels(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"llava_textvqa_val_v051_ocr\.jsonl or TextVQA_Rosetta_OCR"
    ):
        textvqa.BENCHMARK.questions(_folder(tmp_path), "val")
    for content in ("[]", '{"data": {}}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=r"x\.json"):
            textvqa.read_labels(tmp_path / "x.json")


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    rows = [
        (34602, "003a8ae2ef43b901", "is it red?", ["yes"] * 10),
        (34603, "003a8ae2ef43b901", "which letter?", ["b"] * 6 + ["no"] * 4),
        (34604, "0054c91397f2fe05", "what brand?", ["nokia"] * 8 + ["Nokia phone", "no"]),
    ]
    data = [
        dict(zip(("question_id", "image_id", "question", "answers"), row, strict=True))
        | {"set_name": "val"}
        for row in rows
    ]
    write_file(
        folder / "TextVQA_0.5.1_val.json",
        {
            "dataset_type": "val",
            "dataset_name": "textvqa",
            "dataset_version": "0.5.1",
            "data": data,
        },
    )
    tokens = [
        {"image_id": rows[0][1], "ocr_tokens": ["B", "STOP"]},
        {"image_id": rows[2][1], "ocr_tokens": []},
    ]
    write_file(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    write_images(folder / "train_images", [f"{rows[number][1]}.jpg" for number in (0, 2)])


OFFICIAL = Official(
    write=write_official,
    gold={"34602": "Yes", "34603": "B", "34604": "nokia"},
    size="5,000",
    readings=("normalised",),
    broken_label=BrokenLabel(
        "TextVQA_0.5.1_val.json",
        '"Nokia phone", ',
        "",
        ("data[2]: answers", "should have at least 10 items, not 9"),
    ),
    image="train_images/0054c91397f2fe05.jpg",
    prompts=(
        "  34602\n    <|im_start|>user\n    <image>\n    Is it red?\n"
        "    Reference OCR token: B, STOP\n"
        "    Answer the question using a single word or phrase.<|im_end|>\n",
    ),
)
