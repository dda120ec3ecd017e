"""One sample as the model sees it: what is coloured is what is trained on, token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mipha.data.dataset import LoadedData, data_recipe, load_data
from mipha.data.regions import as_region
from mipha.data.show import draw_regions, render, save_pixels, view_sample, visible
from mipha.recipe import StageRecipe
from mipha.terminal import Console


@pytest.fixture
def source(tmp_path: Path) -> LoadedData:
    Image.new("RGB", (40, 20), (200, 30, 60)).save(tmp_path / "red.png")
    rows = [
        ("<image>\nWhich colour?", "Crimson, “así” 🫖."),
        ("Hello?", "Hello."),
        ("<image>\nWhich colour?", "red " * 300),
        ("Hello?", "half \ud83d"),
        ("Hello?", "bell \x07 [bold]and brackets[/bold]"),
    ]
    lines = [
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": said},
            ],
            "images": ["red.png"] * ("<image>" in asked),
        }
        for asked, said in rows
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return load_data(data_recipe(str(tmp_path / "rows.jsonl")))


@pytest.fixture
def stage(tiny_run_recipe: Callable) -> Callable[..., StageRecipe]:
    return lambda *values: tiny_run_recipe(
        *(f"stages.finetune.{value}" for value in values)
    ).stages["finetune"]


def _printed(view) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(render(view))
    return console.export_text()


def test_the_trained_tokens_are_the_answer_and_its_end(
    source: LoadedData, stage, tiny_model, family: str
) -> None:
    processor = tiny_model(family)[1]
    view = view_sample(source, 0, stage(), processor)
    assert (
        "".join(piece.text for piece in view.pieces if piece.trained)
        == "Crimson, “así” 🫖.<|im_end|>"
    )
    assert (
        "".join("<image>" if piece.is_image else piece.text for piece in view.pieces)
        == view.rendered
    )
    assert "<|im_start|>user\n<image>\nWhich colour?<|im_end|>\n" in view.rendered
    assert [piece.num_tokens for piece in view.pieces if piece.is_image] == [
        4
    ]  # 28 pixels in patches of 14
    assert (
        view.num_tokens
        == len(processor.tokenizer(view.rendered, add_special_tokens=False).input_ids) - 1 + 4
    )
    assert view.num_trained == len(
        processor.tokenizer("Crimson, “así” 🫖.<|im_end|>", add_special_tokens=False).input_ids
    )


def test_a_caption_alone_is_what_the_plain_prompt_trains_on(
    source: LoadedData, stage, tiny_model
) -> None:
    view = view_sample(source, 0, stage("prompt=plain"), tiny_model()[1])
    assert "".join(piece.text for piece in view.pieces if piece.trained) == "Crimson, “así” 🫖.\n"
    assert view.rendered == "<image>Crimson, “así” 🫖.\n"


def test_what_is_cut_off_is_counted(source: LoadedData, stage, tiny_model) -> None:
    view = view_sample(source, 2, stage("row_tokens=64"), tiny_model()[1])
    whole = view_sample(source, 2, stage("row_tokens=4096"), tiny_model()[1])
    assert view.num_tokens == 64
    assert view.num_truncated == whole.num_tokens - 64
    assert (
        f"64 tokens, {view.num_trained} of them trained on; "
        f"{view.num_truncated:,} more are cut off by row_tokens" in _printed(view)
    )


def test_the_image_is_shown_as_the_tower_gets_it(
    source: LoadedData, stage, tiny_model, tmp_path: Path
) -> None:
    view = view_sample(source, 0, stage(), tiny_model()[1])
    [file] = save_pixels(view, tmp_path / "seen")
    assert file == tmp_path / "seen" / "row-0-image-1.png"
    values = np.asarray(Image.open(file))
    assert values.shape == (28, 28, 3)
    assert np.abs(values[14, 14] - np.array([200, 30, 60])).max() <= 2
    mean = (
        np.array([0.4, 0.5, 0.6]) * 255
    )  # of these towers: what a wide picture is padded with, above and below
    assert np.abs(values[1, 14] - mean).max() <= 2
    squashed = view_sample(source, 0, stage(), tiny_model(pad_to_square=False)[1]).pixels[0]
    assert np.abs(np.asarray(squashed)[1, 14] - np.array([200, 30, 60])).max() <= 2


def test_without_a_recipe_the_words_are_shown(source: LoadedData) -> None:
    view = view_sample(source, 0)
    assert (view.rendered, view.pieces, view.pixels) == (None, (), ())
    printed = _printed(view)
    assert "row 0  rows.jsonl, line 1" in printed
    assert "image 1: red.png, 40 x 20 pixels" in printed
    assert "assistant: Crimson, “así” 🫖." in printed
    assert "give a recipe" in printed


def test_colours_say_what_is_trained_on(source: LoadedData, stage, tiny_model) -> None:
    segments = Console(width=120).render(render(view_sample(source, 1, stage(), tiny_model()[1])))
    coloured = [
        (segment.text, segment.style.bgcolor.name)
        for segment in segments
        if segment.style and segment.style.bgcolor
    ]
    assert all(
        one[1] != other[1] for one, other in pairwise(coloured[:-2])
    )  # neighbours are told apart
    green = [text for text, colour in coloured if colour in ("#b7e4c7", "#74c69d")]
    assert "".join(green) == "Hello.<|im_end|>" + "trained on"  # the last is the legend


def test_what_cannot_be_encoded_is_said(source: LoadedData, stage, tiny_model) -> None:
    processor = tiny_model()[1]
    assert "half of a character" in view_sample(source, 3, stage(), processor).problem
    assert (
        "row_tokens=20 cuts its answer off"
        in view_sample(source, 0, stage("row_tokens=20"), processor).problem
    )
    assert "cuts its answer off" in _printed(
        view_sample(source, 0, stage("row_tokens=20"), processor)
    )


def test_text_does_not_reach_the_terminal_as_commands(
    source: LoadedData, stage, tiny_model
) -> None:
    for more in ({}, {"stage": stage(), "processor": tiny_model()[1]}):
        printed = _printed(view_sample(source, 4, **more))
        assert "bell ␇ [bold]and brackets[/bold]" in printed
        assert "\x07" not in printed
    assert visible("a\x1b[31m\tb\r\n\x7f\x9b\ud83d") == "a␛[31m␉b␍↵\n␡��"


@pytest.mark.parametrize("row", [-1, 5, 10**9])
def test_a_row_that_is_not_there(row: int, source: LoadedData) -> None:
    with pytest.raises(
        ValueError, match=rf"rows\.jsonl has no row {row}: it has 5 rows, so give one from 0 to 4"
    ):
        view_sample(source, row)


def test_a_row_that_is_no_sample(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1"):
        view_sample(load_data(data_recipe(str(tmp_path / "rows.jsonl"))), 0)


@pytest.mark.parametrize("is_padded", [False, True])
def test_regions_are_drawn_where_the_tower_sees_them(is_padded: bool) -> None:
    image = Image.new("RGB", (200, 100))
    ImageDraw.Draw(image).rectangle((100, 50, 199, 99), fill="white")
    if is_padded:
        square = Image.new("RGB", (200, 200))
        square.paste(image, (0, 50))
        image = square
    seen = image.resize((80, 80))
    regions = [as_region((100, 50, 200, 100), (200, 100), 0, "", "")]
    drawn = np.asarray(draw_regions(seen, regions, is_padded)).astype(int)
    outline = (drawn == (255, 0, 128)).all(axis=-1)
    rows, columns = np.nonzero(outline)
    assert (columns.min(), rows.min()) == (40, 40)
    assert rows.max() == (60 if is_padded else 79)
    assert draw_regions(seen, []) is seen
