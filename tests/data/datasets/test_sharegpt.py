"""ShareGPT's manner: other names for the roles, a system turn, several images, and nothing moved or
left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.data.datasets import sharegpt
from mipha.data.sample import Sample


def _sample(root: Path, turns: object, **row: object) -> Sample:
    (root / "mine.json").write_text(json.dumps([{"conversations": turns, **row}]))
    return sharegpt.to_sample(sharegpt.load(root / "mine.json", "train")[0])


def _turns(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


@pytest.mark.parametrize(
    ("asks", "answers"),
    [("human", "gpt"), ("user", "assistant"), ("Human", "GPT"), ("human", "model")],
)
def test_roles_have_many_names(asks: str, answers: str, tmp_path: Path) -> None:
    sample = _sample(tmp_path, _turns(("system", "Be brief."), (asks, "a?"), (answers, "b")))
    assert [(message.role, message.text) for message in sample.messages] == [
        ("system", "Be brief."),
        ("user", "a?"),
        ("assistant", "b"),
    ]
    assert sample.id == "sharegpt/mine/0"


def test_turns_may_use_the_names_of_messages(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a?"}]},
        {"role": "assistant", "content": "b"},
    ]
    assert [
        message.text for message in _sample(tmp_path, turns, image="1.jpg", system="Hm").messages
    ] == ["Hm", "<image>\na?", "b"]


def test_markers_stay_where_they_are(tmp_path: Path) -> None:
    turns = _turns(
        ("human", "Is <image> like"), ("gpt", "What?"), ("human", "this <image>?"), ("gpt", "No")
    )
    sample = _sample(tmp_path, turns, images=["1", "2"])
    assert [message.text for message in sample.messages] == [
        "Is <image> like",
        "What?",
        "this <image>?",
        "No",
    ]
    assert sample.images == (tmp_path / "1", tmp_path / "2")
    assert (
        _sample(tmp_path, _turns(("human", "Compare"), ("gpt", "No")), images=["1", "2"])
        .messages[0]
        .text
        == "<image>\n<image>\nCompare"
    )


@pytest.mark.parametrize(
    ("turns", "row", "sentence"),
    [
        (
            _turns(("function_call", "f()")),
            {},
            'turn 0 is not an object whose "from" is system or human',
        ),
        (["hi"], {}, "turn 0"),
        ([{"from": ["human"], "value": "a"}], {}, "turn 0"),
        (_turns(("gpt", "Hello"), ("human", "Hi")), {}, "roles are assistant, user"),
        (_turns(("human", "a?")), {}, "roles are user;"),
        (
            _turns(("human", "<image> a?"), ("gpt", "b")),
            {"images": ["1", "2"]},
            "1 <image> markers for 2 images",
        ),
        (
            [{"from": "human", "value": None}, {"from": "gpt", "value": "b"}],
            {},
            "the content of message 0 is 'None'",
        ),
        (_turns(("human", "a?"), ("gpt", "b")), {"system": 3}, "its system turn is '3'"),
        ([{"from": "human", "value": "a", "content": "b"}], {}, "turn 0 has two roles or texts"),
        ([{"from": "human", "role": "system", "value": "a"}], {}, "turn 0 has two roles or texts"),
        ("hi", {}, 'list of "conversations"'),
    ],
)
def test_a_malformed_row_is_named(turns: object, row: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"mine\.json, row 0.*{sentence}"):
        _sample(tmp_path, turns, **row)
