"""The package and the command line do the same; a name costs nothing until it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mipha
from mipha import api
from mipha.run import Run, create_run

SOURCE = Path(mipha.__file__).parents[1]


def test_every_public_name_is_listed_and_loads() -> None:
    assert set(mipha.__all__) <= set(dir(mipha))
    assert set(mipha.__all__) == set(mipha._HOME)
    for name in mipha.__all__:
        assert callable(getattr(mipha, name)), name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mipha.trian  # noqa: B018


def test_importing_the_package_loads_no_torch() -> None:
    program = (
        "import sys, mipha, mipha.api\n"
        "mipha.load_recipe('quickstart'), mipha.load_study, mipha.train, mipha.evaluate\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize(
    ("own", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_sleep_soon_unless_the_user_says_otherwise(
    own: dict[str, str], spins: str | None
) -> None:
    clean = {key: value for key, value in os.environ.items() if "OMP_" not in key}
    read = "import mipha, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", read], env=clean | own, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(spins)


def test_few_programs_of_onednn_are_kept_unless_the_user_says_otherwise() -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    read = f"import mipha, os; print(os.environ['{name}'])"
    for own, kept in (({}, "64"), ({name: "9"}, "9")):
        environment = {key: value for key, value in os.environ.items() if key != name} | own
        done = subprocess.run(
            [sys.executable, "-c", read], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == kept


def test_type_checkers_are_told_that_the_package_has_types() -> None:
    assert (SOURCE / "mipha" / "py.typed").is_file()
    assert '"py.typed"' in (SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Path, Run]]:
    """The cards that are written; training and measuring take no time."""
    written: list[tuple[Path, Run]] = []
    run = create_run(tmp_path / "run", mipha.load_recipe("quickstart"))
    monkeypatch.setattr(Run, "final_checkpoint", lambda self: self.folder / "model")

    def fake(module: str, **functions: Any) -> None:
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))  # type: ignore[arg-type]

    fake("mipha.training.pipeline", train=lambda recipe, folder, **options: run)
    monkeypatch.setattr("mipha.evaluation.evaluate.evaluate", lambda *_, **__: ["result"])
    fake(
        "mipha.deploy.model_card",
        write_model_card=lambda checkpoint, run: written.append((checkpoint, run)),
    )
    return written


def test_training_and_measuring_write_the_card_of_a_run(
    cards: list[tuple[Path, Run]], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    assert api.train(mipha.load_recipe("quickstart"), tmp_path / "run") == run
    assert api.evaluate(run, ["pope"]) == ["result"]
    assert cards == [(tmp_path / "run" / "model", run)] * 2


def test_only_the_first_process_writes_a_card_and_only_for_results_in_the_run(
    cards: list[tuple[Path, Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.evaluate(Run(tmp_path / "run"), ["pope"], out=tmp_path / "elsewhere")
    monkeypatch.setenv("RANK", "1")
    api.evaluate(Run(tmp_path / "run"), ["pope"])
    api.train(mipha.load_recipe("quickstart"), tmp_path / "run")
    assert cards == []
