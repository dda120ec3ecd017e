from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mipha.evaluation.benchmark import Plan, Question, load_benchmark
from mipha.evaluation.paired import compare_paired, results_of
from mipha.evaluation.score import score_file, score_predictions


def results(folder: Path, name: str, right: np.ndarray) -> Path:
    """A folder of results on questions by hand, two an image, answered rightly or not."""
    asked = [
        Question(
            f"{n}",
            "is it?",
            None,
            {
                "answer": "yes",
                "kind": "yes_no",
                "image": n // 2,
                "usual": "no",
                "most_frequent": "yes",
            },
        )
        for n in range(len(right))
    ]
    own = folder / name / "evaluation" / "easy_vqa"
    own.mkdir(parents=True)
    header = {
        "benchmark": "easy_vqa",
        "checkpoint_sha256": "c",
        "prompts_sha256": "p",
        "max_new_tokens": 32,
    }
    (own / "predictions.meta.json").write_text(json.dumps(header))
    answers = {q.id: "yes" if hit else "no" for q, hit in zip(asked, right, strict=True)}
    score_predictions(Plan(load_benchmark("easy_vqa"), "test", asked), answers, own)
    return folder / name


def test_the_difference_is_taken_question_by_question(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weak = rng.random(200) < 0.6
    strong = weak | (rng.random(200) < 0.3)
    a, b = results(tmp_path, "a", strong), results(tmp_path, "b", weak)
    rows = compare_paired(a, b)
    assert rows[0].metric == "accuracy" and rows[0].unit == "%" and rows[0].benchmark == "easy_vqa"
    assert rows[0].paired.difference == pytest.approx(100 * (strong.mean() - weak.mean()))
    assert rows[0].paired.p_value < 0.001 and rows[0].p_holm == rows[0].paired.p_value, (
        "one benchmark, nothing to adjust"
    )
    assert {row.metric for row in rows} >= {"yes_no", "yes_no_minority"} and all(
        row.p_holm is None for row in rows[1:]
    )
    turned = compare_paired(b, a)
    assert turned[0].paired.difference == -rows[0].paired.difference
    # Never worse on any question: the interval of the paired difference leaves 0 out, although
    # those of the two alone overlap.
    assert rows[0].paired.low > 0


def test_headlines_are_adjusted_for_the_number_of_benchmarks(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a, b = (
        results(tmp_path, name, rng.random(100) < share) for name, share in (("a", 0.7), ("b", 0.5))
    )
    for folder in (a, b):
        (folder / "evaluation" / "easy_vqa-blind").mkdir()
        (folder / "evaluation" / "easy_vqa-blind" / "tally.json").write_bytes(
            (folder / "evaluation" / "easy_vqa" / "tally.json").read_bytes()
        )
    rows = [row for row in compare_paired(a, b) if row.p_holm is not None]
    assert len(rows) == 2 and all(
        row.p_holm == pytest.approx(min(1, 2 * row.paired.p_value)) for row in rows
    )


def test_what_cannot_be_paired(tmp_path: Path) -> None:
    a, short = (
        results(tmp_path, "a", np.ones(20, bool)),
        results(tmp_path, "short", np.ones(19, bool)),
    )
    with pytest.raises(ValueError, match=r"easy_vqa: .* did not answer the same questions"):
        compare_paired(a, short)
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nothing: give a run"):
        compare_paired(a, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no scores: make them with"):
        compare_paired(a, tmp_path / "empty")
    (tmp_path / "empty" / "pope").mkdir()
    (tmp_path / "empty" / "pope" / "scores.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no tally\.json beside the scores of pope"):
        compare_paired(a, tmp_path / "empty")
    other = tmp_path / "other" / "evaluation" / "pope"
    other.mkdir(parents=True)
    (other / "tally.json").write_text("{}")
    with pytest.raises(ValueError, match="nothing to pair"):
        compare_paired(a, other.parent.parent)


def test_two_scored_files_are_paired_too(tmp_path: Path) -> None:
    for split, rows in {
        "train": [["is it?", "no", 0]],
        "test": [["is it?", "yes", n] for n in range(6)],
    }.items():
        (tmp_path / split).mkdir()
        (tmp_path / split / "questions.json").write_text(json.dumps(rows))
    for name, said in (("a", "yes"), ("b", "no")):
        lines = [json.dumps({"question_id": f"test/{n}/0", "text": said}) for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        content = score_file(load_benchmark("easy_vqa"), tmp_path, tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert compare_paired(tmp_path / "a.json", tmp_path / "b.json")[0].paired.difference == 100
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ValueError, match=r"c\.json is not a file that `mipha score --json` wrote"):
        results_of(tmp_path / "c.json")
