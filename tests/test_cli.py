from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mipha import recipe as recipe_module
from mipha.alignment.recipe import load_alignment_recipe
from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.cli import app, catalog
from mipha.evaluation.benchmark import list_benchmarks
from mipha.recipe import list_recipes, load_recipe
from mipha.run import create_run
from mipha.studies.study import load_study


def invoke(*arguments: str, **options: Any) -> Any:
    return CliRunner().invoke(app, list(arguments), **options)


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-m", "mipha", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def cpu_seconds_of_help() -> float:
    before = os.times()
    assert program("--help").returncode == 0
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


def test_help_is_instant() -> None:
    assert min(cpu_seconds_of_help() for _ in range(3)) < 0.5, (
        "something heavy is imported at the top of a light module"
    )


def test_list_names_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = invoke("list")
    assert shown.exit_code == 0
    for name in (*list_recipes(), *LANGUAGE_MODELS, "siglip-so400m-384", *list_benchmarks()):
        assert name in shown.stdout


def test_list_is_short_and_says_where_more_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = invoke("list").stdout.splitlines()
    assert len(lines) < 45 and "mipha list KIND" in lines[-1]


def test_show_takes_a_run_and_says_how_data_are_shown(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart").override("seed=5")
    create_run(tmp_path / "run", recipe)
    assert yaml.safe_load(invoke("show", str(tmp_path / "run")).stdout)["seed"] == 5
    data = tmp_path / "mine.jsonl"
    data.write_text("{}\n")
    wrong = invoke("show", str(data))
    assert wrong.exit_code == 2 and "give --row 0" in wrong.stderr


def test_show_a_recipe_a_part_and_neither() -> None:
    assert yaml.safe_load(invoke("show", "quickstart").stdout) == load_recipe(
        "quickstart"
    ).model_dump(mode="json")
    assert yaml.safe_load(invoke("show", "phi-2").stdout)["phi-2"]["path"] == "microsoft/phi-2"
    wrong = invoke("show", "phi2")
    assert wrong.exit_code == 2 and "did you mean phi-2" in wrong.stderr


def test_a_users_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    for arguments, sentence in (
        (
            ("train", "quickstar", "-o", str(tmp_path / "a")),
            "mipha: no recipe 'quickstar': did you mean quickstart",
        ),
        (("train", "quickstart", "seed", "-o", str(tmp_path / "a")), "has no `=`"),
        (("evaluate", str(tmp_path / "none"), "-b", "easy_vqa"), "no run or model folder"),
        (("chat", str(tmp_path)), "neither a run"),
    ):
        done = program(*arguments)
        assert done.returncode == 2 and sentence in done.stderr and done.stdout == ""
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "a").exists()


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in program("--debug", "show", "nothing").stderr
    assert "Traceback" in program("show", "nothing", MIPHA_DEBUG="1").stderr


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "stopped; run the same command again to go on"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            2,
            "the package 'peft' is not installed: pip install peft",
        ),
        (ModuleNotFoundError("that needs mipha[web]", name="gradio"), 2, "that needs mipha[web]"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/a"),
            2,
            "the disk is full (/runs/a): free some space and run the same",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/model/a", None, "/full/a"),
            2,
            "the disk is full (/full/a): free some space",
        ),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "/.a.7.tmp", None, "/a"),
            2,
            "mipha: Is a directory: /a\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/runs/a"),
            2,
            "mipha: Permission denied: /runs/a\n",
        ),
        (FloatingPointError("step 3: loss nan"), 2, "mipha: step 3: loss nan\n"),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
            2,
            "the accelerator's memory is full",
        ),
    ],
)
def test_each_kind_of_failure(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, sentence: str
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(recipe_module, "load_recipe", fail)
    done = invoke("show", "quickstart")
    assert done.exit_code == code and sentence in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        TypeError("ours"),
        RuntimeError("ours"),
        ModuleNotFoundError("No module named 'mipha.x'", name="mipha.x"),
    ],
)
def test_our_own_mistakes_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(recipe_module, "load_recipe", fail)
    done = invoke("show", "quickstart")
    assert done.exception is error and done.stderr == ""


def test_train_gives_the_overridden_recipe_to_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def train(recipe: Any, folder: Path, track: list[str], **options: Any) -> Any:
        calls.append((recipe, folder, track))
        return SimpleNamespace(final_checkpoint=lambda: folder / "finetune" / "checkpoint")

    monkeypatch.setattr("mipha.engine.trackers.check_trackers", lambda names: None)
    monkeypatch.setitem(sys.modules, "mipha.training.pipeline", SimpleNamespace(train=train))  # type: ignore[arg-type]
    cards: list[Path] = []
    card = SimpleNamespace(write_model_card=lambda checkpoint, run: cards.append(checkpoint))
    monkeypatch.setitem(sys.modules, "mipha.deploy.model_card", card)  # type: ignore[arg-type]
    done = invoke(
        "train",
        "quickstart",
        "seed=7",
        "-o",
        str(tmp_path),
        "stages.finetune.learning_rate=1e-4",
        "--track",
        "wandb, trackio",
    )
    assert done.exit_code == 0 and str(tmp_path / "finetune" / "checkpoint") in done.stdout
    ((recipe, folder, track),) = calls
    assert (recipe.seed, recipe.stages["finetune"].learning_rate, folder, track) == (
        7,
        1e-4,
        tmp_path,
        ["wandb", "trackio"],
    )
    assert cards == [tmp_path / "finetune" / "checkpoint"]


class FakeSession:
    def __init__(self, image: Path | None) -> None:
        self.image, self.turns = image, 0

    def ask(self, question: str) -> Any:
        self.turns += 1
        if question == "fail":
            raise ValueError("image cannot be read")
        yield from (f"turn {self.turns} ", f"on {self.image and self.image.name}")


def test_chat_keeps_the_conversation_until_reset_or_another_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for name in ("a.png", "b c.png"):
        (tmp_path / name).write_bytes(b"")
    fake = SimpleNamespace(load=lambda path, **options: SimpleNamespace(chat=FakeSession))
    monkeypatch.setitem(sys.modules, "mipha.assistant", fake)  # type: ignore[arg-type]
    typed = [
        "hello",
        "again",
        "/reset",
        "new",
        f"/image {tmp_path / 'b c.png'}",
        "look",
        "fail",
        "/image nope.png",
        "/help",
        "",
        "more",
        "/quit",
        "x",
    ]
    done = invoke("chat", str(tmp_path), "--image", str(tmp_path / "a.png"), input="\n".join(typed))
    assert done.exit_code == 0, done.stderr
    said = [line.replace("> ", "") for line in done.stdout.splitlines()[1:-1]]
    assert said == [
        "turn 1 on a.png",
        "turn 2 on a.png",
        "turn 1 on a.png",
        "turn 1 on b c.png",
        "image cannot be read",
        "no image nope.png",
        "no command /help: /image PATH, /reset or /quit",
        "turn 3 on b c.png",
    ]
    assert invoke("chat", str(tmp_path), input="hi\n").exit_code == 0, "the end of the input leaves"
    missing = invoke("chat", str(tmp_path), "--image", "nope.png")
    assert missing.exit_code == 2 and "no image nope.png" in missing.stderr


def catalog_names() -> list[str]:
    """Every name that `mipha list` shows."""
    return [name for kind in catalog._kinds().values() for name in kind.names]


@pytest.mark.parametrize("name", catalog_names())
def test_whatever_is_listed_can_be_shown(name: str) -> None:
    shown = invoke("show", name)
    assert shown.exit_code == 0 and len(shown.stdout) > 20, shown.stderr


def test_what_is_shown_can_be_read_back(tmp_path: Path) -> None:
    """A complete study, recipe or alignment recipe to change and use."""
    for name, load in (
        ("freezing", load_study),
        ("quickstart", load_recipe),
        ("phi-2-sft", load_alignment_recipe),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_text(invoke("show", name).stdout, encoding="utf-8")
        assert load(path) == load(name)
        assert invoke("show", str(path)).stdout == path.read_text(encoding="utf-8")


def test_a_name_that_stands_for_two_things_shows_both() -> None:
    shown = invoke("show", "easy_vqa").stdout
    assert "# dataset easy_vqa" in shown and "# benchmark easy_vqa" in shown


@pytest.mark.parametrize("kind", ["vision-tower", "vision_tower", "vision towers"])
def test_list_filters_by_kind(kind: str) -> None:
    shown = invoke("list", kind).stdout
    assert "siglip-so400m-384" in shown and "phi-2" not in shown


def test_list_takes_the_plural_of_a_kind() -> None:
    assert invoke("list", "studies").stdout == invoke("list", "study").stdout
    assert "freezing" in invoke("list", "studies").stdout


def test_unknown_names_and_kinds_are_one_sentence() -> None:
    wrong = invoke("list", "recipe-alignment")
    assert wrong.exit_code == 2 and "no kind 'recipe-alignment': did you mean" in wrong.stderr
    far = invoke("show", "zzzzzz")
    assert far.exit_code == 2 and far.stderr == (
        "mipha: the catalog has no 'zzzzzz': `mipha list` shows what there is\n"
    )


@pytest.mark.parametrize("arguments", [["-h"], ["show", "-h"], ["study", "run", "-h"]])
def test_h_is_help(arguments: list[str]) -> None:
    shown = invoke(*arguments)
    assert shown.exit_code == 0 and shown.stdout == invoke(*arguments[:-1], "--help").stdout
