"""Rows to tensors: padding that nothing reads, and a mask that keeps samples apart."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaProcessor

from mipha.data.collate import collate, isolation_mask
from mipha.data.encode import IGNORE, Encoded
from mipha.data.packing import make_rows


@pytest.fixture(scope="module")
def processor(tiny_model: Callable) -> LlavaProcessor:
    return tiny_model()[1]


def picture(grey: int, width: int = 28, height: int = 28) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (grey, grey, grey)).save(buffer, format="PNG")
    return buffer.getvalue()


def sample(name: str, length: int, image: bytes | None = None) -> Encoded:
    ids = np.arange(length) + 5
    return Encoded(
        name,
        ids,
        np.where(np.arange(length) > length // 2, ids, IGNORE),
        (image,) if image else (),
        2 if image else 0,
    )


layouts = st.lists(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)
"""Rows of groups of branch lengths; a group's first is its prefix."""


@given(layout=layouts)
def test_a_token_sees_its_own_past_and_nothing_else(layout: list[list[list[int]]]) -> None:
    length = max(sum(map(sum, row)) for row in layout)
    group, branch = (
        torch.full((len(layout), length), -1),
        torch.zeros(len(layout), length, dtype=torch.int64),
    )
    for number, row in enumerate(layout):
        start = 0
        for which, branches in enumerate(row):
            for part, size in enumerate(branches):
                group[number, start : start + size], branch[number, start : start + size] = (
                    which,
                    part,
                )
                start += size
    mask = isolation_mask(group, branch)
    assert mask.shape == (len(layout), 1, length, length)
    for row in range(len(layout)):
        for query in range(length):
            for key in range(length):
                apart = group[row, query] != group[row, key]
                other_branch = branch[row, key] not in (0, branch[row, query])
                sees = mask[row, 0, query, key] == 0
                assert sees == (key <= query and not apart and not other_branch)
                assert sees or mask[row, 0, query, key] == torch.finfo(torch.float32).min
            assert mask[row, 0, query, query] == 0, (
                "no row of the mask is empty: its softmax would not be a number"
            )


def test_padding_is_on_the_right_and_not_trained_on(processor: LlavaProcessor) -> None:
    rows = make_rows([sample("a", 9), sample("b", 5)], 20, "padded")
    batch = collate(rows, processor)
    assert batch["input_ids"].tolist() == [
        list(range(5, 14)),
        [5, 6, 7, 8, 9] + [processor.tokenizer.pad_token_id] * 4,
    ]
    assert (batch["labels"][1, 5:] == IGNORE).all()
    assert batch["position_ids"].tolist() == [list(range(9)), list(range(9))], (
        "a restart would read as a packed sample"
    )


def test_a_row_of_one_sample_needs_no_mask(processor: LlavaProcessor) -> None:
    samples = [sample("a", 9), sample("b", 5)]
    assert "attention_mask" not in collate(make_rows(samples, 20, "padded"), processor)
    assert "attention_mask" not in collate(make_rows(samples[:1], 20, "packed"), processor)
    assert "attention_mask" in collate(make_rows(samples, 20, "packed"), processor)
    assert "attention_mask" in collate(
        make_rows([sample("a", 9, picture(1)), sample("b", 9, picture(1))], 20, "shared-image"),
        processor,
    )


def test_images_come_in_reading_order(processor: LlavaProcessor) -> None:
    samples = [
        sample("a", 4, picture(10)),
        sample("b", 9, picture(250)),
        sample("c", 6),
        sample("d", 8, picture(128)),
    ]
    rows = make_rows(samples, 17, "packed")
    batch = collate(rows, processor)
    assert [row.ids for row in rows] == [("d", "c"), ("b", "a")]
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    levels = batch["pixel_values"].mean((1, 2, 3)).tolist()
    assert levels[1] > levels[0] > levels[2]
    assert "pixel_values" not in collate(make_rows([sample("c", 6)], 17, "packed"), processor)


def test_an_image_is_padded_to_a_square_with_the_mean_colour(tiny_model: Callable) -> None:
    """Mean pixels are zero once normalised; squashed, there are none."""
    wide = [sample("a", 4, picture(250, 56, 28))]
    for pad in (True, False):
        _, processor = tiny_model(pad_to_square=pad)
        pixels = collate(make_rows(wide, 17, "padded"), processor)["pixel_values"][0]
        assert (pixels[:, 14] > 1).all()
        assert (pixels[:, [0, -1]].abs() < 0.02).all() == pad


def test_a_missing_image_names_its_file(processor: LlavaProcessor, tmp_path) -> None:
    missing = Encoded("a", np.arange(4), np.arange(4), (tmp_path / "gone.png",))
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        collate(make_rows([missing], 9, "padded"), processor)
