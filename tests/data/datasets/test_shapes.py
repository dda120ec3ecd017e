"""Records of any kind of file are read by the one format that they fit; nothing in them is worse
than a ValueError with the row.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipha.data.datasets import llava, messages, sharegpt, table
from mipha.data.datasets._images import IMAGE_COLUMNS, ImageFolders
from mipha.data.datasets._records import Row
from mipha.data.datasets._shapes import sample_of, shapes_of

FOLDERS = ImageFolders(Path("/nowhere"), ("/nowhere",))

_texts = st.sampled_from(
    [
        "<image>",
        "<image>\nWhat?",
        "a",
        "",
        "user",
        "human",
        "image",
        "text",
        "../a",
        "http://a/b",
        "\ud800",
        "data:,",
    ]
)
_parts = st.fixed_dictionaries(
    {}, optional={key: _texts | st.none() for key in ("type", "text", "image", "url", "image_url")}
)
_values = st.none() | st.booleans() | st.integers() | st.floats() | _texts
_turns = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": _texts | st.sampled_from(["user", "assistant", "system"]),
            "from": st.sampled_from(["human", "gpt"]) | _values,
        }
        | {key: _values | st.lists(_parts | _values, max_size=3) for key in ("content", "value")},
    )
    | _values,
    max_size=3,
)
_records = st.fixed_dictionaries(
    {},
    optional={
        key: _values | _turns
        for key in ("messages", "conversations", "prompt", "completion", "system", "id")
    }
    | {
        key: _values | st.lists(_values, max_size=2)
        for key in (*IMAGE_COLUMNS[:4], "question", "answer", "caption", "text")
    },
)


@settings(max_examples=300)
@given(content=_records | _values | st.lists(_values, max_size=2))
def test_no_record_is_worse_than_a_value_error(content: object) -> None:
    row = Row("mine/1", "mine, line 1", content, FOLDERS)
    for read in (
        sample_of,
        *(
            lambda row, module=module: module.to_sample(row)
            for module in (messages, llava, sharegpt, table)
        ),
    ):
        try:
            sample = read(row)
        except ValueError as error:
            assert str(error).startswith("mine, line 1")
        else:
            assert sample.id.startswith("mine/1")


def test_a_record_that_fits_none_or_two_is_refused() -> None:
    turns = {"messages": [], "conversations": [{"from": "human", "value": "a"}]}
    assert shapes_of(turns) == ["messages", "llava"]
    for content, sentence in (
        (turns, "line 1: it holds messages, conversations, which fits messages and llava"),
        (
            {"picture_of": "a", "tags": []},
            "line 1: it holds picture_of, tags, which fits no known format; wanted messages",
        ),
        ({}, "line 1: it holds nothing, which fits no known format"),
        ([1], r"line 1: it holds \[1\], which fits no known format"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sample_of(Row("mine/1", "line 1", content, FOLDERS))
