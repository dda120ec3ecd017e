"""Studies at paper scale can finish: every benchmark that they ask is measured by the program."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mipha.cli import app
from mipha.recipe import Recipe
from mipha.run import create_run
from mipha.studies.folder import claim
from mipha.studies.study import Measured, list_studies, load_study
from tests.evaluation.official import collect

LISTS: dict[str, tuple[Measured, ...]] = {}
"""Every list of benchmarks that a study asks at paper scale, under the first study with it."""
for _name in list_studies():
    _asked = load_study(_name).scales["paper"].evaluate
    if _asked not in LISTS.values():
        LISTS[_name] = _asked


@pytest.fixture
def here(official_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small official files at `data/eval`, where the studies look for them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "eval").symlink_to(official_files)
    monkeypatch.chdir(tmp_path)

    def run(command: Sequence[str], stdout: Any, **_: Any) -> None:
        done = CliRunner().invoke(app, list(command[3:]))  # python -m mipha ...
        stdout.write(done.output.encode())
        if done.exit_code:
            raise subprocess.CalledProcessError(done.exit_code, command)

    monkeypatch.setattr("mipha.studies.runner.subprocess", SimpleNamespace(run=run))
    return tmp_path


@pytest.mark.parametrize("name", LISTS)
def test_every_benchmark_of_paper_scale_is_measured(
    name: str, here: Path, tiny_run_recipe: Callable[..., Recipe], tiny_model: Callable
) -> None:
    from mipha.models.build import save_checkpoint

    # A study of one run.
    recipe = tiny_run_recipe()
    Path("tiny.yaml").write_text(recipe.dump())
    scale = {
        "recipe": "tiny.yaml",
        "axes": {"one": {"only": []}},
        "evaluate": [wanted.model_dump(mode="json") for wanted in LISTS[name]],
    }
    tree = {"name": "own", "title": "Own", "source": "none", "scales": {"paper": scale}}
    Path("own.yaml").write_text(yaml.safe_dump(tree))

    # Its stages are finished already.
    claim(load_study("own.yaml").at("paper"), Path("out"))
    run = create_run("out/runs/only/seed-0", recipe)
    for stage in recipe.stages:
        save_checkpoint(*tiny_model("llama"), run.checkpoint(stage))
    Path("replies.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n" for official in collect().values() for row in official.replies
        )
    )

    # Without a judge: what needs one is named, and left out.
    judged = [wanted.benchmark for wanted in LISTS[name] if wanted.benchmark == "mmvet"]
    command = ["study", "run", "own.yaml", "-o", "out", "--scale", "paper"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output + _logs()
    said = "mmvet: graded by a judge and left out" in " ".join(done.output.split())
    assert said is bool(judged)
    assert _measured(run.folder) == {wanted.benchmark for wanted in LISTS[name]} - set(judged)

    # With one, the same command measures the rest.
    done = CliRunner().invoke(app, [*command, "--judge-replies", "replies.jsonl"])
    assert done.exit_code == 0, done.output + _logs()
    assert _measured(run.folder) == {wanted.benchmark for wanted in LISTS[name]}
    report = Path("out/report.md").read_text()
    assert all(f"{wanted.benchmark}, " in report for wanted in LISTS[name])


def _measured(run: Path) -> set[str]:
    """Return the benchmarks with complete scores."""
    scores = [json.loads(file.read_text()) for file in run.glob("evaluation/*/scores.json")]
    assert all(found["n_failed"] == 0 for found in scores)
    return {found["benchmark"] for found in scores}


def _logs() -> str:
    return "".join(path.read_text() for path in Path("out/logs").glob("*.log"))
