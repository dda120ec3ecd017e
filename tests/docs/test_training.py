"""docs/training.md: its recipes load; its tables have every key and every file of a run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from mipha import api
from mipha.files import read_lines
from mipha.geometry import Anyres, Native, Shuffled, Square, Tiles
from mipha.recipe import (
    CheckpointRecipe,
    DataRecipe,
    DpoStageRecipe,
    ModelRecipe,
    Recipe,
    StageRecipe,
    TuningRecipe,
    load_recipe,
)
from mipha.run import Run

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
TWO, ONE, THIRD, PREFER, FURTHER, PICTURES = re.findall(
    r"^```yaml\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE
)


def _section(title: str) -> str:
    """Return the text between a heading and the next one."""
    return re.search(rf"^##+ {title}\n(.*?)(?=^##|\Z)", TEXT, flags=re.DOTALL | re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        (TWO, ["pretrain", "finetune"]),
        (ONE, ["train"]),
        (TWO + THIRD, ["pretrain", "finetune", "polish"]),
        (TWO + PREFER, ["pretrain", "finetune", "prefer"]),
    ],
    ids=["two", "one", "three", "preferences"],
)
def test_the_recipes_load(text: str, stages: list[str], tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(path)
    assert list(recipe.stages) == stages
    assert recipe.model == load_recipe("quickstart").model.model_copy(
        update={"pad_to_square": True, "calibrate_projector": False}
    )


def test_a_recipe_that_starts_from_a_checkpoint_loads(tmp_path: Path) -> None:
    path = tmp_path / "further.yaml"
    path.write_text(FURTHER)
    assert load_recipe(path).model == CheckpointRecipe(checkpoint="runs/quickstart")


@pytest.mark.parametrize(
    ("title", "schema"),
    [
        ("Recipe", Recipe),
        ("Model", ModelRecipe),
        ("Checkpoint", CheckpointRecipe),
        ("Stage", StageRecipe),
        ("Dpo stage", DpoStageRecipe),
        ("Tuning", TuningRecipe),
        ("Data", DataRecipe),
    ],
)
def test_every_key_has_its_row_with_its_default(title: str, schema: type) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (required|`[^`]*`) \|", _section(title), flags=re.MULTILINE)
    said = {
        key: default if default == "required" else yaml.safe_load(default.strip("`"))
        for key, default in rows
    }
    assert said == {
        name: "required" if field.is_required() else _plain(field.default)
        for name, field in schema.model_fields.items()
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@pytest.fixture(scope="module")
def run(
    tiny_run_recipe: Callable[..., Recipe],
    tiny_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A finished run that leaves as many kinds of files as one run can."""
    data = tmp_path_factory.mktemp("data")
    shutil.copytree(tiny_data.parent, data, dirs_exist_ok=True)
    (data / "1.png").write_bytes(b"not an image")
    recipe = tiny_run_recipe(
        "stages.pretrain.tuning.language_model=lora",
        "stages.pretrain.tuning.lora={rank: 2, alpha: 4}",
        "stages.finetune.max_steps=4",
        "stages.finetune.held_out=0.3",
        "stages.pretrain.unreadable_images=substitute",
        "stages.finetune.unreadable_images=substitute",
        data=data / "train.jsonl",
    )
    run = api.train(recipe, tmp_path_factory.mktemp("run") / "own")
    if find_spec("easy_vqa") is not None:
        api.evaluate(run, ["easy_vqa"], limit=2, progress=False)
    return run


def test_the_list_has_every_file_of_a_run_and_no_other(run: Run) -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", _section("The run folder"), flags=re.MULTILINE)
    patterns = {row: re.compile(_pattern(row)) for row in rows}
    files = [
        path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()
    ]

    listed = {
        file: [row for row, pattern in patterns.items() if pattern.fullmatch(file)]
        for file in files
    }
    assert [file for file, of in listed.items() if not of] == []
    found = {row for of in listed.values() for row in of}

    # Files of other circumstances: a run in progress, a failure, an option, a study.
    other = {"nonfinite.json", "wandb/", "states/", "dpo/"}
    absent = {f"<stage>/{name}" for name in other} | {"judge-replies.jsonl", "panel.jsonl"}
    if find_spec("tensorboard") is None:
        absent.add("<stage>/tensorboard/")
    if find_spec("easy_vqa") is None:
        absent.add("evaluation/<benchmark>/")
    assert set(rows) - found == absent


def _pattern(row: str) -> str:
    """Return the pattern of the files that a row stands for; a folder stands for all in it."""
    return re.sub("<[^>]+>", "[^/]+", re.sub(r"\.", r"\.", row)) + ".+" * row.endswith("/")


def test_every_key_of_the_metrics_is_explained(run: Run) -> None:
    rows = re.findall(r"^\| (`[^|]+) \|", _section("Watch and resume a run"), flags=re.MULTILINE)
    keys = {key for row in rows for key in re.findall("`([^`]+)`", row)}
    patterns = [re.compile(_pattern(key)) for key in keys]
    found = {
        key
        for stage in run.recipe.stages
        for line in read_lines(run.metrics(stage))
        for key in line
    }
    assert [key for key in found if not any(one.fullmatch(key) for one in patterns)] == []

    # One data set has no counts of its own, and the peak of this device may not be known.
    named = {one.pattern for one in patterns if any(one.fullmatch(key) for key in found)}
    absent = {one.pattern for one in patterns} - named
    assert absent <= {"samples/[^/]+", "mfu_percent"}


def test_the_checkpoint_has_the_files_that_the_text_names(run: Run) -> None:
    text = _section("The run folder").partition("`checkpoint/` is a standard")[2]
    names = set(re.findall(r"`([\w.]+\.\w+)`", text))
    assert {"config.json", "README.md"} < names
    assert names <= {path.name for path in run.final_checkpoint().iterdir()}
    assert not (run.checkpoint("pretrain") / "README.md").exists()


def test_the_tokens_of_pictures_are_those_of_the_classes() -> None:
    model = ModelRecipe(**yaml.safe_load(PICTURES)["model"])
    assert (model.image, model.shuffle, model.tiles) == ("tiles", 3, 4)
    grids = [(384 * rows, 384 * wide) for rows in range(1, 5) for wide in range(1, 4 // rows + 1)]
    geometries = [
        Square(384, 576),
        Tiles(256, 64, 4),
        Shuffled(512, 64, 1024),
        Anyres(384, 24, tuple(grids)),
        Native(512, 16, 2, 64, 256, 1, 1),
    ]
    rows = re.findall(
        r"^\| (?:\d+/)?\d+, `.*\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$",
        _section("What an image becomes"),
        flags=re.MULTILINE,
    )
    sizes = ((336, 336), (640, 480), (1000, 300), (4000, 3000))
    assert rows == [
        tuple(str(geometry.span(*size).num_image_tokens) for size in sizes)
        for geometry in geometries
    ]
