"""Own data in LLaVA's manner: the published files' rules, in any file, as a list or as lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.data.datasets import llava


def _turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]


ROWS = [
    {"id": "a", "image": "1.jpg", "conversations": _turns("What is it?\n<image>", "A bus.")},
    {"id": "b", "conversations": _turns("Hello", "Hi", "Bye")},
]


@pytest.mark.parametrize(
    ("name", "text", "numbers"),
    [
        ("mine.json", json.dumps(ROWS, indent=2), (0, 1)),
        ("mine.jsonl", "\n".join(map(json.dumps, ROWS)), (1, 2)),
        ("mine.json", "\n\n".join(map(json.dumps, ROWS)), (1, 3)),
    ],
)
def test_a_list_and_lines_hold_the_same(
    name: str, text: str, numbers: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    first, second = (llava.to_sample(row) for row in llava.load(tmp_path / name, "train"))
    assert [message.text for message in first.messages] == ["<image>\nWhat is it?", "A bus."]
    assert first.images == (tmp_path / "1.jpg",)
    assert [message.text for message in second.messages] == ["Hello", "Hi"]
    assert [first.id, second.id] == [
        f"llava/mine/{number}/{id}" for number, id in zip(numbers, "ab", strict=True)
    ]


def test_a_row_that_is_wrong_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(
        json.dumps(ROWS[0] | {"image": "../1.jpg"})
        + "\n"
        + json.dumps(ROWS[1] | {"image": "1.jpg"})
    )
    rows = llava.load(tmp_path / "mine.jsonl", "train")
    with pytest.raises(
        ValueError, match=r"mine\.jsonl, line 1: the image path '\.\./1\.jpg' leads out"
    ):
        llava.to_sample(rows[0])
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2: no human turn is answered"):
        llava.to_sample(rows[1]._replace(content=rows[1].content | {"conversations": []}))


def test_an_image_without_a_marker_goes_in_front(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps([ROWS[1] | {"image": "1.jpg"}]))
    sample = llava.to_sample(llava.load(tmp_path / "mine.json", "train")[0])
    assert [message.text for message in sample.messages] == ["<image>\nHello", "Hi"]
    assert [remark.kind for remark in sample.remarks] == ["added-marker"]
