"""Errors that several rooms raise, each with one sentence."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from types import ModuleType


class MissingPackage(ModuleNotFoundError):
    """An optional Python package is not installed.

    Args:
        package: Name of the package, as pip takes it.
        feature: What needs it; the subject of the sentence, for example "reading parquet".
        extra: Extra of mipha-vlm that installs the package; None where none does.
        then: Command to run after that; None where there is none.
    """

    def __init__(
        self, package: str, feature: str, extra: str | None = None, then: str | None = None
    ) -> None:
        install = f'pip install "mipha-vlm[{extra}]"' if extra else f"pip install {package}"
        super().__init__(
            f"{feature} needs the Python package {package}, which is not installed: "
            + (f"{install}, then {then}" if then else install),
            name=package,
        )


def import_optional(
    module: str, feature: str, extra: str | None = None, package: str | None = None
) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Dotted name of the module.
        feature: What needs it, for the error.
        extra: Extra of mipha-vlm that installs the package.
        package: Name that pip takes, where it is not that of the module's top level.

    Raises:
        MissingPackage: The package, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackage(package or module.partition(".")[0], feature, extra) from error


class OldPackage(ImportError):
    """A Python package is installed in a version that is too old."""


def require_version(package: str, oldest: str) -> None:
    """Refuse an old version of an installed package.

    Args:
        package: Name of the package, as pip takes it.
        oldest: Oldest version that is known to work, such as 5.23.0.

    Raises:
        OldPackage: The installed version is older.
        MissingPackage: The package is not installed.
    """
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise MissingPackage(package, "mipha") from error
    if _numbers(found) < _numbers(oldest):
        raise OldPackage(
            f"mipha needs {package} {oldest} or later, but {found} is installed: "
            f"pip install '{package}>={oldest}'"
        )


def _numbers(version: str) -> list[int]:
    """Return the first three numbers of a version."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
