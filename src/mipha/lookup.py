"""Names: the files of a folder, the YAML behind a name, and "did you mean" for an unknown one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number, where YAML 1.1 wants 1.0e-3."""


_Loader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a clause for an error message: the nearest known names, or all of them."""
    known = sorted(known)
    near = near_names(name, known)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that are nearest to a mistyped one, at most three."""
    return difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)


def files_in(folder: Path, suffix: str) -> list[str]:
    """Return the stems of the files with this suffix: the folder is the registry."""
    return sorted(path.stem for path in folder.glob(f"*{suffix}") if not path.stem.startswith("_"))


def read_named(name: str | Path, folder: Path, kind: str) -> tuple[Any, Path]:
    """Read a YAML file of the catalog, or any other.

    Args:
        name: Stem of a file in `folder`, or a path that ends in .yaml.
        kind: Kind of file, for messages.

    Returns:
        Its plain values, and its path.

    Raises:
        FileNotFoundError: Neither.
        ValueError: The file is not YAML.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        if path == Path(name):
            raise FileNotFoundError(f"no {kind} {str(name)!r}: there is no such file")
        near = did_you_mean(str(name), files_in(folder, ".yaml"))
        raise FileNotFoundError(f"no {kind} {str(name)!r}: {near}, or give a .yaml file")
    return read_yaml(path.read_text(encoding="utf-8"), str(path)), path


def read_yaml(text: str, source: str) -> Any:
    """Return plain values from YAML.

    Raises:
        ValueError: The text is not YAML; names the source.
    """
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{source} is not UTF-8 text: set LC_ALL=C.UTF-8, or rename what it names")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error
