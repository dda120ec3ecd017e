"""The README says what is there: its tree, its Python names, its verbs."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import mipha
from mipha.alignment.recipe import load_alignment_recipe
from mipha.cli import app
from mipha.recipe import list_recipes, load_recipe
from mipha.studies.study import list_studies

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_python_blocks_use_public_names() -> None:
    (block,) = _blocks("python")
    names = {
        node.attr
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "mipha"
    }
    assert names >= {"load_recipe", "train", "evaluate", "load"}
    for name in names:
        assert callable(getattr(mipha, name))


def test_overrides_in_the_text_are_valid() -> None:
    """Of recipes in the README; of recipes and alignment recipes in the other pages' commands."""
    commands = [
        line
        for text in PAGES.values()
        for block in _blocks("bash", text)
        for line in block.replace("\\\n", "").splitlines()
    ]
    assert any("mipha align" in line for line in commands)
    found = 0
    for line in [*commands, *_blocks("python", README)]:
        for assignment in _assignments(line):
            step = re.search(r"mipha align ([\w-]+) ([\w-]+)", line)
            if re.search(r"mipha (train|plan|quickstart)|override", line):
                load_recipe("quickstart").override(assignment)
            elif step:
                assert load_alignment_recipe(step[2]).override(assignment).step == step[1]
            else:
                continue
            found += 1
    assert found >= 20


def _assignments(text: str) -> list[str]:
    """Return the words `key=value` of a command, or of the strings in Python code."""
    is_python = text.startswith("import")
    words = re.findall(r'"([^"]+)"', text) if is_python else shlex.split(text, comments=True)
    return [word for word in words if re.match(r"[a-z][\w.]*=", word)]


def test_verbs_exist() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    verbs |= {group.name for group in app.registered_groups}
    for name, text in PAGES.items():
        used = set(
            re.findall(
                r"^(?:.*-m )?mipha (\w+)", "\n".join(_blocks("bash", text)), flags=re.MULTILINE
            )
        )
        assert used <= verbs, name
        assert used or not _blocks("bash", text), f"{name} has commands, and none of mipha"


def test_recipes_and_studies_that_the_pages_name_are_there() -> None:
    commands = "\n".join(block for text in PAGES.values() for block in _blocks("bash", text))
    recipes = set(re.findall(r"mipha (?:train|plan|show) ([\w.-]+)", commands)) - {".", "..."}
    assert recipes and recipes <= set(list_recipes())
    studies = set(re.findall(r"mipha study run ([\w-]+)", commands))
    assert studies and studies <= set(list_studies())


def test_the_tree_is_true() -> None:
    (tree,) = [block for block in _blocks("text") if "src/mipha/" in block]
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        for name in re.findall(
            r"[\w.\-/]+(?:/|\.\w+|file)(?=\s|$)|\.ci/run", re.split(r"\s{3,}", line.strip())[0]
        ):
            assert ROOT.joinpath(*(folder for _, folder in folders), name).exists(), (
                f"README's tree names {name}"
            )
            if name.endswith("/"):
                folders.append((indent, name))
