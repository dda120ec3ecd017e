"""Rows to tensors: padding that nothing reads, and a mask that keeps samples apart."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaProcessor

from mipha.data.collate import collate, to_device
from mipha.data.encode import IGNORE, Encoded
from mipha.data.packing import make_rows


@pytest.fixture(scope="module")
def processor(tiny_model: Callable) -> LlavaProcessor:
    return tiny_model()[1]


def picture(grey: int, width: int = 28, height: int = 28) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (grey, grey, grey)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sample(processor: LlavaProcessor) -> Callable[..., Encoded]:
    """`sample(name, tokens, image)` begins with the four placeholders of its image, if any."""

    def make(name: str, length: int, image: bytes | None = None) -> Encoded:
        ids = np.arange(length) + 5
        labels = np.where(np.arange(length) > length // 2, ids, IGNORE)
        if image:
            ids[:4] = processor.image_token_id
        return Encoded(name, ids, labels, (image,) if image else (), 4 if image else 0)

    return make


def test_padding_is_on_the_right_and_not_trained_on(
    sample: Callable, processor: LlavaProcessor
) -> None:
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


def test_supervised_positions_are_those_before_a_supervised_token(
    sample: Callable,
    processor: LlavaProcessor,
) -> None:
    samples = [sample("a", 9), sample("b", 5)]
    samples[1].labels[0] = 5  # no state stands before the first token of a row
    batch = collate(make_rows(samples, 20, "padded"), processor)
    rows, tokens = batch["labels"].shape
    found = [divmod(int(place), tokens) for place in batch["supervised"]]
    assert found == [
        (row, token - 1)
        for row in range(rows)
        for token in range(1, tokens)
        if batch["labels"][row, token] != IGNORE
    ]


def test_rows_are_padded_to_the_next_of_the_given_lengths(
    sample: Callable, processor: LlavaProcessor
) -> None:
    rows = make_rows([sample("a", 9), sample("b", 5)], 20, "padded")
    shape = {
        lengths: tuple(collate(rows, processor, None, lengths)["input_ids"].shape)
        for lengths in ((), (8, 12, 16), (4, 8))
    }
    assert shape == {(): (2, 9), (8, 12, 16): (2, 12), (4, 8): (2, 9)}


def test_spans_say_who_sees_whom_and_there_is_no_mask(
    sample: Callable, processor: LlavaProcessor
) -> None:
    def spans(batching: str, *samples: Encoded) -> object:
        batch = collate(make_rows(samples, 20, batching), processor)
        assert "attention_mask" not in batch
        return batch["spans"]

    first, second = sample("a", 9), sample("b", 5)
    assert spans("padded", first, second) == (((False, 9),), ((False, 5),))
    assert spans("packed", first) == (((False, 9),),)
    assert spans("packed", first, second) == (((False, 9), (False, 5)),)
    shared = [sample("a", 9, picture(1)), sample("b", 6, picture(1))]
    assert spans("shared-image", *shared) == (((False, 4), (True, 5), (True, 2)),)


def test_tensors_go_to_the_device_and_spans_stay(
    sample: Callable, processor: LlavaProcessor
) -> None:
    batch = collate(make_rows([sample("a", 9)], 20, "padded"), processor)
    moved = to_device(batch, "meta")
    assert moved["spans"] is batch["spans"] and moved.keys() == batch.keys()
    assert all(moved[key].device.type == "meta" for key in moved if key != "spans")
    assert batch["input_ids"].device.type == "cpu"


def test_images_come_in_reading_order(sample: Callable, processor: LlavaProcessor) -> None:
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


def test_an_image_is_padded_to_a_square_with_the_mean_colour(
    sample: Callable, tiny_model: Callable
) -> None:
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


def test_placeholders_that_do_not_fit_the_images_are_refused(
    sample: Callable, processor: LlavaProcessor
) -> None:
    """The model does not count them again."""
    short = sample("a", 9, picture(1))
    short.input_ids[3] = 5
    with pytest.raises(ValueError, match="the images of a take 4 tokens, and 3 are kept for them"):
        collate(make_rows([short], 20, "padded"), processor)
