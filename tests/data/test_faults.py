"""A fault of a record says its kind, place, what and fix, wherever it travels."""

from __future__ import annotations

import pickle
from typing import get_args

import pytest

from mipha.data.check.findings import KINDS
from mipha.data.faults import FaultKind, RecordError
from mipha.data.sample import Message, Sample

FAULT = RecordError("it has no answer", "write one", "a.jsonl, line 3", "role-order")


def test_the_parts_are_one_sentence() -> None:
    assert str(FAULT) == "a.jsonl, line 3: it has no answer; write one"
    assert str(RecordError("it has no answer")) == "it has no answer"
    assert RecordError("it has no answer").kind == "malformed"
    moved = FAULT.at("b.jsonl, line 1")
    assert (str(moved), moved.kind) == ("b.jsonl, line 1: it has no answer; write one", FAULT.kind)


def test_a_fault_travels_to_another_process() -> None:
    again = pickle.loads(pickle.dumps(FAULT))
    assert (str(again), again.kind, again.where) == (str(FAULT), FAULT.kind, FAULT.where)


def test_the_loader_of_torch_raises_it_again_as_what_it_was() -> None:
    """It is made again from its message alone."""
    from torch._utils import ExceptionWrapper

    try:
        raise FAULT
    except RecordError as error:
        wrapped = ExceptionWrapper(where="in a worker")
        assert str(FAULT) in wrapped.exc_msg and isinstance(error, ValueError)
    with pytest.raises(RecordError, match=r"a\.jsonl, line 3: it has no answer; write one"):
        wrapped.reraise()


def test_the_linter_describes_every_kind_as_an_error_that_drops_the_row() -> None:
    for kind in get_args(FaultKind):
        assert KINDS[kind].severity == "error"
        assert KINDS[kind].action in ("drop", "repair")


@pytest.mark.parametrize(
    ("roles", "num_images", "kind", "sentence"),
    [
        (("user", "assistant"), 1, "image-count", "0 <image> markers for 1 images; each image"),
        (("assistant", "user"), 0, "role-order", "roles are assistant, user; wanted an optional"),
        ((), 0, "role-order", "roles are nothing"),
    ],
)
def test_a_sample_says_what_is_wrong_with_it(
    roles: tuple, num_images: int, kind: str, sentence: str
) -> None:
    messages = tuple(Message(role, "text") for role in roles)
    with pytest.raises(RecordError, match=f"^sample s: {sentence}") as caught:
        Sample("s", messages, (b"x",) * num_images)
    assert caught.value.kind == kind
