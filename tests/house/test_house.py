"""The rules of CONTRIBUTING.md that a program can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "mipha"
FILES = sorted(SOURCE.rglob("*.py"))

LAYERS = (
    {
        *("recipe", "run", "files", "checkpoint_files", "geometry", "errors", "processes"),
        *("labels", "lookup", "preflight", "terminal", "validation", "catalog"),
        "answer_spans",
        "rendering",
    },
    {"models", "data", "world"},
    {"assistant", "comparison", "engine"},
    {"training", "planning", "evaluation", "alignment", "deploy", "integrations"},
    {"studies", "quickstart", "photographs", "own_data", "api"},
    {"cli", "__main__"},
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
CLOSED = {1, 3}
"""Layers whose rooms never import one another."""


def room_of(path: Path) -> str:
    """Return the first folder, or the module at the top; `__init__` for the package's own."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Return the dotted names of all imports of a file, at any depth.

    `from mipha import run` gives `mipha.run`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write it from the top"
            yield from (
                [f"mipha.{alias.name}" for alias in node.names]
                if node.module == "mipha"
                else [node.module or ""]
            )


def outputs(tree: ast.AST) -> Iterator[str]:
    """Return the names of functions and classes that write to a terminal, where they are used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def may_import(room: str, other: str) -> bool:
    mine, theirs = LAYER[room], LAYER[other]
    return room == other or theirs < mine or (theirs == mine and mine not in CLOSED)


def wrong_imports(room: str, source: str) -> list[str]:
    rooms = [
        name.split(".")[1]
        for name in imported_modules(ast.parse(source))
        if name.startswith("mipha.")
    ]
    return [other for other in rooms if not may_import(room, other)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return  # the public names, loaded on first use
    assert room in LAYER, f"{room} is in no layer: give it one in CONTRIBUTING.md and here"
    assert wrong_imports(room, path.read_text(encoding="utf-8")) == []


def test_the_layers_name_the_rooms_that_there_are() -> None:
    assert set(LAYER) == {room_of(path) for path in FILES} - {"__init__"}


def test_the_check_finds_imports_that_point_up_or_sideways() -> None:
    assert wrong_imports("run", "def f():\n    from mipha.models.build import build") == ["models"]
    assert wrong_imports("data", "from mipha import models") == ["models"]
    assert wrong_imports("training", "import mipha.evaluation.score") == ["evaluation"]
    assert (
        wrong_imports(
            "evaluation",
            "from mipha.data.images import open_image\nfrom mipha.comparison import statistics",
        )
        == []
    )
    assert wrong_imports("cli", "from mipha.quickstart import quickstart") == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_file_keeps_the_house_rules(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert path.stem not in {"utils", "util", "common", "constants", "helpers", "misc"}, (
        "name the module after its job"
    )
    assert ast.get_docstring(tree), "give the module a docstring whose first line names its job"
    assert not {"pickle", "cPickle", "dill", "cloudpickle"} & set(imported_modules(tree)), (
        "reading a pickle runs its code"
    )

    if room_of(path) != "terminal":
        assert not {"rich.console.Console", "typer.echo", "print"} & set(outputs(tree)), (
            "print with mipha.terminal: strangers' text has escape sequences"
        )

    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code", (
                f"line {node.value.lineno}: no code from a checkpoint is ever run"
            )

        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            swallows = all(
                isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body
            )
            broad = isinstance(node.type, ast.Name) and node.type.id in {
                "Exception",
                "BaseException",
            }
            assert not (swallows and broad), f"line {node.lineno}: every error is swallowed"


def test_the_light_rooms_do_not_load_torch() -> None:
    light = [
        path
        for path in FILES
        if room_of(path)
        in {
            "recipe",
            "run",
            "files",
            "checkpoint_files",
            "geometry",
            "processes",
            "errors",
            "labels",
            "lookup",
            "preflight",
            "terminal",
            "validation",
            "catalog",
            "comparison",
            "api",
            "cli",
        }
    ]
    modules = [
        ".".join(("mipha", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for path in light
    ]
    assert "mipha.cli" in modules

    program = (
        f"import sys\nfor module in {modules}: __import__(module)\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    environment = {"PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "set()"
