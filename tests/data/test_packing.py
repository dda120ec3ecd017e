"""Rows hold every sample's tokens, once, in rows that fit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipha.data.encode import IGNORE, Encoded
from mipha.data.packing import Row, make_rows

ROW = 40


@st.composite
def samples(draw: st.DrawFn) -> list[Encoded]:
    """Samples of 2 to 40 tokens, some with an image whose tokens they may share."""
    made = []
    for number in range(draw(st.integers(1, 12))):
        image = draw(st.integers(0, 3))
        prefix = 3 + 2 * image if image else 0
        length = draw(st.integers(prefix + 2, ROW))
        # A sample's own tokens are all different from the others', so that a test can tell whose
        # they are.
        ids = np.arange(length) + 1000 * (number + 1)
        ids[:prefix] = np.arange(prefix) + 100 * image
        # Without an image the first token may be trained on (a plain caption): in a row, nothing
        # predicts it.
        first = draw(st.integers(prefix + 1 if prefix else 0, length - 1))
        labels = np.where(np.arange(length) >= first, ids, IGNORE)
        made.append(
            Encoded(f"s{number}", ids, labels, (Path(f"{image}.png"),) if image else (), prefix)
        )
    return made


BATCHING = pytest.mark.parametrize("batching", ["padded", "packed", "shared-image"])


@BATCHING
@given(samples=samples())
def test_rows_hold_every_token_once(batching: str, samples: list[Encoded]) -> None:
    rows = make_rows(samples, ROW, batching)
    laid = Counter(int(token) for row in rows for token in row.input_ids)
    given_tokens = Counter(int(token) for sample in samples for token in sample.input_ids)
    own = {token: count for token, count in given_tokens.items() if token >= 1000}
    assert {token: count for token, count in laid.items() if token >= 1000} == own
    shared = {token: count for token, count in laid.items() if token < 1000}
    wanted = {token: count for token, count in given_tokens.items() if token < 1000}
    if batching == "shared-image":
        assert shared.keys() == wanted.keys() and all(
            1 <= shared[token] <= wanted[token] for token in shared
        )
    else:
        assert shared == wanted
    assert sorted(name for row in rows for name in row.ids) == sorted(
        sample.id for sample in samples
    )


@BATCHING
@given(samples=samples())
def test_rows_fit_and_come_longest_first(batching: str, samples: list[Encoded]) -> None:
    rows = make_rows(samples, ROW, batching)
    lengths = [len(row) for row in rows]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] <= ROW
    if batching == "padded":
        assert sorted(lengths) == sorted(map(len, samples))
    if batching == "packed":  # first fit: no two rows would fit in one
        assert len(lengths) < 2 or lengths[-1] + lengths[-2] > ROW


@BATCHING
@given(samples=samples())
def test_what_is_trained_on_is_kept(batching: str, samples: list[Encoded]) -> None:
    rows = make_rows(samples, ROW, batching)
    wanted = sorted(
        int(label) for sample in samples for label in sample.labels[1:] if label != IGNORE
    )
    assert sorted(int(label) for row in rows for label in row.labels if label != IGNORE) == wanted
    assert sum(row.num_supervised for row in rows) == len(wanted)


@BATCHING
@given(samples=samples())
def test_every_token_has_the_position_and_the_past_it_has_alone(
    batching: str, samples: list[Encoded]
) -> None:
    """The tokens that the spans show to a token are its own sample up to itself."""
    by_id = {sample.id: sample for sample in samples}
    seen = Counter()
    for row in make_rows(samples, ROW, batching):
        for index in range(len(row)):
            past = visible(row, index)
            owners = [
                sample
                for sample in samples
                if sample.id in row.ids and row.input_ids[index] in sample.input_ids
            ]
            assert any(
                np.array_equal(row.input_ids[past], sample.input_ids[: len(past)])
                for sample in owners
            )
            assert row.position_ids[past].tolist() == list(range(len(past)))
            if row.labels[index] != IGNORE:
                # It is predicted at the token before it, which must be its own sample's.
                assert past[-2] == index - 1
                (owner,) = {sample.id for sample in owners}
                seen[owner] += 1
    assert seen == Counter(
        {name: int((sample.labels[1:] != IGNORE).sum()) for name, sample in by_id.items()}
    )


def visible(row: Row, index: int) -> np.ndarray:
    """Indices that the token may attend to, itself included."""
    starts = np.cumsum([0, *(tokens for _, tokens in row.spans)])
    own = int(np.searchsorted(starts, index, side="right")) - 1
    prefix = max(place for place in range(own + 1) if not row.spans[place][0])
    seen = [np.arange(starts[own], index + 1)]
    if prefix != own:
        seen.insert(0, np.arange(starts[prefix], starts[prefix + 1]))
    return np.concatenate(seen)


@given(samples=samples())
def test_images_follow_the_order_of_their_tokens(samples: list[Encoded]) -> None:
    for batching in ("padded", "packed", "shared-image"):
        for row in make_rows(samples, ROW, batching):
            starts = [
                int(token) // 100 for token in row.input_ids if token < 1000 and token % 100 == 0
            ]
            assert [int(image.stem) for image in row.images] == [start for start in starts if start]


def test_samples_about_one_image_share_it() -> None:
    def sample(name: str, length: int, image: str = "a.png") -> Encoded:
        ids = np.concatenate([[1, 2, 2], np.arange(length) + 10])
        return Encoded(name, ids, np.where(ids > 10, ids, IGNORE), (Path(image),), 3)

    (row,) = make_rows(
        [sample("x", 4), sample("y", 3), sample("z", 2, "b.png")], 40, "shared-image"
    )
    assert row.input_ids.tolist() == [1, 2, 2, 10, 11, 12, 13, 10, 11, 12, 1, 2, 2, 10, 11]
    assert row.spans == ((False, 3), (True, 4), (True, 3), (False, 3), (True, 2))
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 0, 1, 2, 3, 4]
    assert row.images == (Path("a.png"), Path("b.png"))
    rows = make_rows([sample("x", 4), sample("y", 3)], 8, "shared-image")
    assert [row.ids for row in rows] == [("x",), ("y",)], (
        "a group that outgrows a row is split, the image repeated"
    )


@BATCHING
@given(samples=samples())
def test_the_pairs_that_attend_are_counted(batching: str, samples: list[Encoded]) -> None:
    for row in make_rows(samples, ROW, batching):
        assert row.num_pairs == sum(len(visible(row, index)) for index in range(len(row)))


def test_another_text_before_the_image_is_not_shared() -> None:
    labels = np.array([IGNORE, IGNORE, IGNORE, 6])
    made = [
        Encoded(name, np.array([start, 2, 5, 6]), labels, (Path("a.png"),), 2)
        for name, start in (("x", 1), ("y", 7))
    ]
    (row,) = make_rows(made, 40, "shared-image")
    assert row.spans == ((False, 2), (True, 2), (False, 2), (True, 2))
    assert len(row.images) == 2
