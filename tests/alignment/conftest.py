"""Small data in the published layouts, and recipes that train a tiny language model on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import forked

if TYPE_CHECKING:
    from mipha.alignment.recipe import StepRecipe

forked.preload("mipha.alignment.dpo")

COLOURS = ("red", "blue", "green", "grey", "black", "white")


def instruction_records(number: int = 24) -> list[dict[str, str]]:
    """Alpaca's layout."""
    rows = [
        {
            "instruction": f"Which colour is shape {n}?",
            "input": "",
            "output": f"It is {COLOURS[n % 6]}.",
        }
        for n in range(number)
    ]
    rows[1]["input"] = "Look well at it."
    return rows


def preference_records(number: int = 24) -> list[dict[str, Any]]:
    """The layout of PKU-SafeRLHF-10K.

    Response 1 is better where the number is odd; the response that says no is unsafe and harmful.
    """
    rows = []
    for n in range(number):
        safe = [n % 3 != 0, n % 3 != 1]
        row = {"prompt": f"May I have the {COLOURS[n % 6]} circle {n}?"}
        row |= {
            f"response_{i}": ("yes" if safe[i] else "no") + f" to the {COLOURS[(n + i) % 6]} one"
            for i in (0, 1)
        }
        row |= {f"is_response_{i}_safe": safe[i] for i in (0, 1)}
        rows.append(row | {"better_response_id": n % 2, "safer_response_id": int(not safe[0])})
    return rows


@pytest.fixture(scope="session")
def alignment_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files `instructions` and `preferences`."""
    folder = tmp_path_factory.mktemp("alignment")
    paths = {"instructions": folder / "alpaca_data.json", "preferences": folder / "train.jsonl"}
    paths["instructions"].write_text(json.dumps(instruction_records()), encoding="utf-8")
    paths["preferences"].write_text(
        "".join(json.dumps(row) + "\n" for row in preference_records()), encoding="utf-8"
    )
    return paths


@pytest.fixture(scope="session")
def step_recipe(
    alignment_data: dict[str, Path], tiny_parts: Callable[..., Any]
) -> Callable[..., StepRecipe]:
    """`step_recipe("sft", "seed=1", ..., family=)`: six short steps on a tiny language model."""

    def recipe(step: str, *overrides: str, family: str = "llama") -> StepRecipe:
        from mipha.alignment.recipe import StepRecipe

        tree = {
            "name": "tiny",
            "step": step,
            "precision": "float32",
            "language_model": str(tiny_parts(family).language_model),
            "chat_template": "chatml",
            "data": str(alignment_data["instructions" if step == "sft" else "preferences"]),
            "held_out": 0.2,
            "max_tokens": 128,
            "learning_rate": 5e-3,
            "max_steps": 6,
            "epochs": 3,
            "batch_size": 4,
            "micro_batch": 2,
            "checkpoint_every": 2,
        }
        return StepRecipe.parse(tree, source="tiny").override(*overrides)

    return recipe


KILLED_MID_SAVE = """
import os, signal, sys, pathlib, torch
save = torch.save
def save_or_die(content, path, *rest, **options):
    if "checkpoint-4" in str(path):  # its weights are written, its optimizer is not
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, path, *rest, **options)
torch.save = save_or_die
from mipha.alignment import train_step
from mipha.alignment.recipe import load_alignment_recipe
train_step(load_alignment_recipe(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.fixture
def kill_mid_save(tmp_path: Path) -> Callable[[StepRecipe, Path], None]:
    """Begin a step in a process of its own, which is killed while it saves its fourth state."""

    def begin(recipe: StepRecipe, out: Path) -> None:
        (tmp_path / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
        (tmp_path / "killed.py").write_text(KILLED_MID_SAVE, encoding="utf-8")
        command = [tmp_path / "killed.py", tmp_path / "recipe.yaml", out]
        killed = forked.start(command, tmp_path / "said.txt")
        killed.join()
        assert killed.exitcode == -9, (tmp_path / "said.txt").read_text()[-2000:]

    return begin


@pytest.fixture(scope="session")
def finished(
    step_recipe: Callable[..., StepRecipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`finished("sft", "tuning=lora", ..., family=)`: a step's folder, trained once a session."""
    from mipha.alignment import train_step

    made: dict[object, Path] = {}

    def folder(step: str, *overrides: str, family: str = "llama") -> Path:
        key = (step, overrides, family)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(step) / "run"
            train_step(step_recipe(step, *overrides, family=family), made[key])
        return made[key]

    return folder
