from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.evaluation.benchmark import Plan, Question, load_benchmark
from mipha.evaluation.score import judge_answers, read_predictions_file, score_predictions
from mipha.files import append_line


@pytest.fixture
def asked(tmp_path: Path) -> list[Question]:
    """Four questions on two images, and a predictions file by hand that lacks the last."""
    header = {
        "benchmark": "easy_vqa",
        "checkpoint_sha256": "c" * 64,
        "prompts_sha256": "d" * 64,
        "max_new_tokens": 32,
    }
    (tmp_path / "predictions.meta.json").write_text(json.dumps(header))
    for number, text in enumerate(["so yes", "no", "a dog"]):
        append_line(tmp_path / "predictions.jsonl", {"question_id": str(number), "text": text})
    return [
        Question(
            str(number),
            "is it?",
            None,
            {
                "answer": "yes",
                "kind": "yes_no",
                "image": number // 2,
                "usual": "no",
                "most_frequent": "yes",
            },
        )
        for number in range(4)
    ]


def read(folder: Path) -> dict[str, str]:
    return {
        row["question_id"]: row["text"]
        for row in map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    }


def plan(asked: list[Question], limit: int | None = None) -> Plan:
    return Plan(load_benchmark("easy_vqa"), "test", asked, limit=limit)


def test_the_file_says_by_itself_what_was_measured(tmp_path: Path, asked: list[Question]) -> None:
    result = score_predictions(plan(asked), read(tmp_path), tmp_path)
    content = json.loads((tmp_path / "scores.json").read_text())
    assert (
        content["benchmark"] == "easy_vqa"
        and content["split"] == "test"
        and "cluster bootstrap over images" in content["protocol"]
    )
    assert (content["checkpoint_sha256"], content["prompts_sha256"], content["max_new_tokens"]) == (
        "c" * 64,
        "d" * 64,
        32,
    )
    headline = content["scores"][0]
    assert set(headline) == {"metric", "value", "unit", "n", "low", "high", "description"}
    assert (headline["metric"], headline["unit"], headline["n"]) == ("accuracy", "%", 3)
    assert headline["value"] == result.scores[0].value == pytest.approx(100 / 3)
    assert headline["low"] <= headline["value"] <= headline["high"]
    assert content["baselines"] == {"majority": 100.0, "question_only": 0.0}


def test_a_failed_question_is_counted_and_not_scored(tmp_path: Path, asked: list[Question]) -> None:
    result = score_predictions(plan(asked), read(tmp_path), tmp_path)
    assert (result.num_questions, result.n_asked, result.n_failed, result.complete) == (
        4,
        4,
        1,
        False,
    )
    whole = score_predictions(plan(asked), {**read(tmp_path), "3": "no"}, tmp_path)
    assert (whole.n_failed, whole.complete, whole.scores[0].n) == (0, True, 4)


def test_a_limit_is_not_a_failure_but_not_complete_either(
    tmp_path: Path, asked: list[Question]
) -> None:
    result = score_predictions(plan(asked, limit=2), read(tmp_path), tmp_path)
    assert (
        result.num_questions,
        result.n_asked,
        result.n_failed,
        result.complete,
        result.scores[0].n,
    ) == (4, 2, 0, False, 2)


def test_no_answer_is_no_score(tmp_path: Path, asked: list[Question]) -> None:
    with pytest.raises(ValueError, match=r"none of the 4 questions.*errors\.jsonl"):
        score_predictions(plan(asked), {}, tmp_path)
    assert not (tmp_path / "scores.json").exists()


def write_lines(path: Path, *rows: dict[str, object] | str) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    )
    return path


def test_a_file_of_answers_is_scored_in_any_order_and_with_any_other_keys(
    tmp_path: Path, asked: list[Question]
) -> None:
    rows = [
        {"question_id": int(q.id) if q.id == "2" else q.id, "text": "yes", "model_id": "x"}
        for q in reversed(asked)
    ]
    assert read_predictions_file(write_lines(tmp_path / "p.jsonl", *rows), asked) == dict.fromkeys(
        "0123", "yes"
    )


def test_text_is_taken_verbatim(tmp_path: Path, asked: list[Question]) -> None:
    rows = [{"question_id": question.id, "text": f" {question.id}\u2028\n "} for question in asked]
    assert (
        read_predictions_file(write_lines(tmp_path / "p.jsonl", *rows), asked)["3"] == " 3\u2028\n "
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"question_id": "0", "text": "a"}, "{"], r"p\.jsonl line 2 is not valid JSON"),
        (["[1]"], r"p\.jsonl line 1 is not a JSON object"),
        ([{"question_id": "0"}], r"p\.jsonl line 1 has no 'text': write .*question_id"),
        (
            [{"question_id": "0", "text": None}],
            r"p\.jsonl line 1: text None should be a valid string: write .*question_id",
        ),
        (
            [{"question_id": 0.5, "text": "a"}],
            r"line 1: question_id 0\.5 should be a text or a whole number",
        ),
        (
            [{"question_id": "0", "text": "a"}, {"question_id": 0, "text": "b"}],
            r"line 2: question_id 0 is also on line 1",
        ),
        (
            [{"question_id": "9", "text": "a"}],
            r"line 1: no question has the id 9 \(ids look like 0\)",
        ),
        ([{"question_id": "1", "text": "a"}], r"lacks 3 of 4 questions, such as 0, 2, 3"),
    ],
)
def test_a_wrong_line_is_named(
    tmp_path: Path, asked: list[Question], rows: list[dict[str, object] | str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_predictions_file(write_lines(tmp_path / "p.jsonl", *rows), asked)


def test_a_judge_for_rules_alone_is_refused(asked: list[Question]) -> None:
    with pytest.raises(ValueError, match="by rules alone"):
        benchmark = load_benchmark("easy_vqa")
        judge_answers(benchmark, asked, {}, judge=object())  # type: ignore[arg-type]
