"""The scripts, the commands in their order and the formats of docs/own-data.md, with tiny parts."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from typer.testing import CliRunner

from mipha.cli import app
from mipha.data.dataset import list_datasets
from mipha.data.datasets.auto import detect
from mipha.recipe import Recipe, load_recipe

TEXT = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(
    r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE
)
TABLE = re.findall(r"^\| (.+?) \| (.+?) \| `(\w+)` \|$", TEXT, flags=re.MULTILINE)

# The tutorial makes 1000 images to learn from and 100 to ask about; here it has fewer.
NUM_IMAGES, NUM_ASKED = 300, 40

needs_package = pytest.mark.skipif(
    find_spec("easy_vqa") is None, reason="easy-vqa is not installed: make install"
)


class Tour(NamedTuple):
    """The folder that the tutorial leaves, and what each of its commands said."""

    folder: Path
    said: dict[str, str]

    def output(self, start: str) -> str:
        """What the one command that begins so said, on one line."""
        (output,) = [output for command, output in self.said.items() if command.startswith(start)]
        return " ".join(output.split())


@pytest.fixture(scope="module")
def tour(
    tmp_path_factory: pytest.TempPathFactory, tiny_run_recipe: Callable[..., Recipe]
) -> Iterator[Tour]:
    """Every block of the tutorial, from top to bottom, in a new folder."""
    folder = tmp_path_factory.mktemp("own-data")
    tiny = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    tiny.write_text(tiny_run_recipe().dump(), encoding="utf-8")
    said: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        for language, block in BLOCKS:
            if language == "python":
                name = re.match(r"# (\w+\.py)\n", block)
                assert name, f"the script does not begin with its name:\n{block}"
                Path(name[1]).write_text(_with_fewer_images(block, name[1]), encoding="utf-8")
            elif language == "bash":
                for line in _commands(block):
                    said[line] = _run(line, tiny)
        yield Tour(folder, said)


def _commands(block: str) -> list[str]:
    """The commands of a block; a line that ends in a backslash goes on in the next."""
    return block.replace("\\\n", "").splitlines()


def _with_fewer_images(script: str, name: str) -> str:
    if name != "prepare.py":
        return script
    assert script.count(", 1000\n") == script.count("    100,\n") == 1
    return script.replace(", 1000\n", f", {NUM_IMAGES}\n").replace(
        "    100,\n", f"    {NUM_ASKED},\n"
    )


def _run(line: str, tiny: Path) -> str:
    """One command, in this process; its exit code is 0, or the one that its comment tells."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "mkdir":
        for name in arguments:
            Path(name).mkdir()
        return ""
    if program == "python":
        with contextlib.redirect_stdout(io.StringIO()) as output:
            runpy.run_path(*arguments, run_name="__main__")
        return output.getvalue()
    assert program == "mipha", line
    arguments = [str(tiny) if argument == "quickstart" else argument for argument in arguments]
    asked = "what color is the shape?\n/quit\n" if arguments[0] == "chat" else None
    done = CliRunner().invoke(app, arguments, input=asked, catch_exceptions=False)
    told = re.search(r"# exit code (\d)", line)
    assert done.exit_code == (int(told[1]) if told else 0), f"{line}\n{done.output}"
    return done.output


@needs_package
def test_the_check_finds_the_two_broken_rows_and_the_copy_is_without_them(tour: Tour) -> None:
    rows = (tour.folder / "my.jsonl").read_text().splitlines()
    assert (
        len(rows) == 2 * NUM_IMAGES + 2
        and len((tour.folder / "test.jsonl").read_text().splitlines()) == 2 * NUM_ASKED
    )
    assert (
        len(list((tour.folder / "pictures").glob("*.png")))
        == len(list((tour.folder / "pictures").glob("*.txt")))
        == NUM_IMAGES
    )
    found = tour.output("mipha check ./my.jsonl --recipe")
    assert (
        "my.jsonl is read as table" in found
        and "2 errors, 0 warnings" in found
        and "guessed without the image" in found
    )
    assert (
        f"error 1 {2 * NUM_IMAGES} missing image files" in found
        and f"error 1 {2 * NUM_IMAGES + 1} rows that are no conversation" in found
    )
    page = html.unescape(
        re.sub("<[^>]*>", "", (tour.folder / "report.html").read_text(encoding="utf-8"))
    )
    assert "pictures/gone.png" in page and f"{json.loads(rows[0])['question']}<|im_end|>" in page
    assert (tour.folder / "clean.jsonl").read_text().splitlines() == rows[:-2]
    assert len((tour.folder / "clean.jsonl.changes.txt").read_text().splitlines()) == 2
    again = tour.output("mipha check ./clean.jsonl")
    assert "compared with test.jsonl" in again and "0 errors, 0 warnings" in again
    assert "pictures is read as image_folder" in tour.output("mipha check ./pictures")


@needs_package
def test_a_row_is_shown_with_its_picture(tour: Tour) -> None:
    row = json.loads((tour.folder / "clean.jsonl").read_text().splitlines()[0])
    shown = tour.output("mipha show")
    assert (
        f"{row['question']}<|im_end|>" in shown
        and f"{row['answer']}<|im_end|>" in shown
        and row["image"] in shown
    )
    with Image.open(tour.folder / "row-0-image-1.png") as image:
        assert image.size == (28, 28)  # the tiny tower's


@needs_package
def test_the_trained_model_is_asked_and_chats(tour: Tour) -> None:
    assert "/mine/finetune" in tour.output("mipha train quickstart -o runs/mine")
    scores = re.findall(r"(pictures|grey): (\d+) of (\d+) right", tour.output("python ask.py"))
    assert [name for name, *_ in scores] == ["pictures", "grey"]
    assert all(0 <= int(num_right) <= int(total) == 2 * NUM_ASKED for _, num_right, total in scores)
    _, answer, *_ = tour.output("mipha chat runs/mine --image").split("> ")
    assert answer.strip() and "no image" not in answer


@needs_package
def test_the_model_is_tuned_further_and_its_adapter_is_used_alone(tour: Tour) -> None:
    said = tour.output("mipha tune")
    for words in (
        f"data: {2 * NUM_IMAGES} samples",
        "held out: 10% of the images",
        "before and after",
    ):
        assert words in said
    assert "tuned: runs/tuned/tune/checkpoint" in said
    assert (tour.folder / "runs/tuned/tuned.json").is_file()
    assert (tour.folder / "my-adapter/adapter_model.safetensors").is_file()
    _, answer, *_ = tour.output("mipha chat runs/mine --adapter").split("> ")
    assert answer.strip()


@needs_package
def test_a_mixture_counts_its_sources(tour: Tour) -> None:
    steps = [
        json.loads(line)
        for line in (tour.folder / "runs/mixed/finetune/metrics.jsonl").read_text().splitlines()
    ]
    shown = {
        source: sum(step[f"samples/{source}"] for step in steps)
        for source in ("clean.jsonl", "easy_vqa")
    }
    assert sum(shown.values()) == sum(step["samples"] for step in steps)
    assert shown["clean.jsonl"] > shown["easy_vqa"] > 0  # 1,200 against 500 in an epoch


def test_the_commands_fit_the_quickstart_which_they_name() -> None:
    commands = [
        line for language, block in BLOCKS if language == "bash" for line in _commands(block)
    ]
    trained = [
        shlex.split(line, comments=True)
        for line in commands
        if line.startswith("mipha train quickstart")
    ]
    assert len(trained) == 2
    for words in trained:
        recipe = load_recipe("quickstart").override(*words[5:])
        assert str(recipe.stages["finetune"].data[0].root) == "clean.jsonl"
    outside_blocks = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert not re.search("`(mipha|python) ", outside_blocks), "a command that is not run here"


def test_the_formats_are_read_as_the_table_says(tmp_path: Path) -> None:
    shown = 0
    for files, record, dataset in TABLE:
        assert dataset in list_datasets()
        if not record.startswith("`{"):
            continue
        content = json.loads(record.strip("`"))
        for suffix in re.findall(r"`(\.\w+)`", files):
            file = tmp_path / f"own{suffix}"
            if suffix in (".csv", ".tsv"):
                separator = "," if suffix == ".csv" else "\t"
                file.write_text(
                    "\n".join(separator.join(words) for words in (content, content.values())) + "\n"
                )
            else:
                file.write_text(json.dumps([content] if suffix == ".json" else content))
            assert detect(file)[0] == dataset, (suffix, record)
            shown += 1
    own = {
        "messages",
        "llava",
        "sharegpt",
        "table",
        "texts",
        "documents",
        "image_folder",
        "parquet",
        "arrow",
        "webdataset",
    }
    assert {dataset for *_, dataset in TABLE} == own and shown == 18
