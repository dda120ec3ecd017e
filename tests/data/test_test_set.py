"""Questions of a test set: every format, with several right answers, with one, or without."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mipha.data.dataset import data_recipe
from mipha.data.faults import RecordError
from mipha.data.sample import Message
from mipha.data.test_set import GoldSet, load_test_set

Read = Callable[..., GoldSet]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """`read(record, ..., name="test.jsonl")`: the test set of these records, with two images."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    def load(*records: Any, name: str = "test.jsonl") -> GoldSet:
        lines = "".join(
            (record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records
        )
        (tmp_path / name).write_text(lines, encoding="utf-8")
        return load_test_set(data_recipe(str(tmp_path / name)))

    return load


def gold(found: GoldSet) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.text, one.answers) for one in found.questions]


TABLE = {"image": "a.png", "question": "Which colour?"}


@pytest.mark.parametrize(
    ("more", "answers"),
    [
        ({"answer": "red"}, ("red",)),
        ({"answer": 3}, ("3",)),
        ({"answers": ["red", "dark red"]}, ("red", "dark red")),
        ({"answer": ["red", "dark red"]}, ("red", "dark red")),
        ({"answers": [{"answer": "red", "answer_id": 1}, {"answer": "no"}]}, ("red", "no")),
        ({"answers": {"text": ["red"], "answer_start": [4]}}, ("red",)),
        ({"answer": "red", "answers": ["red", "crimson"]}, ("red", "crimson")),
        ({}, ()),
        ({"answer": None}, ()),
    ],
)
def test_a_row_has_any_number_of_right_answers(
    more: dict[str, Any], answers: tuple[str, ...], read: Read
) -> None:
    found = read(TABLE | more, {"image": "b.png", "question": "And this?", "answer": "blue"})
    assert gold(found) == [("Which colour?", answers), ("And this?", ("blue",))]
    assert [image.name for one in found.questions for image in one.images] == ["a.png", "b.png"]


def test_a_cell_of_a_table_may_be_a_list(read: Read) -> None:
    found = read("image,question,answers", 'a.png,What?,"[""red"", ""blue""]"', name="test.csv")
    assert gold(found) == [("What?", ("red", "blue"))]


MESSAGES = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A."}]
MORE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
TEXTS = [{"user": "What?", "assistant": "A."}, {"user": "Why?", "assistant": "So."}]


@pytest.mark.parametrize(
    ("record", "questions"),
    [
        ({"messages": MESSAGES, "images": ["a.png"]}, [("What?", ("A.",))]),
        ({"messages": MESSAGES[:1], "images": ["a.png"]}, [("What?", ())]),
        ({"conversations": LLAVA, "image": "a.png"}, [("What?", ("A.",))]),
        ({"conversations": LLAVA[:1], "image": "a.png"}, [("What?", ())]),
        ({"texts": TEXTS, "images": ["a.png"]}, [("What?", ("A.",)), ("Why?", ("So.",))]),
        ({"texts": [{"user": "What?"}], "images": ["a.png"]}, [("What?", ())]),
        ({"image": "a.png", "caption": "A cat."}, [("Describe the image.", ("A cat.",))]),
    ],
)
def test_every_format_is_read_with_and_without_the_last_answer(
    record: Any, questions: list[Any], read: Read
) -> None:
    found = read(record)
    assert gold(found) == questions
    assert all([image.name for image in one.images] == ["a.png"] for one in found.questions)


def test_a_later_turn_is_asked_with_the_turns_before_it(read: Read) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [system, *MESSAGES, {"role": "user", "content": "And <image>?"}, MORE[1]]
    first, second = read({"messages": turns, "images": ["a.png", "b.png"]}).questions
    assert first.before == (Message("system", "Be brief."),) and first.text == "<image>\nWhat?"
    assert second.before == (
        *first.before,
        Message("user", "<image>\nWhat?"),
        Message("assistant", "A."),
    )
    assert second.text == "And <image>?" and second.answers == ("So.",)
    assert [image.name for image in first.images] == ["a.png"]
    assert [image.name for image in second.images] == ["a.png", "b.png"]
    assert [first.id, second.id] == ["test/1#0", "test/1#1"]


def test_turns_that_are_not_to_be_learned_are_not_asked(read: Read) -> None:
    turns = [MESSAGES[0], MESSAGES[1] | {"weight": 0}, *MORE]
    assert gold(read({"messages": turns, "images": ["a.png"]})) == [("Why?", ("So.",))]


def test_ids_are_the_records_own_where_they_are_different(read: Read) -> None:
    def ids(*own: Any) -> Iterable[str]:
        rows = [TABLE | {"answer": "red"} | ({} if one is None else {"id": one}) for one in own]
        return [one.id for one in read(*rows).questions]

    assert ids("x", 7) == ["x", "7"]
    assert ids("x", "x") == ids("x", None) == ["test/1", "test/2"]
    twice = read(*[TABLE | {"answer": "red", "id": "x"}] * 2)
    assert twice.about_ids == (
        "its ids are places, such as test/1, because several records have the id x"
    )
    assert not read(TABLE | {"answer": "red", "id": "x"}).about_ids


def test_what_nobody_reads_is_counted_and_named(read: Read) -> None:
    row = TABLE | {"answer": "red", "mood": "good"}
    found = read(row, row, TABLE | {"answer": "red"})
    assert found.notes[1:] == ('2 of 3 records: nothing reads the key "mood"',)
    assert "is read as table" in found.notes[0]


def test_what_is_broken_is_named_with_its_line(read: Read, tmp_path: Path) -> None:
    good = TABLE | {"answer": "red"}
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl, line 2: no image file .*gone\.png"):
        read(good, good | {"image": "gone.png"})
    with pytest.raises(RecordError, match=r"test\.jsonl, line 2.*its answers hold .*None"):
        read(good, TABLE | {"answers": [None]})
    with pytest.raises(RecordError, match=r"test\.jsonl, line 2.*not valid JSON"):
        read(good, "{")
    with pytest.raises(ValueError, match="the format is not known"):
        read({"mood": "good"})
    with pytest.raises(FileNotFoundError, match="no data at"):
        load_test_set(data_recipe(str(tmp_path / "gone.jsonl")))
