"""docs/studies.md: its study is complete, and its tables name every key."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mipha.cli import app
from mipha.evaluation.benchmark import load_benchmark
from mipha.recipe import load_recipe
from mipha.studies.findings import compared_by
from mipha.studies.panel import asked_of
from mipha.studies.study import (
    Beside,
    Measured,
    PanelQuestion,
    Scale,
    Study,
    Takeaway,
    list_studies,
    load_study,
)

TEXT = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
OWN, NUMERIC = re.findall(r"^```yaml\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
NAME = re.match(r"# (\S+\.yaml)\n", OWN)[1]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The study of the page, written into the working folder under its name."""
    monkeypatch.chdir(tmp_path)
    Path(NAME).write_text(OWN, encoding="utf-8")
    return load_study(NAME)


def test_the_study_has_the_variants_that_the_page_says(own: Study) -> None:
    experiment = own.at("mini")
    assert len(experiment.variants) == 4, "here four"
    assert (experiment.asked.seeds, own.name) == (3, Path(NAME).stem)
    base = load_recipe(experiment.asked.recipe).override(*experiment.asked.overrides)
    assert experiment.variants[0].recipe.digest() == base.digest()

    (measured,) = experiment.asked.evaluate
    assert compared_by(measured).name == measured.metric == "open"
    assert measured.split in load_benchmark(measured.benchmark).splits
    if find_spec("easy_vqa") is not None:
        assert len(asked_of(experiment.asked.panel, experiment.asked.evaluate)) == 2


def test_the_command_line_shows_it_with_every_default(own: Study) -> None:
    assert f"mipha study run ./{NAME} -o" in TEXT
    done = CliRunner().invoke(app, ["show", f"./{NAME}"], catch_exceptions=False)
    assert done.exit_code == 0
    assert yaml.safe_load(done.output) == own.model_dump(mode="json")


def test_a_numeric_axis_has_the_variants_that_the_page_says(own: Study) -> None:
    tree = yaml.safe_load(OWN)
    tree["scales"]["mini"] |= yaml.safe_load(NUMERIC) | {"takeaways": []}
    variants = Study.parse(tree, "numeric").at("mini").variants
    assert len(variants) == 3
    assert "learning_rate=2e-05" in TEXT and variants[1].name == "learning_rate=2e-05"


def test_the_tables_name_every_study_and_every_key() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|", TEXT, flags=re.MULTILINE))
    assert set(list_studies()) <= set(rows)

    (start,) = [match.start() for match in re.finditer(r"^\| key \| meaning \|$", TEXT, re.M)]
    table = TEXT[start:].partition("\n\n")[0]
    keys = set(re.findall(r"`(?:scales\.X\.)?(\w+)`", table))
    for schema in (Scale, Measured, Takeaway, PanelQuestion, Beside):
        assert set(schema.model_fields) <= keys, schema.__name__
    default = Takeaway.model_fields["within"].default
    assert f"`within` ({default:g})" in table
