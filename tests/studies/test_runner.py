"""A study trains what is missing and nothing twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mipha.api import run_study
from mipha.run import create_run, open_run
from mipha.studies.first_token import first_token_of
from mipha.studies.folder import Job, awaits, claim, jobs_of, open_study, share_stages
from mipha.studies.report import write_report
from mipha.studies.runner import _environment, list_runs
from mipha.studies.study import Study, load_study
from tests import forked


@pytest.fixture(scope="module")
def study(tiny_parts, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two ways to tune tiny parts for one step, measured on four questions."""
    parts, folder = tiny_parts(), tmp_path_factory.mktemp("study")
    stage = {
        "data": {"dataset": "messages", "root": str(tiny_data)},
        "learning_rate": 1e-3,
        "batch_size": 4,
        "max_steps": 1,
        "row_tokens": 256,
        "tuning": {"vision_tower": "frozen", "projector": "full", "language_model": "frozen"},
    }
    model = {
        "vision_tower": str(parts.vision_tower),
        "language_model": str(parts.language_model),
        "chat_template": "chatml",
    }
    recipe = {
        "name": "tiny",
        "model": model,
        "precision": "float32",
        "stages": {"pretrain": stage, "finetune": stage},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    axes = {"tuned": {"projector": [], "all": ["stages.finetune.tuning.language_model=full"]}}
    scale = {
        "recipe": str(folder / "tiny.yaml"),
        "axes": axes,
        "evaluate": [{"benchmark": "easy_vqa", "limit": 4}],
    }
    scale["takeaways"] = [
        {"claim": "All is not better", "source": "none", "not_better": "all", "than": "projector"}
    ]
    scale["panel"] = [{"image": "easy_vqa:0", "kind": "shape"}]
    scale["times_first_token"] = True
    path = folder / "own.yaml"
    path.write_text(
        yaml.safe_dump(
            {"name": "own", "title": "Own", "source": "none", "scales": {"mini": scale}},
            sort_keys=False,
        )
    )
    return load_study(path)


def use_forked_processes(patch: pytest.MonkeyPatch) -> None:
    """Let the runner fork its processes: each takes as long as its work."""
    fake = SimpleNamespace(run=forked.run, CalledProcessError=subprocess.CalledProcessError)
    patch.setattr("mipha.studies.runner.subprocess", fake)


@pytest.fixture(scope="module")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the finished study; tests must not change it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        use_forked_processes(patch)
        run_study(study, "mini", out, slots=1)
    return out


def test_what_is_to_be_done_is_listed_and_nothing_created(study: Study, tmp_path: Path) -> None:
    assert list_runs(study.at("mini"), tmp_path / "out", 1) == [
        ("projector", 0, "train pretrain, finetune"),
        ("all", 0, "train finetune"),
    ]
    assert not (tmp_path / "out").exists()


def test_a_study_runs_shares_its_first_stage_and_does_nothing_twice(
    study: Study, finished: Path
) -> None:
    out = finished
    assert {todo for *_, todo in list_runs(study.at("mini"), out, 1)} == {"done"}
    first, second = (open_run(job.folder) for job in jobs_of(study.at("mini"), out, 1))
    for run in (first, second):
        scores = json.loads((run.evaluation("easy_vqa") / "scores.json").read_text())
        assert scores["n_asked"] == 4 and scores["n_failed"] == 0
    # The second run trained its second stage alone.
    weights = [run.checkpoint("pretrain") / "model.safetensors" for run in (first, second)]
    assert weights[0].samefile(weights[1])
    assert (
        json.loads((second.folder / "provenance.json").read_text())["pretrain"]
        == "of projector, seed-0"
    )
    assert first.checkpoint("finetune").stat().st_ino != second.checkpoint("finetune").stat().st_ino
    write_report(study.at("mini"), out)
    report = (out / "report.md").read_text()
    assert "**All is not better** (none): **not enough runs**" in report, "one run each"
    assert "| stages.finetune.tuning.language_model | frozen | full |" in report
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "Answers side by side" in page, (
        "two figures, and the panel's image"
    )
    for run in (first, second):
        timed = first_token_of(run.folder)
        assert timed is not None and timed.milliseconds > 0
        assert 0 < timed.image_tokens < timed.prompt_tokens
    assert "| variant | image tokens | prompt tokens | first token, ms |" in report
    assert "(first-token.png)" in report and (out / "first-token.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    run_study(study, "mini", out)
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")} == before


def test_an_unknown_metric_is_refused_before_anything_is_trained(
    study: Study, tmp_path: Path
) -> None:
    measured = study.scales["mini"].evaluate[0].model_copy(update={"metric": "acuracy"})
    wrong = study.model_copy(
        update={
            "scales": {"mini": study.scales["mini"].model_copy(update={"evaluate": (measured,)})}
        }
    )
    with pytest.raises(ValueError, match="no metric 'acuracy': did you mean accuracy"):
        run_study(wrong, "mini", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_study_takes_over_the_runs_and_first_stages_of_the_same_recipes(
    study: Study, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_forked_processes(monkeypatch)
    axes = {"tuned": {"head": (), "norms": ("stages.finetune.tuning.language_model=last-1",)}}
    scale = study.scales["mini"].model_copy(update={"axes": axes, "takeaways": ()})
    other = study.model_copy(update={"name": "other", "scales": {"mini": scale}})
    with pytest.raises(FileNotFoundError, match="nothing holds no study"):
        run_study(other, "mini", tmp_path / "second", share=[tmp_path / "nothing"])
    assert not (tmp_path / "second").exists()
    donated = finished / "runs" / "projector" / "seed-0"
    assert list_runs(other.at("mini"), tmp_path / "second", 1, [finished]) == [
        ("head", 0, f"take over {donated}"),
        ("norms", 0, "train finetune"),
    ]
    run_study(other, "mini", tmp_path / "second", share=[finished])
    donor = open_run(finished / "runs" / "projector" / "seed-0")
    same, new = (open_run(job.folder) for job in jobs_of(other.at("mini"), tmp_path / "second", 1))
    weights = "model.safetensors"
    assert (same.checkpoint("finetune") / weights).samefile(
        donor.checkpoint("finetune") / weights
    ), "not trained again"
    assert json.loads((same.folder / "provenance.json").read_text())["trained_as"] == str(
        donor.folder.resolve()
    )
    assert not donor.metrics("finetune").samefile(same.metrics("finetune")), (
        "what may be written to is a file of its own"
    )
    assert (new.checkpoint("pretrain") / weights).samefile(donor.checkpoint("pretrain") / weights)
    assert not (new.checkpoint("finetune") / weights).samefile(
        donor.checkpoint("finetune") / weights
    )
    assert (same.folder / "panel.jsonl").is_file() and json.loads(
        (new.evaluation("easy_vqa") / "scores.json").read_text()
    )["n_asked"] == 4


@pytest.mark.skipif(shutil.which("srun") is not None, reason="would ask this cluster for a node")
def test_jobs_go_through_submitit(
    study: Study, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Where there is no SLURM it starts processes of its own: all but the queue is the same.

    The one run is trained already, and measured on fewer questions than are asked here.
    """
    scale, out = study.scales["mini"], tmp_path / "out"
    changes = {"axes": {"one": {"only": ()}}, "takeaways": (), "panel": ()}
    changes["evaluate"] = (scale.evaluate[0].model_copy(update={"limit": 5}),)
    alone = study.model_copy(update={"scales": {"mini": scale.model_copy(update=changes)}})
    with pytest.raises(ValueError, match="--slurm: Unknown argument 'partion'"):
        run_study(alone, "mini", out, slurm={"slurm_partion": "gpu"})
    with pytest.raises(
        ValueError, match="--slurm: Parameter \"timeout_min\" expected type <class 'int'>"
    ):
        run_study(alone, "mini", out, slurm={"timeout_min": "ten"})
    run_study(alone, "mini", out, slurm={"timeout_min": 10}, share=[finished])
    assert "no SLURM on this machine" in capsys.readouterr().out
    (job,) = jobs_of(alone.at("mini"), out, 1)
    scores = json.loads((open_run(job.folder).evaluation("easy_vqa") / "scores.json").read_text())
    assert scores["n_asked"] == 5
    assert list((out / "logs" / "slurm").glob("*_result.pkl")), "submitit made it"


def test_runs_side_by_side_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert (
        _environment(1) == {}
        and _environment(4) == {"OMP_NUM_THREADS": "2"}
        and _environment(9) == {"OMP_NUM_THREADS": "1"}
    )


def test_a_failed_run_is_named_with_its_log(study: Study, tmp_path: Path, tiny_data: Path) -> None:
    short = ("stages.pretrain.row_tokens=2",)
    alone = {"axes": {"tuned": {"projector": short}}, "takeaways": (), "panel": ()}
    scale = study.scales["mini"].model_copy(update=alone)
    broken = study.model_copy(update={"scales": {"mini": scale}})
    with pytest.raises(RuntimeError, match=r"1 of 1 runs failed: see .*projector-seed-0\.log"):
        run_study(broken, "mini", tmp_path / "out")
    assert "row_tokens" in (tmp_path / "out" / "logs" / "projector-seed-0.log").read_text()


def test_a_folder_of_another_study_is_refused_before_anything_is_trained(
    study: Study, tmp_path: Path
) -> None:
    claim(study.model_copy(update={"name": "other"}).at("mini"), tmp_path / "out")
    with pytest.raises(
        ValueError,
        match=r"holds study other at scale mini, not study own at scale mini: choose another -o",
    ):
        run_study(study, "mini", tmp_path / "out")
    claim(study.at("mini"), tmp_path / "own")
    changed = study.scales["mini"].model_copy(
        update={"overrides": (*study.scales["mini"].overrides, "seed=7")}
    )
    with pytest.raises(
        ValueError,
        match=r"holds study own at scale mini, not another version of it: choose another -o",
    ):
        run_study(study.model_copy(update={"scales": {"mini": changed}}), "mini", tmp_path / "own")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty and holds no study"):
        run_study(study, "mini", tmp_path / "full")


def test_a_folder_is_known_again_by_a_version_that_has_more_keys(
    study: Study, tmp_path: Path
) -> None:
    claim(study.at("mini"), tmp_path / "out")
    written = yaml.safe_load((tmp_path / "out" / "study.yaml").read_text())
    del written["scales"]["mini"]["overrides"]  # as if it were new
    (tmp_path / "out" / "study.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    claim(study.at("mini"), tmp_path / "out")
    assert open_study(tmp_path / "out") == study.at("mini")


def finish(job: Job, stage: str) -> None:
    """Leave what a finished stage leaves."""
    checkpoint = job.folder / stage / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_text(stage)
    (job.folder / stage / "states").mkdir()
    job.run.record_data(stage, {"samples": 3, "sha256": stage})


def test_a_run_shares_the_stages_in_which_recipes_agree_and_no_more(
    study: Study, tmp_path: Path
) -> None:
    """Three stages, of which two are equal; a stage that a run began is its own."""
    recipe = study.at("mini").variants[0].recipe
    stages = dict.fromkeys(("pretrain", "finetune", "polish"), recipe.stages["pretrain"])
    recipe = recipe.model_copy(update={"stages": stages})
    jobs = [
        Job(name, 0, recipe.override(*changes), tmp_path / name / "seed-0")
        for name, changes in (
            ("one", []),
            ("two", ["stages.polish.learning_rate=0.5"]),
            ("three", ["stages.finetune.learning_rate=0.5"]),
        )
    ]
    one, two, three = jobs
    for job in jobs:
        create_run(job.folder, job.recipe)

    assert awaits(two, [one]) and awaits(three, [one]) and not awaits(two, [])
    share_stages(two, jobs)
    assert two.num_finished == 0, "nobody has finished any"
    finish(one, "pretrain")
    share_stages(three, jobs)
    assert three.num_finished == 1 and not awaits(three, [one]), "finetune differs"
    finish(one, "finetune")
    share_stages(two, jobs)
    share_stages(three, jobs)
    assert [job.num_finished for job in jobs] == [2, 2, 1]
    assert not awaits(two, [one]), "polish differs"
    weights = [job.folder / "finetune" / "checkpoint" / "model.safetensors" for job in (one, two)]
    assert weights[0].samefile(weights[1]) and not (two.folder / "finetune" / "states").exists()
    made_with = json.loads((two.folder / "provenance.json").read_text())
    assert (made_with["pretrain"], made_with["finetune"]) == ("of one, seed-0",) * 2
    assert made_with["data"].keys() == {"pretrain", "finetune"}

    # What a run began itself is not replaced.
    again = replace(one, folder=tmp_path / "again" / "seed-0")
    create_run(again.folder, again.recipe)
    again.run.states("pretrain").mkdir(parents=True)
    share_stages(again, jobs)
    assert again.num_finished == 0 and not awaits(again, [one])
