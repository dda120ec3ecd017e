"""A user's own data: a bare path in any format, `mipha train`, and a checkpoint that answers."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mipha.assistant import load
from mipha.cli import app
from mipha.data.mixture import Mixture
from mipha.recipe import Recipe
from mipha.run import Run
from mipha.training.pipeline import train

SAVED = Path(__file__).parents[1] / "data" / "datasets" / "saved_by_datasets"
COLOURS = ("red", "blue", "green", "grey")
TURNS = [
    {"role": "user", "content": "Which colour?"},
    {"role": "assistant", "content": "It is red."},
]
LLAVA = {
    "image": "red.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhich colour?"},
        {"from": "gpt", "value": "red"},
    ],
}
CMYK_OR_GREY = {"red": "RGB", "blue": "CMYK", "green": "P", "grey": "L"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a folder with the same four images in every format of own data."""
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        Image.new("RGB", (24, 20), colour).convert(CMYK_OR_GREY[colour]).save(
            tmp_path / f"{colour}.{'jpg' if colour == 'blue' else 'png'}"
        )
    (tmp_path / "blue.jpg").rename(tmp_path / "blue.png")

    rows = [{"messages": TURNS, "images": [f"{colour}.png"]} for colour in COLOURS]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"messages": TURNS}])))
    (tmp_path / "llava.json").write_text(json.dumps([LLAVA] * 3))
    (tmp_path / "share.jsonl").write_text(
        json.dumps(LLAVA | {"image": ["red.png"], "system": "Be brief."})
    )
    (tmp_path / "table.csv").write_text(
        "image,question,answer\n" + "".join(f"{c}.png,Which colour?,{c}\n" for c in COLOURS)
    )

    (tmp_path / "captions").mkdir()
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for colour in COLOURS:
            shutil.copy(tmp_path / f"{colour}.png", tmp_path / "captions")
            (tmp_path / f"captions/{colour}.txt").write_text(f"a {colour} picture")
            tar.add(tmp_path / f"{colour}.png", f"{colour}.png")
            member = tarfile.TarInfo(f"{colour}.txt")
            member.size = len(colour)
            tar.addfile(member, io.BytesIO(colour.encode()))
    return tmp_path


def test_a_bare_path_is_all_it_takes(
    home: Path, tiny_run_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (home / "tiny.yaml").write_text(
        tiny_run_recipe("stages.pretrain.max_steps=1", "stages.finetune.max_steps=2").dump()
    )

    arguments = [
        "train",
        "tiny.yaml",
        "data.pretrain=./captions",
        "data.finetune=./my.jsonl",
        "-o",
        "runs/x",
    ]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "captions is read as image_folder: images with a caption in a .txt beside each" in said
    assert "my.jsonl is read as messages: conversations whose turns have a role and content" in said
    assert (
        load(Run(home / "runs/x"))
        .answer(home / "red.png", "Which colour?", max_new_tokens=3)
        .num_tokens
        > 0
    )


def test_an_image_that_is_missing_or_elsewhere_stops_before_the_first_step(
    home: Path, tiny_run_recipe: Callable[..., Recipe]
) -> None:
    (home / "tiny.yaml").write_text(tiny_run_recipe().dump())
    for image, sentence in (
        ("gone.png", "1 of 1 image files are missing"),
        ("/etc/passwd", "bad.jsonl, line 1: the image path '/etc/passwd' leads out"),
    ):
        (home / "bad.jsonl").write_text(json.dumps({"messages": TURNS, "images": [image]}))
        done = CliRunner().invoke(
            app, ["train", "tiny.yaml", "data.finetune=./bad.jsonl", "-o", f"runs/{len(image)}"]
        )
        assert isinstance(done.exception, (ValueError, FileNotFoundError, SystemExit))
        assert sentence in f"{done.exception} {done.output} {done.stderr}"


@pytest.mark.parametrize("batching", ["packed", "shared-image"])
def test_every_format_in_one_mixture(
    home: Path, tiny_run_recipe: Callable[..., Recipe], batching: str
) -> None:
    paths = ["my.jsonl", "llava.json", "share.jsonl", "table.csv", "captions", "shard.tar"]
    paths += (
        [
            str(SAVED / name)
            for name in ("splits", "messages", "questions.parquet", "messages.parquet")
        ]
        if find_spec("pyarrow")
        else []
    )
    data = ", ".join(
        f"{{dataset: auto, root: ./{path}}}"
        if "/" not in path
        else f"{{dataset: auto, root: {path}}}"
        for path in paths
    )
    recipe = tiny_run_recipe(
        f"data.finetune=[{data}]",
        "stages.finetune.batch_size=40",
        f"stages.finetune.batching={batching}",
        "stages.finetune.epochs=1",
    ).override("stages.pretrain.max_steps=1")

    size = len(Mixture(recipe.stages["finetune"].data))
    assert size == 5 + 3 + 1 + 4 + 4 + 4 + (3 + 3 + 3 + 3 if find_spec("pyarrow") else 0)

    run = train(recipe, home / "run")
    rows = [json.loads(line) for line in run.metrics("finetune").read_text().splitlines()]
    num_images = 4 + 3 + 1 + 4 + 4 + 4 + (2 + 3 + 2 + 3 if find_spec("pyarrow") else 0)
    assert len(rows) == 1 and rows[0]["samples"] == size and rows[0]["loss"] > 0
    assert (
        rows[0]["images"] == num_images
        if batching == "packed"
        else 4 < rows[0]["images"] < num_images
    )
