"""Names: the files of a folder, the YAML behind a name, and "did you mean" for an unknown one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

MOST_VALUES = 100_000
"""Values of a YAML file with its aliases written out: a few lines of them can mean billions."""


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number, where YAML 1.1 wants 1.0e-3.

    A key that stands twice is refused.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in own if own.count(key) > 1}):
            problem = f"the key {twice[0][:60]!r} stands twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return a clause for an error message: the nearest known names, or all of them.

    Args:
        otherwise: What the user may do instead: "give a .yaml file".
    """
    known = sorted(known)
    if near := near_names(name, known):
        clause, joined = f"did you mean {' or '.join(near)}?", " If not, "
    else:
        clause, joined = f"known: {', '.join(known) or 'none'}", "; or "
    return clause + (joined + otherwise if otherwise else "")


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that are nearest to a mistyped one, at most three.

    Initials are near too: `lr` is learning_rate.
    """
    known = sorted(known)
    meant = [other for other in known if name == "".join(w[:1] for w in re.split("[_-]", other))]
    return meant or difflib.get_close_matches(name, known, n=3, cutoff=0.5)


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
        near = did_you_mean(str(name), files_in(folder, ".yaml"), "give a .yaml file")
        raise FileNotFoundError(f"no {kind} {str(name)!r}: {near}")
    return read_yaml(path.read_bytes(), str(path)), path


def read_yaml(text: str | bytes, source: str) -> Any:
    """Return plain values from YAML.

    Raises:
        ValueError: The text is not UTF-8 or not YAML, or its aliases mean too many values; names
            the source.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 text: save it again as UTF-8") from error
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{source} is not UTF-8 text: set LC_ALL=C.UTF-8, or rename what it names")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}) > MOST_VALUES:
            raise ValueError(
                f"{source} means more than {MOST_VALUES:,} values: write fewer aliases (*name)"
            )
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{source} is nested too deeply: write fewer brackets") from error


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a node with aliases written out; too many where one holds itself."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # until it is counted: an alias in it holds it
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in inner for part in (entry if type(entry) is tuple else [entry])]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]


def list_some(names: Sequence[str], most: int = 4) -> str:
    """Return the first names with commas, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
