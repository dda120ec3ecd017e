from __future__ import annotations

from importlib import metadata

import pytest

from mipha.errors import MissingPackage, OldPackage, import_optional, require_version


def test_a_missing_package_names_the_feature_and_the_command() -> None:
    with pytest.raises(MissingPackage) as caught:
        import_optional("no_such_package.part", "reading parquet", "data")
    assert caught.value.name == "no_such_package"
    assert str(caught.value) == (
        "reading parquet needs the Python package no_such_package, which is not installed: "
        'pip install "mipha-vlm[data]"'
    )


def test_a_package_without_an_extra_is_installed_by_its_own_name() -> None:
    with pytest.raises(MissingPackage, match=r"pip install wandb-core$"):
        import_optional("no_such_package", "tracking", package="wandb-core")


def test_a_package_that_is_there_is_imported() -> None:
    assert import_optional("json", "reading JSON").loads("1") == 1


@pytest.mark.parametrize("found", ["5.22.4", "5.9.0", "4.99.0", "5.22.0.dev0"])
def test_an_old_package_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: found)
    with pytest.raises(OldPackage) as caught:
        require_version("transformers", "5.23.0")
    assert str(caught.value) == (
        f"mipha needs transformers 5.23.0 or later, but {found} is installed: "
        "pip install 'transformers>=5.23.0'"
    )


@pytest.mark.parametrize("found", ["5.23.0", "5.100.1", "6.0"])
def test_a_new_package_is_taken(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: found)
    require_version("transformers", "5.23.0")
    with pytest.raises(MissingPackage):
        monkeypatch.undo()
        require_version("no-such-package", "1.0")


def test_the_oldest_transformers_is_the_one_that_the_package_asks_for() -> None:
    """The bound of pyproject.toml and the one that is checked are the same."""
    import tomllib
    from pathlib import Path

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    (bound,) = (line for line in project["dependencies"] if line.startswith("transformers"))
    source = Path("src/mipha/models/__init__.py").read_text()
    assert 'require_version("transformers", "5.23.0")' in source
    assert bound == "transformers>=5.23,<6"
