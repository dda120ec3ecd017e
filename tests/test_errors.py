from __future__ import annotations

import pytest

from mipha.errors import MissingPackage, import_optional


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
