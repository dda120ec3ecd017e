from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Judgement, Plan, Question, Split, load_benchmark
from mipha.evaluation.score import _count_questions, judge_answers, score_file, score_predictions
from mipha.evaluation.tables import print_results
from mipha.files import append_line


@pytest.fixture
def asked(tmp_path: Path) -> list[Question]:
    """Return four questions on two images, and a predictions file by hand that lacks the last."""
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


def test_fields_that_an_endpoint_refused_are_named(tmp_path: Path, asked: list[Question]) -> None:
    refused = {"max_tokens": "max_completion_tokens", "temperature": None}
    result = score_predictions(
        plan(asked), read(tmp_path), tmp_path, model={"endpoint": "x", "refused": refused}
    )
    assert result.notes[:2] == (
        "the endpoint's server refused max_tokens: max_completion_tokens was sent instead",
        "the endpoint's server refused temperature: it was left out",
    )


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


def test_one_image_alone_has_no_interval(tmp_path: Path, asked: list[Question]) -> None:
    result = score_predictions(plan(asked, limit=2), read(tmp_path), tmp_path)
    assert result.scores[0].value is not None
    assert all(score.low is None and score.high is None for score in result.scores)


def test_packaged_labels_need_no_path_and_others_are_asked_for(tmp_path: Path) -> None:
    benchmark = load_benchmark("easy_vqa")
    labels = benchmark.read_labels(None)
    assert labels[0].id == "test/0/0"
    file = tmp_path / "theirs.jsonl"
    rows = ({"question_id": q.id, "text": str(q.facts["answer"])} for q in labels)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score_file(benchmark, None, file)["headline"] == 100.0
    with pytest.raises(ValueError, match="gqa has no packaged copy"):
        score_file(load_benchmark("gqa"), None, file)


def test_no_answer_is_no_score(tmp_path: Path, asked: list[Question]) -> None:
    with pytest.raises(ValueError, match=r"none of the 4 questions.*errors\.jsonl"):
        score_predictions(plan(asked), {}, tmp_path)
    assert not (tmp_path / "scores.json").exists()
    append_line(tmp_path / "errors.jsonl", {"question_id": "q0", "error": "no choices"})
    with pytest.raises(ValueError, match=r"was answered \(no choices\): see .*errors\.jsonl"):
        score_predictions(plan(asked), {}, tmp_path)


def test_the_questions_behind_a_metric_are_its_own_or_those_of_its_group() -> None:
    counts = {"accuracy": 9, "random.accuracy": 4, "random.yes": 3, "popular.accuracy": 5}
    totals = Totals(
        {name: np.zeros(()) for name in counts}, {n: np.asarray(c) for n, c in counts.items()}
    )
    wanted = {
        "accuracy": 9,
        "random.f1": 4,
        "popular.f1": 5,
        "adversarial.f1": 9,
        "f1": 9,
        "random": 9,
    }
    assert {name: _count_questions(name, totals, 9) for name in wanted} == wanted


@pytest.mark.parametrize("nothing", ["", " \n\t", "\u200b\ufeff", "\x00"])
def test_answers_that_say_nothing_are_counted_and_noted(
    nothing: str, tmp_path: Path, asked: list[Question]
) -> None:
    texts = {"0": nothing, "1": "yes", "2": "-", "3": "yes"}
    result = score_predictions(plan(asked), texts, tmp_path)
    assert (result.n_empty, result.all_empty) == (1, False)
    assert result.notes[0] == "1 of 4 answers are empty and scored as such"
    assert json.loads((tmp_path / "scores.json").read_text())["n_empty"] == 1
    full = score_predictions(plan(asked), dict.fromkeys(texts, "yes"), tmp_path)
    assert full.n_empty == 0 and not any("empty" in note for note in full.notes)


def test_a_score_of_empty_answers_says_so_on_its_first_line(
    tmp_path: Path, asked: list[Question], capsys: pytest.CaptureFixture[str]
) -> None:
    result = score_predictions(plan(asked), dict.fromkeys("0123", ""), tmp_path)
    assert (
        result.n_empty == 4
        and result.all_empty
        and result.notes[0].startswith("all 4 answers are empty")
    )
    print_results([result])
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("easy_vqa: all 4 answers are empty")
    assert printed.count("all 4 answers") == 1 and "accuracy" in printed

    few = score_predictions(plan(asked), {"0": "", "1": "yes", "2": "yes", "3": "no"}, tmp_path)
    print_results([few])
    printed = capsys.readouterr().out
    assert (
        printed.splitlines()[0].strip() == "easy_vqa test" and "1 of 4 answers are empty" in printed
    )


@pytest.mark.parametrize(("texts", "noted"), [(["!!!!"] * 20, True), (["!!"] * 19, False)])
def test_many_answers_of_one_text_are_noted(
    texts: list[str], noted: bool, tmp_path: Path, asked: list[Question]
) -> None:
    """Weights that are not finite make a model repeat its first token."""
    many = [replace(asked[0], id=str(number)) for number in range(len(texts))]
    answers = dict(zip((question.id for question in many), texts, strict=True))
    result = score_predictions(plan(many), answers, tmp_path)
    found = [note for note in result.notes if note.startswith("all 20 answers are '!!!!': look")]
    assert len(found) == noted
    other = score_predictions(plan(many), answers | {"0": "yes"}, tmp_path)
    assert other.notes == ()


def test_empty_answers_are_noted_where_a_server_scores(tmp_path: Path) -> None:
    header = {"checkpoint_sha256": "c", "prompts_sha256": "d", "max_new_tokens": 8}
    (tmp_path / "predictions.meta.json").write_text(json.dumps(header))
    questions = [Question(str(number), "?", None, {}) for number in range(2)]
    server = {"splits": {"test": Split(2, "example.org")}, "submission": None, "baselines": {}}
    benchmark = replace(load_benchmark("easy_vqa"), **server)
    result = score_predictions(Plan(benchmark, "test", questions), {"0": "", "1": ""}, tmp_path)
    assert result.scores == () and result.notes[0].startswith("all 2 answers are empty")


class _Lazy:
    """A judge that cannot read what the fake benchmark gives it."""

    num_runs = None
    notes = ("the judge's server refused temperature: it was left out",)


def test_a_question_that_was_not_judged_is_an_error_of_that_question(
    tmp_path: Path, asked: list[Question], capsys: pytest.CaptureFixture[str]
) -> None:
    rules = load_benchmark("easy_vqa")

    def score(questions: list[Question], texts: dict[str, str], judge: object) -> Judgement:
        judged = rules.score([q for q in questions if q.id != "2" or judge is None], texts, None)
        return replace(judged, failed={"2": "no grade can be read"} if judge else {})

    benchmark = replace(rules, score=score, judge="required")
    part = Plan(benchmark, "test", asked)
    result = score_predictions(part, dict.fromkeys("0123", "yes"), tmp_path, _Lazy())  # type: ignore[arg-type]
    assert (result.n_asked, result.n_failed, result.complete) == (4, 1, False)
    assert result.scores[0].n == 3
    (line,) = (tmp_path / "errors.jsonl").read_text().splitlines()
    assert json.loads(line) == {"question_id": "2", "error": "no grade can be read"}
    note = "1 of 4 answers were not judged and are in no score, such as that to 2: no grade"
    assert any(found.startswith(note) for found in result.notes)
    assert result.notes[-1] == _Lazy.notes[0]
    print_results([result])
    printed = capsys.readouterr().out
    assert "1 of 4 questions failed" in printed and "not complete: 3 of 4 questions" in printed

    # The tally is of the judged questions, so it pairs only with one of the same questions.
    partial = json.loads((tmp_path / "tally.json").read_text())["ids_sha256"]
    score_predictions(Plan(rules, "test", asked), dict.fromkeys("0123", "yes"), tmp_path)
    assert json.loads((tmp_path / "tally.json").read_text())["ids_sha256"] != partial


def test_a_judge_for_rules_alone_is_refused(asked: list[Question]) -> None:
    with pytest.raises(ValueError, match="by rules alone"):
        benchmark = load_benchmark("easy_vqa")
        judge_answers(benchmark, asked, {}, judge=object())  # type: ignore[arg-type]
