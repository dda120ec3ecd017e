"""A folder of pictures: captions beside them, or the hub's metadata file, one folder or one a
split.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.data.datasets import image_folder
from mipha.data.sample import Sample


def _samples(root: Path, split: str = "train", **options: object) -> list[Sample]:
    return [
        image_folder.DATASET.to_sample(row) for row in image_folder.load(root, split, **options)
    ]


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_a_caption_beside_each_picture(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {"b.jpg": "", "b.txt": "\ufeffA dog. \n", "pets/a.PNG": "", "pets/a.txt": "A cat."},
    )
    _write(tmp_path, {"README.txt": "no picture", ".x.png": "hidden"})
    first, second = _samples(tmp_path)
    assert [message.text for message in first.messages] == [
        "<image>\nDescribe the image.",
        "A dog.",
    ]
    assert (first.id, first.images) == ("image_folder/b.jpg", (tmp_path / "b.jpg",))
    assert (second.id, second.images, second.messages[1].text) == (
        "image_folder/pets/a.PNG",
        (tmp_path / "pets/a.PNG",),
        "A cat.",
    )


def test_one_folder_a_split(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {"train/a.jpg": "", "train/a.txt": "A cat.", "val/b.jpg": "", "val/b.txt": "A dog."},
    )
    assert [sample.id for sample in _samples(tmp_path)] == ["image_folder/train/a.jpg"]
    assert [sample.images for sample in _samples(tmp_path, "validation")] == [
        (tmp_path / "val/b.jpg",)
    ]
    with pytest.raises(ValueError, match="no split 'test': use train or validation"):
        image_folder.load(tmp_path, "test")
    (tmp_path / "train").rename(tmp_path / "cats")
    with pytest.raises(ValueError, match="the folders validation and no train: put what is to be"):
        image_folder.load(tmp_path, "train")


def test_the_hubs_metadata(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    rows = [{"file_name": "a.jpg", "text": "A cat."}, {"file_name": "sub/b.jpg", "messages": turns}]
    _write(
        tmp_path,
        {"metadata.jsonl": "\n".join(map(json.dumps, rows)), "a.jpg": "", "not_listed.jpg": ""},
    )
    first, second = _samples(tmp_path)
    assert (first.id, first.images, first.messages[1].text) == (
        "image_folder/1",
        (tmp_path / "a.jpg",),
        "A cat.",
    )
    assert (second.images, second.messages[0].text) == ((tmp_path / "sub/b.jpg",), "<image>\nWhat?")
    _write(
        tmp_path / "other",
        {"train/metadata.csv": "file_name,question,answer\na.jpg,What?,A cat.\n"},
    )
    (sample,) = _samples(tmp_path / "other")
    assert (sample.id, sample.images) == ("image_folder/train/2", (tmp_path / "other/train/a.jpg",))


def test_captions_of_another_system(tmp_path: Path) -> None:
    _write(tmp_path, {"A.JPG": "", "b.jpg": "", "b.txt": "A dog\r\nand a cat."})
    (tmp_path / "A.TXT").write_bytes(b"A cat.\r\nIt sleeps.\r\n")
    said = [sample.messages[1].text for sample in _samples(tmp_path)]
    assert said == ["A cat.\nIt sleeps.", "A dog\nand a cat."]
    assert image_folder.left_out(tmp_path, "train") is None


def test_what_no_split_reads_is_named(tmp_path: Path) -> None:
    files = {"train/a.jpg": "", "train/a.txt": "A cat.", "val/c.jpg": "", "other/b.jpg": ""}
    _write(tmp_path, files)
    left_out = image_folder.left_out(tmp_path, "train")
    assert left_out is not None and left_out.startswith("1 images are not read")
    assert left_out.endswith(": other/b.jpg")

    table = {"metadata.csv": "file_name,text\na.jpg,A cat.\n", "in/metadata.jsonl": ""}
    _write(tmp_path / "val", table)
    left_out = image_folder.left_out(tmp_path, "validation")
    assert left_out is not None and "1 files of metadata are not read: val/in/" in left_out


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    _write(
        tmp_path / "one",
        {
            "a.jpg": "",
            "b.heic": "",
            "b.txt": " ",
            "c.jpg": "",
            "outside.txt": "A cat.",
            "secret.txt": "no picture",
        },
    )
    (tmp_path / "one/c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "secret.jpg").touch()
    (tmp_path / "one/outside.jpg").symlink_to(tmp_path / "secret.jpg")
    rows = image_folder.load(tmp_path / "one", "train")
    assert len(rows) == 4
    for index, sentence in (
        (0, r"a\.jpg: it has no caption a\.txt beside it"),
        (2, r"c\.txt is not UTF-8"),
    ):
        with pytest.raises(ValueError, match=sentence):
            rows[index]
    for index, sentence in (
        (1, r"b\.heic: its caption is ''"),
        (3, r"outside\.jpg: the image path 'outside\.jpg' leads out"),
    ):
        with pytest.raises(ValueError, match=sentence):
            image_folder.DATASET.to_sample(rows[index])
    with pytest.raises(ValueError, match="has no packaged copy"):
        image_folder.load(None, "train")
    with pytest.raises(FileNotFoundError, match="no folder"):
        image_folder.load(tmp_path / "gone", "train")


def test_links_lead_where_the_recipe_allows(tmp_path: Path) -> None:
    _write(tmp_path, {"store/a.jpg": "", "data/a.txt": "A cat."})
    (tmp_path / "data/a.jpg").symlink_to(tmp_path / "store/a.jpg")
    (sample,) = _samples(tmp_path / "data", image_root=[tmp_path / "data", tmp_path / "store"])
    assert sample.images == (tmp_path / "data/a.jpg",)


def test_the_hubs_download_cache(tmp_path: Path) -> None:
    """There every file is a link to one folder beside."""
    _write(tmp_path, {"blobs/1": "", "blobs/2": "A cat.", "snapshots/1f/pets/none": ""})
    for name, blob in (("a.jpg", "1"), ("a.txt", "2")):
        (tmp_path / "snapshots/1f/pets" / name).symlink_to(tmp_path / "blobs" / blob)
    (sample,) = _samples(tmp_path / "snapshots/1f")
    assert (sample.images, sample.messages[1].text) == (
        (tmp_path / "snapshots/1f/pets/a.jpg",),
        "A cat.",
    )
