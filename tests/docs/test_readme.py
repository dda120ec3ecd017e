"""The README says what is there: its tree, its Python names, its verbs; its commands run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import mipha
from mipha import recipe
from mipha.alignment import recipe as alignment_recipe
from mipha.alignment.recipe import load_alignment_recipe
from mipha.cli import app
from mipha.recipe import Recipe, list_recipes, load_recipe
from mipha.studies.study import list_studies
from tests.models.test_upstream import UPSTREAM, released

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


EXCLUDED = {
    "make quickstart": "tests/e2e/test_quickstart.py runs a short one (slow)",
    "make test": "this is it",
    "mipha quickstart --baselines": "tests/e2e/test_quickstart.py runs a short one (slow)",
    "mipha quickstart --photos ./photographs": "tests/test_photographs.py splits some",
    "mipha quickstart --photos tuxpaint": "it needs a package of Debian's",
    "mipha serve runs/seed-7": "it does not end; tests/deploy/serve/test_engine.py starts it",
    "torchrun --nproc-per-node 8": "tests/training/test_shard.py runs two and four processes",
}
"""Commands that are not run here, and where they are."""


@pytest.mark.slow
@pytest.mark.weights
def test_the_commands_run_in_a_fresh_folder(
    readme_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order. Recipes of the same names stand in, with tiny parts and short stages."""
    monkeypatch.chdir(readme_folder)
    left = dict(EXCLUDED)
    for block in _blocks("bash"):
        for line in block.splitlines():
            if skipped := next((start for start in left if line.startswith(start)), None):
                del left[skipped]
                continue
            program, *arguments = shlex.split(line, comments=True)
            assert program == "mipha", line

            # What a visitor has by then: a second run to compare with.
            if arguments[0] == "compare":
                shutil.copytree("runs/seed-7", "runs/seed-8")
            if arguments[0] == "evaluate":
                arguments += ["--limit", "4"]
            if arguments[0] == "study":  # tests/studies trains a tiny one
                arguments.append("--dry-run")
            asked = "what is it?\n/quit\n" if arguments[0] == "chat" else None
            done = CliRunner().invoke(app, arguments, input=asked, catch_exceptions=False)
            assert done.exit_code == 0, f"{line}\n{done.output}"
    assert not left, f"no longer in the README: {left}"


@pytest.fixture
def readme_folder(
    tmp_path: Path,
    tiny_run_recipe: Callable[..., Recipe],
    tiny_parts: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Return a folder with the files that the README's commands name, and tiny recipes."""
    recipes, aligned = tmp_path / "recipes", tmp_path / "alignment"
    shutil.copytree(recipe.RECIPES, recipes)
    shutil.copytree(alignment_recipe.RECIPES, aligned)
    for name, tower in (("quickstart", "dinov2"), ("quickstart-siglip", "siglip")):
        tiny = tiny_run_recipe("stages.finetune.max_steps=1", family="qwen2", tower=tower)
        (recipes / f"{name}.yaml").write_text(tiny.override(f"name={name}").dump())
    sft = load_alignment_recipe("phi-2-sft").override(
        f"language_model={tiny_parts('phi').language_model}",
        "chat_template=vicuna",
        "max_steps=1",
        "batch_size=2",
        "micro_batch=1",
    )
    (aligned / "phi-2-sft.yaml").write_text(sft.dump())
    monkeypatch.setattr(recipe, "RECIPES", recipes)
    monkeypatch.setattr(alignment_recipe, "RECIPES", aligned)

    # The visitor's own files.
    folder = tmp_path / "fresh"
    folder.mkdir()
    released("up_phi_siglip", folder / "Mipha-3B", UPSTREAM / "toy_codegen_tokenizer", 3100)
    Image.new("RGB", (40, 30), "red").save(folder / "image.png")
    rows = [
        {"image": f"{n}.png", "question": f"what is {n}?", "answer": f"shape {n}"}
        for n in range(60)
    ]
    for n in range(60):
        Image.new("RGB", (64, 64), (4 * n, 99, 5)).save(folder / f"{n}.png")
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alpaca = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(60)]
    (folder / "alpaca_data.json").write_text(json.dumps(alpaca))
    return folder
