"""The figure of a report: a curve for one numeric axis, bars for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mipha.studies import report
from mipha.studies.findings import find
from mipha.studies.study import Study
from tests.studies.test_findings import write_runs

TUNED = {"all": [], "projector": ["stages.finetune.tuning.language_model=frozen"]}
RATE = {"key": "stages.finetune.learning_rate", "values": [1e-5, 1e-4, 1e-3]}


@pytest.mark.parametrize(
    ("axes", "drawn"),
    [
        ({"rate": RATE}, "_curve"),
        ({"tuned": TUNED}, "_bars"),
        ({"tuned": TUNED, "rate": RATE}, "_bars"),
        ({"rate": RATE, "seed": {"key": "seed", "values": [1, 2]}}, "_bars"),
    ],
)
def test_one_numeric_axis_is_a_curve_and_all_else_bars(
    axes: dict[str, Any], drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = {"recipe": "easy-vqa-mini", "axes": axes, "evaluate": [{"benchmark": "easy_vqa"}]}
    tree = {"name": "own", "title": "Own", "source": "none", "scales": {"mini": scale}}
    study = Study.parse(tree, "own")
    experiment = study.at("mini")
    write_runs(study, tmp_path, {variant.name: 0.5 for variant in experiment.variants}, seeds=2)

    calls = []
    for name in ("_curve", "_bars"):
        draw = getattr(report, name)
        monkeypatch.setattr(
            report, name, lambda *args, name=name, draw=draw: (calls.append(name), draw(*args))
        )
    report.draw_scores(find(experiment, tmp_path), tmp_path / "scores.png")
    assert calls == [drawn]
    assert (tmp_path / "scores.png").stat().st_size > 1000
