from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mipha.cli import app
from mipha.recipe import Recipe


def mipha(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three rows: a sound one, one whose picture is missing, one with an empty answer."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "a.png")
    rows = [("a.png", "red"), ("gone.png", "blue"), ("a.png", "")]
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"<image>\nwhich is {n}?"},
                {"role": "assistant", "content": answer},
            ],
            "images": [image],
        }
        for n, (image, answer) in enumerate(rows)
    ]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "my.jsonl"


@pytest.fixture
def recipe(tiny_run_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_run_recipe().dump())
    return path


def test_check_names_the_rows_writes_reports_and_fails(
    data: Path, recipe: Path, tmp_path: Path
) -> None:
    done = mipha(
        "check",
        data,
        "--recipe",
        recipe,
        "--json",
        tmp_path / "r.json",
        "--html",
        tmp_path / "r.html",
        "--fix",
        tmp_path / "ok.jsonl",
    )
    assert done.exit_code == 1, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert {finding["row"] for finding in report["findings"] if finding["severity"] == "error"} == {
        1,
        2,
    }
    assert "gone.png" in (tmp_path / "r.html").read_text()
    assert "1 rows kept in" in done.output
    again = mipha("check", tmp_path / "ok.jsonl")
    assert again.exit_code == 0, again.output


def test_show_a_row_as_the_model_sees_it(
    data: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mipha("show", data, "--row", 0, "--recipe", recipe)
    assert done.exit_code == 0, done.output
    assert "which is 0?" in done.output and "red" in done.output and "trained on" in done.output
    assert (tmp_path / "row-0-image-1.png").is_file()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """LLaVA's published file with one row, its image elsewhere."""
    folder = tmp_path / "llava"
    folder.mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "1.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    rows = [{"image": "1.png", "conversations": turns}]
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    return folder


def test_a_named_data_set_is_checked_and_shown_where_it_lies(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mipha("check", "llava_instruct", "--root", published)
    assert done.exit_code == 1 and "there is no file '1.png'" in " ".join(done.output.split())
    elsewhere = ("--root", published, "--image-root", tmp_path)
    done = mipha("check", "llava_instruct", *elsewhere)
    assert done.exit_code == 0 and "1 rows, 1 samples, 1 images" in done.output, done.output
    done = mipha("show", "llava_instruct", "--row", 0, *elsewhere)
    assert done.exit_code == 0 and "That." in done.output, done.output


def test_a_recipe_alone_checks_the_data_of_its_stages(
    tiny_run_recipe: Callable[..., Recipe], data: Path, published: Path, tmp_path: Path
) -> None:
    recipe = tiny_run_recipe(
        "stages.pretrain.data=" + str(data),
        "stages.finetune.data.dataset=llava_instruct",
        f"stages.finetune.data.root={published}",
        f"stages.finetune.data.image_root={tmp_path}",
    )
    (tmp_path / "two.yaml").write_text(recipe.dump())
    both = mipha("check", "--recipe", tmp_path / "two.yaml")
    assert both.exit_code == 1, "the first has errors"
    assert "my.jsonl" in both.output and "llava\n" in both.output
    assert both.output.count("optimizer steps") == 2, both.output
    second = mipha(
        "check", "--recipe", tmp_path / "two.yaml", "--stage", "finetune", "--json", tmp_path / "j"
    )
    assert second.exit_code == 0, second.output
    assert json.loads((tmp_path / "j").read_text())["data"] == "llava"
    refused = mipha("check", "--recipe", tmp_path / "two.yaml", "--json", tmp_path / "k")
    assert refused.exit_code == 2 and not (tmp_path / "k").exists()
    assert "--fix and --facts are written for one data set" in refused.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("check",), "give DATA, or only --recipe NAME"),
        (("check", "--recipe", "quickstart", "--root", "."), "give DATA, or only --recipe NAME"),
        (("check", "DATA", "--root", "."), "is for the name of a data set"),
        (("check", "llava_instruct"), "llava_instruct has no packaged copy: set the data's root"),
        (("show", "quickstart", "--root", "."), "give --row too"),
        (("check", "./nothing.jsonl"), "no data at nothing.jsonl"),
        (("show", "DATA", "--row", "9"), "has no row 9: it has 3 rows"),
        (("check", "DATA", "--recipe", "quickstart", "--stage", "third"), "no stage 'third'"),
        (("show", "quickstart", "--recipe", "quickstart"), "give --row too"),
    ],
)
def test_a_mistake_is_one_sentence(data: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = mipha(*(str(data) if word == "DATA" else word for word in arguments))
    assert done.exit_code == 2 and sentence in done.output
