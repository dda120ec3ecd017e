"""LLaVA's caption file: the published layout, the marker's place, and rows that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.data.datasets import llava_pretrain
from mipha.data.sample import Sample

ROW = {
    "id": "004539375",
    "image": "00453/004539375.jpg",
    "conversations": [
        {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
        {
            "from": "gpt",
            "value": "select luxury furniture 3 - inch gel memory foam mattress topper",
        },
    ],
}

FILENAME = "blip_laion_cc_sbu_558k.json"


def _write(root: Path, *rows: object) -> Path:
    file = root / FILENAME
    file.write_text(json.dumps(rows))
    return file


def _only(root: Path) -> Sample:
    return llava_pretrain.DATASET.to_sample(llava_pretrain.DATASET.load(root, "train")[-1])


def test_a_published_row(tmp_path: Path) -> None:
    file = _write(tmp_path, ROW)
    sample = _only(tmp_path)
    assert sample.id == "llava_pretrain/0/004539375"
    assert [(message.role, message.text) for message in sample.messages] == [
        ("user", "<image>\nRender a clear and concise summary of the photo."),
        ("assistant", "select luxury furniture 3 - inch gel memory foam mattress topper"),
    ]
    assert sample.images == (tmp_path / "00453/004539375.jpg",)
    assert _only(file) == sample


def test_images_are_looked_for_in_the_images_folder_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    _write(tmp_path, ROW)
    assert _only(tmp_path).images == (tmp_path / "images/00453/004539375.jpg",)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "a/../../secret.png",
        "/etc/passwd",
        "C:\\secret.png",
        "C:secret.png",
        "\\secret.png",
        "a\\..\\..\\secret.png",
        "\\\\host\\share.png",
        "a\0b",
        "",
        " ",
        7,
    ],
)
def test_a_path_that_leads_out_is_refused(path, tmp_path: Path) -> None:
    _write(tmp_path, ROW, {**ROW, "image": path})
    with pytest.raises(ValueError, match=rf"{FILENAME}, row 1: the image path"):
        _only(tmp_path)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (None, 'list of "conversations"'),
        ({"id": "1"}, 'list of "conversations"'),
        ({**ROW, "conversations": []}, "no human turn is answered"),
        ({**ROW, "conversations": ROW["conversations"][:1]}, "no human turn is answered"),
        (
            {**ROW, "conversations": [*ROW["conversations"], ROW["conversations"][1]]},
            "roles are user, assistant, assistant",
        ),
        ({**ROW, "conversations": [{"from": "human", "value": 3}]}, r"turn 0 is not \{.from"),
        ({**ROW, "conversations": [{"from": "robot", "value": "hi"}]}, "turn 0"),
        ({**ROW, "conversations": ["hi"]}, "turn 0"),
        ({key: ROW[key] for key in ("id", "conversations")}, "1 <image> markers for 0 images"),
    ],
)
def test_a_malformed_row_is_named(row, sentence, tmp_path: Path) -> None:
    _write(tmp_path, ROW, row)
    with pytest.raises(ValueError, match=rf"{FILENAME}, row 1.*({sentence})"):
        _only(tmp_path)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test': use train"):
        llava_pretrain.DATASET.load(tmp_path, "test")
    with pytest.raises(ValueError, match="no packaged copy"):
        llava_pretrain.DATASET.load(None, "train")
    with pytest.raises(FileNotFoundError, match=FILENAME):
        llava_pretrain.DATASET.load(tmp_path, "train")
    (tmp_path / FILENAME).write_text('{"a": 1}')
    with pytest.raises(ValueError, match="wanted a list"):
        llava_pretrain.DATASET.load(tmp_path, "train")
    (tmp_path / FILENAME).write_text("[")
    with pytest.raises(ValueError, match="not valid JSON"):
        llava_pretrain.DATASET.load(tmp_path, "train")
