"""VQAv2 on official-format files: two passes, the ten-equal-answers rule, upload, wrong files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import tally
from mipha.evaluation.answers import SHORT
from mipha.evaluation.benchmarks import vqav2
from tests.evaluation.official import BrokenLabel, Official, Upload, write_file, write_images

QUESTIONS, ANNOTATIONS = (
    "v2_OpenEnded_mscoco_val2014_questions.json",
    "v2_mscoco_val2014_annotations.json",
)


def _annotation(
    question_id: int,
    answers: Sequence[str],
    answer_type: str = "other",
    question_type: str = "what is",
) -> dict[str, Any]:
    people = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(answers, start=1)
    ]
    return {
        "question_id": question_id,
        "image_id": question_id // 1000,
        "answers": people,
        "answer_type": answer_type,
        "question_type": question_type,
        "multiple_choice_answer": answers[0],
    }


def _question(question_id: int) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "image_id": question_id // 1000,
        "question": f"What is {question_id}?",
    }


def _write(path: Path, key: str, records: Sequence[Any], subtype: str | None = "val2014") -> Path:
    path.write_text(
        json.dumps(
            {
                "info": {},
                "license": {},
                "data_type": "mscoco",
                "data_subtype": subtype,
                key: records,
            }
        )
    )
    return path


def _val(
    root: Path, *records: dict[str, Any], names: tuple[str, str] = (QUESTIONS, ANNOTATIONS)
) -> Path:
    _write(root / names[0], "questions", [_question(record["question_id"]) for record in records])
    _write(root / names[1], "annotations", records)
    return root


def _images(root: Path, image_set: str, *image_ids: int) -> None:
    (root / image_set).mkdir(exist_ok=True)
    for image_id in image_ids:
        (root / image_set / f"COCO_{image_set}_{image_id:012d}.jpg").touch()


def _accuracy(root: Path, answers: Sequence[str], text: str) -> float:
    file = _write(root / "annotations.json", "annotations", [_annotation(1000, answers)])
    return vqav2.score(vqav2.read_labels(file), {"1000": text}).per_question["1000"]


@pytest.mark.parametrize(
    ("answers", "text", "accuracy"),
    [
        # Ten equal answers: no normalising, only m4c on the text.
        (["yes"] * 10, "Yes.", 1),
        (["Yes"] * 10, "Yes", 0),
        (["1/2"] * 10, "1/2", 0),
        (["mcdonald's"] * 10, "mcdonald's", 0),
        (["t-shirt"] * 5 + ["\tt-shirt\n"] * 5, "t-shirt", 0),  # equal once white space is gone
        ([" dog\n"] * 10, "the dog", 1),
        # Not all equal: both sides are normalised.
        (["Yes"] * 9 + ["no"], "yes", 1),
        (["1/2"] * 9 + ["half"], "1/2", 1),
        (["mcdonald's"] * 9 + ["kfc"], "mcdonald's", 0),  # m4c made it "mcdonald 's"
        (["1,000-2,000"] * 9 + ["many"], "1,000-2,000", 0),  # "10002000" against m4c's "1000 2000"
        (["two", "2", "Two.", "the two"] + ["three"] * 6, "2", 1),
        (["a"] * 3 + ["b"] * 7, "An", 0.9),  # nothing is left of either
        # 4, 3, 2, 1, 0 of ten.
        (["red"] * 4 + ["blue"] * 6, "red", 1),
        (["red"] * 3 + ["blue"] * 7, "red", 0.9),
        (["red"] * 2 + ["blue"] * 8, "red", 0.6),
        (["red"] + ["blue"] * 9, "red", 0.3),
        (["red"] * 2 + ["blue"] * 8, "green", 0),
    ],
)
def test_accuracy_of_one_question(
    answers: list[str], text: str, accuracy: float, tmp_path: Path
) -> None:
    assert _accuracy(tmp_path, answers, text) == pytest.approx(accuracy, abs=1e-12)


def test_judgement_and_metrics(tmp_path: Path) -> None:
    root = _val(
        tmp_path,
        _annotation(1000, ["yes"] * 10, "yes/no", "is the"),
        _annotation(1001, ["man's", "2"] * 5, "other", "what is"),
        _annotation(2000, ["2"] * 3 + ["3"] * 7, "number", "what is"),
        names=("questions.json", "annotations.json"),
    )
    questions = vqav2.read_labels(root)
    assert [(question.id, question.text, question.image) for question in questions][2] == (
        "2000",
        "What is 2000?",
        None,
    )
    judgement = vqav2.score(questions, {"1000": "YES", "1001": "1,000", "2000": "Two"})
    assert judgement.per_question == pytest.approx({"1000": 1, "1001": 0, "2000": 0.9})
    assert judgement.submission == {"1000": "yes", "1001": "1000", "2000": "2"}
    assert judgement.normalised == judgement.submission
    assert [cluster for cluster, _ in judgement.contributions] == [1, 1, 2]
    metrics = vqav2.measure(tally(judgement.contributions).totals())
    assert next(iter(metrics)) == "accuracy"
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            "accuracy": 190 / 3,
            "perAnswerType.yes/no": 100,
            "perAnswerType.number": 90,
            "perAnswerType.other": 0,
            "perQuestionType.is the": 100,
            "perQuestionType.what is": 45,
        }
    )


def test_people_with_one_answer_id_leave_one_another_out(tmp_path: Path) -> None:
    record = _annotation(1000, ["x"] * 9 + ["y"])
    for person in record["answers"]:
        person["answer_id"] = 1
    questions = vqav2.read_labels(_write(tmp_path / "a.json", "annotations", [record]))
    assert vqav2.score(questions, {"1000": "x"}).per_question["1000"] == pytest.approx(0.1)
    assert vqav2.BENCHMARK.doubts(questions, "val") == [
        "1 questions have people without an answer_id of their own, whom the scorer mixes up: get "
        "the official file"
    ]


def test_val_has_prompts_images_and_labels(tmp_path: Path) -> None:
    root = _val(
        tmp_path, _annotation(262148000, ["down"] * 10), _annotation(393225001, ["no"] * 10)
    )
    _images(root, "val2014", 262148, 393225)
    first, second = vqav2.BENCHMARK.questions(root, "val")
    assert first.text == "What is 262148000?" + SHORT
    assert first.image == root / "val2014" / "COCO_val2014_000000262148.jpg"
    assert (second.id, second.facts["image_id"], second.facts["answers"]) == (
        "393225001",
        393225,
        ("no",) * 10,
    )
    assert vqav2.BENCHMARK.submission([first, second], {}) == {}
    assert vqav2.BENCHMARK.doubts([first, second], "val") == []
    (root / "val2014" / "COCO_val2014_000000393225.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"COCO_val2014_000000393225\.jpg"):
        vqav2.BENCHMARK.questions(root, "val")


def _llava_line(question_id: int, text: str = f"What is it?{SHORT}", name: str = "") -> str:
    name = name or f"COCO_test2015_{question_id // 1000:012d}.jpg"
    return (
        json.dumps({"question_id": question_id, "image": name, "text": text, "category": "default"})
        + "\n"
    )


def test_the_upload_of_test_dev_lists_all_of_test2015(tmp_path: Path) -> None:
    (tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl").write_text(
        _llava_line(5000) + _llava_line(7001)
    )
    _images(tmp_path, "test2015", 5, 7)
    questions = vqav2.BENCHMARK.questions(tmp_path, "test-dev")
    assert [question.text for question in questions] == [f"What is it?{SHORT}"] * 2
    assert questions[1].image == tmp_path / "test2015" / "COCO_test2015_000000000007.jpg"
    assert (
        "the upload has 2 ids but the server wants all 447793"
        in vqav2.BENCHMARK.doubts(questions, "test-dev")[0]
    )
    _write(
        tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json",
        "questions",
        list(map(_question, (5000, 6000, 7001))),
        "test2015",
    )
    questions = vqav2.BENCHMARK.questions(tmp_path, "test-dev")
    (content,) = vqav2.BENCHMARK.submission(
        questions, {"5000": "McDonald's", "7001": "No."}
    ).values()
    answers = {row["question_id"]: row["answer"] for row in json.loads(content)}
    assert answers == {5000: "mcdonald 's", 6000: "", 7001: "no"}
    assert len(json.loads(content)) == 3
    (tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl").write_text(
        _llava_line(5000) + _llava_line(7002)
    )
    with pytest.raises(ValueError, match=r"test2015_questions\.json lacks question_id 7002"):
        vqav2.BENCHMARK.questions(tmp_path, "test-dev")


def test_test_asks_everything(tmp_path: Path) -> None:
    _write(
        tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json",
        "questions",
        [_question(5000)],
        "test-dev2015",
    )
    _images(tmp_path, "test2015", 5)
    questions = vqav2.BENCHMARK.questions(tmp_path, "test")
    (content,) = vqav2.BENCHMARK.submission(questions, {"5000": "a cat"}).values()
    assert json.loads(content) == [{"question_id": 5000, "answer": "cat"}]
    assert vqav2.BENCHMARK.doubts(questions, "test") == [
        "the file's data_subtype is test-dev2015, that of split test is test2015: use the files "
        "of test2015"
    ]


def test_doubts_about_answers(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "a.json",
        "annotations",
        [_annotation(1, ["x"] * 10), _annotation(2, ["x"] * 9)],
        "train2014",
    )
    subtype, answers = vqav2.BENCHMARK.doubts(vqav2.read_labels(file), "val")
    assert "data_subtype is train2014" in subtype
    assert "1 questions do not have ten human answers" in answers


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in _annotation(2000, ["x"] * 10).items() if name != key}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        *(
            (_without(key), rf"annotations\[1\] has no '{key}'")
            for key in ("question_id", "image_id", "answers", "answer_type", "question_type")
        ),
        (
            _annotation(1000, ["x"] * 10),
            r"annotations\[1\] has the question_id 1000 of .*\[0\]: keep one of the two",
        ),
        (
            _without("question_id") | {"question_id": "2000"},
            r"annotations\[1\]: question_id '2000' should be a valid integer",
        ),
        (
            _without("question_id") | {"question_id": [1]},
            r"annotations\[1\]: question_id \[1\] should be a valid integer",
        ),
        (
            _without("answers") | {"answers": [{"answer": 2}]},
            r"annotations\[1\]: its answers are not a list",
        ),
        ("x", r"annotations\[1\] should be an object"),
    ],
)
def test_a_malformed_annotation_is_named(record: Any, sentence: str, tmp_path: Path) -> None:
    file = _write(
        tmp_path / "annotations.json", "annotations", [_annotation(1000, ["x"] * 10), record]
    )
    with pytest.raises(ValueError, match=rf"annotations\.json {sentence}"):
        vqav2.read_labels(file)


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([{"image_id": 1, "question": "?"}], r"questions\[0\] has no 'question_id'"),
        (
            [_question(1000) | {"image_id": "1"}],
            r"questions\[0\]: image_id '1' should be a valid integer",
        ),
        (
            [_question(1000), _question(1000)],
            r"questions\[1\] has the question_id 1000 of .*\[0\]: keep one of the two",
        ),
        (
            [_question(1000), _question(1001)],
            r"1 ids are in one only: question_id 1001 is not in the annotations",
        ),
        ([], r"1 ids are in one only: question_id 1000 is not in the questions"),
        ({}, r"questions \{\} should be a valid list"),
    ],
)
def test_a_malformed_question_file_is_named(records: Any, sentence: str, tmp_path: Path) -> None:
    _val(tmp_path, _annotation(1000, ["x"] * 10), names=("questions.json", "annotations.json"))
    _write(tmp_path / "questions.json", "questions", records)
    with pytest.raises(ValueError, match=rf"questions\.json.*{sentence}"):
        vqav2.read_labels(tmp_path)


@pytest.mark.parametrize(
    "line",
    [_llava_line(5000, "What is it?"), _llava_line(5000, name="COCO_val2014_000000000005.jpg")],
)
def test_a_line_that_is_not_llavas_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "llava_vqav2_mscoco_test2015.jsonl").write_text(_llava_line(4000) + line)
    with pytest.raises(ValueError, match=r"test2015\.jsonl line 2: wanted an image"):
        vqav2.BENCHMARK.questions(tmp_path, "test")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no packaged copy"):
        vqav2.BENCHMARK.questions(None, "val")
    with pytest.raises(ValueError, match="no split 'train': choose val or test-dev or test"):
        vqav2.BENCHMARK.questions(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"questions\.json"):
        vqav2.BENCHMARK.questions(tmp_path, "val")
    _write(tmp_path / "annotations.json", "annotations", [])
    with pytest.raises(FileNotFoundError, match=r"questions\.json"):
        vqav2.read_labels(tmp_path)


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    rows = [
        (42000, 42, "Is it a cat?", "yes/no", ["yes"] * 10),
        (42001, 42, "What color is it?", "other", ["red"] * 5 + ["dark red"] * 3 + ["no"] * 2),
        (42002, 42, "How many are there?", "number", ["2"] * 3 + ["two"] * 3 + ["3"] * 4),
        (139000, 139, "Is it red?", "yes/no", ["no"] * 6 + ["yes"] * 4),
        (139001, 139, "Which letter is it?", "other", ["b"] * 9 + ["no"]),
    ]
    annotations = [
        {
            **{
                "question_id": question_id,
                "image_id": image_id,
                "answer_type": kind,
                "question_type": text[:5].lower(),
            },
            "answers": [
                {"answer": one, "answer_confidence": "yes", "answer_id": n}
                for n, one in enumerate(answers, start=1)
            ],
        }
        for question_id, image_id, text, kind, answers in rows
    ]
    write_file(
        folder / "v2_mscoco_val2014_annotations.json",
        {"data_subtype": "val2014", "annotations": annotations},
    )
    test = [
        (number, number // 1000, f"Is it number {number}?")
        for number in (1000, 1001, 1002, 16000, 16001)
    ]
    parts = {
        "val2014": [row[:3] for row in rows],
        "test2015": test,
        "test-dev2015": [test[number] for number in (0, 2, 3)],
    }
    for subtype, part in parts.items():
        questions = [
            dict(zip(("question_id", "image_id", "question"), row, strict=True)) for row in part
        ]
        write_file(
            folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
            {"data_subtype": subtype, "questions": questions},
        )
    for name, numbers in (("val2014", (42, 139)), ("test2015", (1, 16))):
        write_images(folder / name, [f"COCO_{name}_{number:012d}.jpg" for number in numbers])


OFFICIAL = Official(
    write=write_official,
    gold={"42000": "yes", "42001": "red", "42002": "2", "139000": "no", "139001": "B"},
    size="214,354",
    readings=("normalised", "submission"),
    broken_label=BrokenLabel(
        "v2_mscoco_val2014_annotations.json",
        '{"answer": "red"',
        '{"text": "red"',
        ("annotations[1]", "its answers are not a list"),
    ),
    image="val2014/COCO_val2014_000000000139.jpg",
    other_files=("v2_OpenEnded_mscoco_val2014_questions.json",),
    served={
        # The upload lists all of test2015, with nothing for what was not asked.
        "test-dev": Upload(
            "vqav2_test2015.json",
            "question_id",
            [1000, 1002, 16000],
            "EvalAI challenge 830",
            not_asked=[1001, 16001],
        ),
        "test": Upload(
            "vqav2_test2015.json",
            "question_id",
            [1000, 1001, 1002, 16000, 16001],
            "EvalAI challenge 830",
        ),
    },
)
