"""The README says what is there: its tree, its Python names, its verbs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mipha
from mipha.cli import app
from mipha.recipe import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_use_public_names() -> None:
    (block,) = _blocks("python")
    names = {
        node.attr for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "mipha"
    }
    assert names >= {"load_recipe", "train", "evaluate", "load"}
    for name in names:
        assert callable(getattr(mipha, name))


def test_overrides_in_the_text_are_valid() -> None:
    assignments = {word for word in re.findall(r"[\w.]+=[^\s\"`)]+", "\n".join(_blocks("bash") + _blocks("python"))) if word[0].islower()}
    assert {"seed=7", "data.finetune=./mine.jsonl"} <= assignments
    for assignment in assignments:
        load_recipe("quickstart").override(assignment)


def test_verbs_exist() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    used = set(re.findall(r"^(?:.*-m )?mipha (\w+)", "\n".join(_blocks("bash")), flags=re.MULTILINE))
    assert used and used <= verbs


def test_the_tree_is_true() -> None:
    (tree,) = [block for block in _blocks("text") if "src/mipha/" in block]
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        for name in re.findall(r"[\w.\-/]+(?:/|\.\w+|file)(?=\s|$)|\.ci/run", re.split(r"\s{3,}", line.strip())[0]):
            assert ROOT.joinpath(*(folder for _, folder in folders), name).exists(), f"README's tree names {name}"
            if name.endswith("/"):
                folders.append((indent, name))
