"""Runs on disk become scores, comparisons and verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mipha.comparison.statistics import SeedDifference, tally
from mipha.run import create_run
from mipha.studies.findings import find, judge
from mipha.studies.folder import jobs_of
from mipha.studies.report import beside_rows, markdown, overall, write_report
from mipha.studies.study import Beside, Study, Takeaway, load_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    axes = {
        "tuned": {
            "all": [],
            "projector": ["stages.finetune.tuning.language_model=frozen"],
            "low": ["stages.finetune.learning_rate=1e-6"],
        }
    }
    takeaways = [
        {"claim": "all beats projector", "source": "s", "better": "all", "than": "projector"},
        {"claim": "all is on par with low", "source": "s", "on_par": ["all", "low"], "within": 20},
    ]
    scale = {
        "recipe": "easy-vqa-mini",
        "axes": axes,
        "evaluate": [{"benchmark": "easy_vqa"}],
        "takeaways": takeaways,
    }
    path = tmp_path / "own.yaml"
    path.write_text(
        yaml.safe_dump(
            {"name": "own", "title": "Own", "source": "none", "scales": {"mini": scale}},
            sort_keys=False,
        )
    )
    return load_study(path)


def write_runs(
    study: Study,
    out: Path,
    ability: dict[str, float],
    seeds: int = 3,
    num_images: int = 80,
    also: dict[str, dict[str, float]] | None = None,
) -> None:
    """Make finished runs that answer as well as asked, without training them.

    Other metrics may have numbers of their own.
    """
    for job in jobs_of(study.at("mini"), out, seeds):
        run = create_run(job.folder, job.recipe)
        rng = np.random.default_rng([job.seed, sum(job.variant.encode())])
        right = {
            name: rng.random((num_images, 4)) < of[job.variant]
            for name, of in ({"accuracy": ability} | (also or {})).items()
        }
        data = tally(
            (f"i{image}", {name: float(found[image, place]) for name, found in right.items()})
            for image in range(num_images)
            for place in range(4)
        )
        folder = run.evaluation("easy_vqa-validation")
        folder.mkdir(parents=True)
        (folder / "tally.json").write_text(json.dumps({"benchmark": "easy_vqa"} | data.as_json()))
        checkpoint = run.checkpoint("finetune")
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
        (checkpoint / "model.safetensors").write_bytes(b"")
        row = {"step": 1, "loss": 1.0, "seconds": 60.0, "peak_memory_gib": 2.0, "tokens": 500}
        run.metrics("finetune").write_text(json.dumps(row) + "\n")


def test_a_planted_effect_is_found_and_no_other(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_runs(study, out, {"all": 0.8, "projector": 0.4, "low": 0.8})
    findings = find(study.at("mini"), out)
    assert [overall(judged) for judged in findings.judged] == ["holds", "holds"]
    (planted,) = findings.judged[0].comparisons
    assert (planted.first, planted.second) == (
        "all",
        "projector",
    ) and 30 < planted.found.difference < 50
    assert planted.found.p_value <= planted.p_holm < 0.01
    (no_effect,) = findings.judged[1].comparisons
    assert no_effect.p_holm > 0.05
    assert (
        findings.scores["all"]["easy_vqa"].mean == pytest.approx(80, abs=6)
        and len(findings.scores["all"]["easy_vqa"].values) == 3
    )
    assert findings.costs["low"][0].minutes == 1.0 and findings.num_missing == 0
    assert findings.differences["projector"]["stages.finetune.tuning.language_model"] == "frozen"
    assert findings.differences["low"]["stages.finetune.learning_rate"] == 1e-6
    assert "| all minus projector | easy_vqa | +" in markdown(findings)


def test_every_verdict_stands_with_its_margin(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_runs(study, out, {"all": 0.8, "projector": 0.4, "low": 0.8})
    write_report(study.at("mini"), out)
    text, page = ((out / name).read_text() for name in ("report.md", "report.html"))
    assert "(s): **holds**, margin 2 %" in text and "(s): **holds**, margin 20 %" in text
    assert "<i>holds</i>, margin 2 %" in page and "<i>holds</i>, margin 20 %" in page
    assert "A difference up to the margin counts as none." in text


def test_what_a_picture_costs_stands_beside_its_score(study: Study, tmp_path: Path) -> None:
    scale = study.scales["mini"].model_copy(update={"times_first_token": True})
    timed = study.model_copy(update={"scales": {"mini": scale}})
    assert timed.at("mini").digest() == study.at("mini").digest(), "nothing is trained for it"

    out = tmp_path / "out"
    write_runs(study, out, {"all": 0.8, "projector": 0.4, "low": 0.7})
    assert "image tokens" not in markdown(find(timed.at("mini"), out)), "not measured yet"
    for name, milliseconds in (("all", 41.26), ("low", 7.0)):
        found = {"image_tokens": 36.0, "prompt_tokens": 50.4, "milliseconds": milliseconds}
        (out / "runs" / name / "seed-0" / "first-token.json").write_text(json.dumps(found))
    write_report(timed.at("mini"), out)
    text, page = ((out / name).read_text() for name in ("report.md", "report.html"))
    assert "| all | 36 | 50 | 41.3 | " in text and "| low | 36 | 50 | 7.0 | " in text
    assert "| projector | 36" not in text, "a run that was not timed has no row"
    assert page.count("data:image/png;base64,") == 2 and (out / "first-token.png").is_file()


def test_a_published_table_stands_beside_the_scores(study: Study, tmp_path: Path) -> None:
    beside = Beside(table=1, rows={"all": "Phi-2-2.7B", "low": "Pythia-1.4B"})
    scale = study.scales["mini"].model_copy(update={"beside": beside})
    shown = study.model_copy(update={"scales": {"mini": scale}})
    assert shown.at("mini").digest() == study.at("mini").digest(), "nothing is trained for it"

    out = tmp_path / "out"
    write_runs(study, out, {"all": 0.8, "projector": 0.4, "low": 0.7})
    write_report(shown.at("mini"), out)
    rows = beside_rows(find(shown.at("mini"), out))
    assert [row[:4] for row in rows] == [
        ["variant", "in the paper", "MMLU", "BBH"],
        ["all", "Phi-2-2.7B", "56.7", "43.4"],
        ["low", "Pythia-1.4B", "25.4", "-"],
    ]
    assert float(rows[1][-1].split(" ± ")[0]) == pytest.approx(80, abs=6)
    assert "## Beside Table 1 of the paper" in (out / "report.md").read_text()
    assert "<h2>Beside Table 1 of the paper</h2>" in (out / "report.html").read_text()
    assert beside_rows(find(study.at("mini"), out)) == []


def test_variants_are_compared_by_the_metric_that_is_asked_for(
    study: Study, tmp_path: Path
) -> None:
    def by(metric: str) -> Study:
        scale = study.scales["mini"]
        measured = scale.evaluate[0].model_copy(update={"metric": metric})
        return study.model_copy(
            update={"scales": {"mini": scale.model_copy(update={"evaluate": (measured,)})}}
        )

    assert by("shape").at("mini").digest() == study.at("mini").digest(), (
        "nothing else is trained or asked"
    )
    out = tmp_path / "out"
    write_runs(
        study,
        out,
        {"all": 0.8, "projector": 0.4, "low": 0.8},
        also={"shape": {"all": 0.3, "projector": 0.9, "low": 0.3}},
    )
    findings = find(by("shape").at("mini"), out)
    assert [overall(judged) for judged in findings.judged] == ["does not hold", "holds"]
    assert findings.scores["projector"]["easy_vqa"].mean == pytest.approx(90, abs=6)
    text = markdown(findings)
    assert (
        "| variant | easy_vqa, shape (%) |" in text
        and "| accuracy | 7" in text
        and "| shape | 3" in text
    ), "the others are in detail"
    with pytest.raises(
        ValueError,
        match="runs of all were measured on easy_vqa without colour: remove their evaluation "
        "folders",
    ):
        find(by("colour").at("mini"), out)
    with pytest.raises(
        ValueError, match="benchmark easy_vqa has no metric 'color': did you mean colour"
    ):
        find(by("color").at("mini"), out)


def test_a_false_claim_does_not_hold_and_one_run_is_not_enough(
    study: Study, tmp_path: Path
) -> None:
    write_runs(study, tmp_path / "false", {"all": 0.4, "projector": 0.8, "low": 0.8})
    assert [overall(judged) for judged in find(study.at("mini"), tmp_path / "false").judged] == [
        "does not hold",
        "does not hold",
    ]
    write_runs(study, tmp_path / "once", {"all": 0.9, "projector": 0.1, "low": 0.9}, seeds=1)
    assert [overall(judged) for judged in find(study.at("mini"), tmp_path / "once").judged] == [
        "not enough runs"
    ] * 2
    with pytest.raises(
        FileNotFoundError, match="has no finished run: make them with `mipha study run own"
    ):
        find(study.at("mini"), tmp_path / "nothing")


@pytest.mark.parametrize(
    ("kind", "low", "high", "p", "verdict"),
    [
        ("better", 1.0, 9.0, 0.01, "holds"),
        ("better", -1.0, 9.0, 0.2, "not enough runs"),
        ("better", -3.0, 1.0, 0.4, "does not hold"),
        ("better", -9.0, -3.0, 0.001, "does not hold"),
        ("on_par", -1.0, 1.5, 0.6, "holds"),
        ("on_par", 0.5, 1.9, 0.01, "holds"),
        ("on_par", -1.0, 3.0, 0.3, "not enough runs"),
        ("on_par", 3.0, 9.0, 0.001, "does not hold"),
        ("not_better", -5.0, 1.0, 0.2, "holds"),
        ("not_better", -1.0, 4.0, 0.2, "not enough runs"),
        ("not_better", 3.0, 9.0, 0.01, "does not hold"),
    ],
)
def test_a_verdict_follows_from_interval_and_p_value(
    kind: str, low: float, high: float, p: float, verdict: str
) -> None:
    """Margin 2; from the sentence in `judge`."""
    names = {"on_par": ("a", "b")} if kind == "on_par" else {kind: ("a",), "than": ("b",)}
    takeaway = Takeaway(claim="c", source="s", within=2.0, **names)
    assert judge(takeaway, SeedDifference((low + high) / 2, low, high, p, (3, 3)), p) == verdict
