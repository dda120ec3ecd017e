"""Own data as JSON lines: text or parts, markers or none, and lines that are wrong."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from mipha.data.datasets import messages
from mipha.data.sample import Sample

ANSWER = {"role": "assistant", "content": "A cat."}
TEXT, PICTURE = {"type": "text", "text": "What is this?"}, {"type": "image"}


def _sample(root: Path, *turns: object, **row: object) -> Sample:
    file = root / "train.jsonl"
    file.write_text("\n" + json.dumps({"messages": turns, **row}) + "\n")
    return messages.to_sample(messages.load(file, "train")[0])


def _user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<image>\nWhat is this?", "<image>\nWhat is this?"),
        ("What is this? <image>", "What is this? <image>"),
        ("What is this?", "<image>\nWhat is this?"),
        ([PICTURE, TEXT], "<image>\nWhat is this?"),
        ([TEXT, PICTURE], "What is this?\n<image>"),
        ([TEXT, PICTURE, TEXT, TEXT], "What is this?\n<image>\nWhat is this?What is this?"),
        ([TEXT], "<image>\nWhat is this?"),
        ([PICTURE], "<image>"),
    ],
)
def test_where_the_image_goes(content, text: str, tmp_path: Path) -> None:
    sample = _sample(tmp_path, _user(content), ANSWER, images=["cats/a.jpg"])
    assert [message.text for message in sample.messages] == [text, "A cat."]
    assert sample.images == (tmp_path / "cats/a.jpg",)
    assert sample.id == "messages/train/2"  # the first line is blank


def test_several_images_without_a_marker_go_to_the_first_user_turn(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        _user("Compare."),
        ANSWER,
        _user("More?"),
        ANSWER,
    ]
    sample = _sample(tmp_path, *turns, images=["a.jpg", "b.jpg"], id="pair")
    assert [message.text for message in sample.messages] == [
        "Be brief.",
        "<image>\n<image>\nCompare.",
        "A cat.",
        "More?",
        "A cat.",
    ]
    assert sample.id == "messages/train/2/pair"


def test_two_image_parts_stand_on_two_lines(tmp_path: Path) -> None:
    assert (
        _sample(tmp_path, _user([PICTURE, PICTURE, TEXT]), ANSWER, images=["a", "b"])
        .messages[0]
        .text
        == "<image>\n<image>\nWhat is this?"
    )


@pytest.mark.parametrize(
    "picture",
    [
        {"type": "image", "image": "cats/a.jpg"},
        {"type": "image", "path": "cats/a.jpg"},
        {"type": "image", "url": "cats/a.jpg", "text": None},
        {"type": "image_url", "image_url": {"url": "cats/a.jpg"}},
        {"type": "image_url", "image_url": "cats/a.jpg"},
    ],
)
def test_an_image_may_stand_in_its_part(picture, tmp_path: Path) -> None:
    sample = _sample(tmp_path, _user([TEXT, picture]), ANSWER)
    assert (sample.messages[0].text, sample.images) == (
        "What is this?\n<image>",
        (tmp_path / "cats/a.jpg",),
    )


def test_an_image_may_be_in_the_record_itself(tmp_path: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    sample = _sample(
        tmp_path, _user([{"type": "image_url", "image_url": {"url": uri}}, TEXT]), ANSWER
    )
    assert sample.images == (b"pixels",)
    assert _sample(tmp_path, _user("What?"), ANSWER, images=[{"path": "a.jpg"}, uri]).images == (
        tmp_path / "a.jpg",
        b"pixels",
    )


def test_a_prompt_and_its_completion_are_one_conversation(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(
        json.dumps([{"prompt": [_user("What?")], "completion": [ANSWER], "image": "a.jpg"}])
    )
    row = messages.load(file, "train")[0]
    sample = messages.to_sample(row)
    assert ([message.text for message in sample.messages], sample.id) == (
        ["<image>\nWhat?", "A cat."],
        "messages/train/0",
    )
    assert row.where == f"{file}, row 0"


def test_text_alone_is_a_sample(tmp_path: Path) -> None:
    assert _sample(tmp_path, _user("Hello"), ANSWER).images == ()
    assert _sample(tmp_path, _user("Hello"), ANSWER, images=None).images == ()


@pytest.mark.parametrize(
    ("turns", "row", "sentence"),
    [
        ([_user("hi"), ANSWER], {"messages": "hi"}, 'list of "messages"'),
        ([_user("hi"), ANSWER], {"images": "a.jpg"}, "wanted a list of paths"),
        ([_user("hi"), ANSWER], {"images": ["../a.jpg"]}, "leads out"),
        ([_user("hi"), ANSWER], {"images": ["/a.jpg"]}, "leads out"),
        ([_user("hi"), ANSWER], {"images": [None]}, "image 0 of its 1 images is null"),
        ([_user("<image>"), ANSWER], {}, "1 <image> markers for 0 images"),
        ([_user("<image>"), ANSWER], {"images": ["a", "b"]}, "1 <image> markers for 2 images"),
        ([_user("hi")], {}, "roles are user;"),
        ([], {}, "roles are nothing"),
        (
            [{"role": "tool", "content": "x"}],
            {},
            "message 0 is not an object whose role is system or user or assistant",
        ),
        (["hi"], {}, "message 0"),
        ([_user(None), ANSWER], {}, "the content of message 0 is 'None'"),
        (
            [_user([{"type": "image_url", "image_url": {"url": "http://a/b.jpg"}}]), ANSWER],
            {},
            "is an address; nothing is downloaded",
        ),
        ([_user([{"type": "image_url"}]), ANSWER], {}, "the image path is None"),
        (
            [
                _user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}]),
                ANSWER,
            ],
            {},
            "is not valid base64",
        ),
        (
            [_user([PICTURE, {"type": "image", "image": "b.jpg"}]), ANSWER],
            {"images": ["a.jpg"]},
            "given inside some parts and beside",
        ),
        (
            [_user([{"type": "image", "path": "b.jpg"}, PICTURE]), ANSWER],
            {},
            "given inside some parts and beside",
        ),
        ([_user("hi"), ANSWER | {"weight": 0.5}], {}, "the .weight. of message 1 is .0.5."),
        ([_user([{"type": "text"}]), ANSWER], {}, "a part of message 0 is not"),
        (
            [_user([{"type": "text", "text": "<image>"}]), ANSWER],
            {"images": ["a"]},
            "a text part of message 0 is <image>",
        ),
        ([_user(["hi"]), ANSWER], {}, "a part of message 0 is not"),
    ],
)
def test_a_malformed_line_is_named(turns, row, sentence, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 2.*{sentence}"):
        _sample(tmp_path, *turns, **row)


def test_a_folder_has_one_file_a_split(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(
            json.dumps({"messages": [_user(split), ANSWER]}) + "\n"
        )
    sample = messages.to_sample(messages.load(tmp_path, "validation")[0])
    assert (sample.id, sample.messages[0].text) == ("messages/validation/1", "validation")
    with pytest.raises(
        ValueError, match="no split 'test', only train and validation: give one file"
    ):
        messages.load(tmp_path, "test")
    with pytest.raises(ValueError, match="no split 'test': use train"):
        messages.load(tmp_path / "train.jsonl", "test")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no packaged copy"):
        messages.load(None, "train")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        messages.load(tmp_path / "gone.jsonl", "train")
    with pytest.raises(ValueError, match="no split 'train': use a folder that holds one"):
        messages.load(tmp_path, "train")
    for content, sentence in (
        (b'{"messages": []}\n{"mess', "this is not valid JSON"),
        (
            b'{"messages": []}\n["\xff\xfe"]',
            "this is not UTF-8: byte 0xff .*save the file as UTF-8",
        ),
    ):
        (tmp_path / "bad.jsonl").write_bytes(content)
        rows = messages.load(
            tmp_path / "bad.jsonl", "train"
        )  # one bad line does not hide the others
        assert rows[0].content == {"messages": []}
        with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: {sentence}"):
            rows[1]
