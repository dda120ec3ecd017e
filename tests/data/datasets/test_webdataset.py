"""Tars that are read where they stand: what lies under one name is a sample, and nothing in them
reaches outside.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import pytest

from mipha.data.dataset import load_data
from mipha.data.datasets import webdataset
from mipha.data.images import FileSlice, image_key, open_image
from mipha.data.sample import Sample
from mipha.recipe import DataRecipe

RED, BLUE = (
    (Path(__file__).parent / "saved_by_datasets" / "red.png").read_bytes(),
    b"not a picture",
)
CONVERSATION = {
    "messages": [{"role": "user", "content": "Compare."}, {"role": "assistant", "content": "No."}]
}


def _tar(
    path: Path, *files: tuple[str, bytes | str], mode: str = "w", format: int = tarfile.PAX_FORMAT
) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode, format=format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _samples(root: Path, split: str = "train") -> list[Sample]:
    return [webdataset.DATASET.to_sample(row) for row in webdataset.load(root, split)]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_what_lies_under_one_name_is_a_sample(format: int, tmp_path: Path) -> None:
    long = "a" * 60 + "/" + "b" * 60 + "/0001"
    file = _tar(
        tmp_path / "mine.tar",
        ("0000.jpg", RED),
        ("0000.txt", "\ufeffA red square. "),
        ("0000.json", json.dumps({"url": "http://a", "width": 4})),  # as img2dataset writes it
        ("readme", "no name before a dot"),
        ("._0001.png", "what a Mac leaves behind"),
        (f"{long}.PNG", BLUE),
        (
            f"{long}.json",
            json.dumps(
                {"image": "../../etc/passwd", "question": "What?", "answer": "That", "id": "x"}
            ),
        ),
        ("text.json", json.dumps({"question": "Hello?", "answer": "Hi."})),
        format=format,
    )
    first, second, third = _samples(file)
    assert [message.text for message in first.messages] == [
        "<image>\nDescribe the image.",
        "A red square.",
    ]
    assert [message.text for message in second.messages] == ["<image>\nWhat?", "That"]
    assert (third.messages[0].text, third.images) == ("Hello?", ())
    assert [sample.id for sample in (first, second, third)] == [
        "webdataset/mine/0000",
        f"webdataset/mine/{long}/x",
        "webdataset/mine/text",
    ]
    assert open_image(first.images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert second.images[0].read() == BLUE
    assert str(first.images[0]) == f"{file}, 0000"
    assert image_key(first.images[0]) == image_key(RED)
    with pytest.raises(ValueError, match=rf"mine\.tar, {long} is not an image"):
        open_image(second.images[0])


def test_several_images_keep_their_order(tmp_path: Path) -> None:
    file = _tar(
        tmp_path / "mine.tar",
        ("7.1.png", BLUE),
        ("7.0.png", RED),
        ("7.json", json.dumps(CONVERSATION)),
    )
    (sample,) = _samples(file)
    assert sample.messages[0].text == "<image>\n<image>\nCompare."
    assert [image.read() for image in sample.images] == [BLUE, RED]
    assert [str(image) for image in sample.images] == [f"{file}, 7 image 0", f"{file}, 7 image 1"]


def test_shards_of_a_split(tmp_path: Path) -> None:
    for name in ("train-000001", "train-000000", "val-000000"):
        _tar(
            tmp_path / f"{name}.tar",
            ("a.jpg", RED),
            ("a.txt", name),
            ("b.jpg", RED),
            ("b.txt", name),
        )
    assert [sample.messages[1].text for sample in _samples(tmp_path)] == ["train-000000"] * 2 + [
        "train-000001"
    ] * 2
    assert [sample.id for sample in _samples(tmp_path, "validation")] == [
        "webdataset/val-000000/a",
        "webdataset/val-000000/b",
    ]
    rows = webdataset.load(tmp_path, "train")
    assert pickle.loads(pickle.dumps(rows))[3] == rows[3]
    assert len(webdataset.TarRecords(tmp_path / "val-000000.tar", most=1)) == 1
    assert (
        webdataset.TarRecords(tmp_path / "val-000000.tar", most=1).read(0)["caption"]
        == "val-000000"
    )


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([("a.jpg", RED)], "sample a: it has no .json and no .txt"),
        ([("a.jpg", RED), ("a.cls", "3")], "sample a: it has no .json and no .txt"),
        ([("a.json", "{}"), ("a.b.json", "{}")], "sample a: it has 2 .json"),
        ([("a.json", "{"), ("a.jpg", RED)], "sample a: its .json is not valid JSON"),
        ([("a.json", "[1]")], "sample a: its .json is .1.; wanted an object"),
        ([("a.json", "[" * 99999)], "sample a: its .json is not valid JSON"),
        ([("a.txt", b"caf\xe9"), ("a.jpg", RED)], "sample a: its text is not UTF-8"),
        (
            [("a.json", '{"label": 3}'), ("a.jpg", RED)],
            "sample a: it holds label, image, which fits no known format",
        ),
        ([("a.txt", " "), ("a.jpg", RED)], "sample a: its caption is ''"),
        ([("a.txt", "A cat."), ("b.jpg", RED)], "sample a: it has a .txt and no .* side by side"),
        ([("a.jpg", RED), ("b.txt", "")], "sample a: it has no .json and no .txt .* side by side"),
        ([("a.1.txt", "x"), ("a.2.txt", "y")], "sample a: it has 0 .* ends at its first dot"),
        ([("a.json", '{"a": 1, "a": 2}')], "sample a: an object has the key 'a' twice"),
    ],
)
def test_a_sample_that_is_wrong_is_named(files: list, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"mine\.tar, {sentence}"):
        _samples(_tar(tmp_path / "mine.tar", *files))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "mine.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(
        ValueError, match=r"mine\.tar holds 'a\.jpg', which is a link or no plain file"
    ):
        webdataset.load(tmp_path / "mine.tar", "train")


def test_tars_that_cannot_be_indexed(tmp_path: Path) -> None:
    whole = _tar(tmp_path / "whole.tar", ("a.jpg", RED * 100), ("a.txt", "x" * 5000)).read_bytes()
    for content, sentence in (
        (whole[:9000], "is it cut short"),
        (b"", "is it cut short"),
        (b"hello" * 200, "is it cut short"),
    ):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\.tar cannot be read as a tar: .*{sentence}"):
            webdataset.load(tmp_path / "bad.tar", "train")
    header = bytearray(whole[:512])
    header[124:136] = b"\x80" + b"\x7f" * 11  # a size beyond what any file has
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "bad.tar").write_bytes(bytes(header) + whole[512:])
    with pytest.raises(ValueError, match=r"bad\.tar cannot be read as a tar"):
        webdataset.load(tmp_path / "bad.tar", "train")
    (tmp_path / "bad.tar").write_bytes(b"PK\x03\x04" + bytes(2000))
    with pytest.raises(ValueError, match=r"bad\.tar cannot be read as a tar: .*it is a zip"):
        webdataset.load(tmp_path / "bad.tar", "train")
    _tar(tmp_path / "packed.tar", ("a.txt", "x"), mode="w:gz")
    with pytest.raises(ValueError, match=r"packed\.tar cannot be read as a tar: .*gunzip"):
        webdataset.load(tmp_path / "packed.tar", "train")
    for name in ("webdataset", "auto"):
        recipe = DataRecipe(dataset=name, root=tmp_path / "whole.tar", image_root=tmp_path)
        with pytest.raises(ValueError, match="image_root has no effect with the data set webdata"):
            load_data(recipe)


def test_a_tar_behind_a_tar_is_refused_and_padding_is_not(tmp_path: Path) -> None:
    """`cat a.tar b.tar` makes a file of which tarfile reads the first half."""
    one = _tar(tmp_path / "one.tar", ("a.jpg", RED), ("a.txt", "One.")).read_bytes()
    two = _tar(tmp_path / "two.tar", ("b.jpg", RED), ("b.txt", "Two.")).read_bytes()
    (tmp_path / "both.tar").write_bytes(one + two)
    with pytest.raises(ValueError, match=r"both\.tar holds another tar behind its end"):
        webdataset.load(tmp_path / "both.tar", "train")
    for padding in (bytes(20_480), b"junk" * 300):
        (tmp_path / "both.tar").write_bytes(one + padding)
        assert len(_samples(tmp_path / "both.tar")) == 1


def test_a_damaged_tar_is_nothing_worse_than_a_value_error(tmp_path: Path) -> None:
    whole = _tar(
        tmp_path / "a.tar",
        ("a.jpg", RED),
        ("a.txt", "A cat."),
        ("b" * 120 + ".jpg", RED),
        ("b.json", "{}"),
    ).read_bytes()
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.randrange(1, 20)):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / "a.tar").write_bytes(damaged)
        try:
            for row in webdataset.load(tmp_path / "a.tar", "train"):
                assert all(
                    isinstance(image, FileSlice)
                    for image in webdataset.DATASET.to_sample(row).images
                )
        except ValueError as error:
            assert str(error).startswith(str(tmp_path / "a"))


def test_files_that_are_no_part_of_a_sample_are_named(tmp_path: Path) -> None:
    file = _tar(
        tmp_path / "mine.tar",
        ("README.md", "hello"),
        ("0.jpg", RED),
        ("0.txt", "A red square."),
        ("0.npy", b"x"),
        ("0.json", json.dumps({"question": "What?", "answer": "That", "url": "http://a"})),
        ("1.svg", "<svg/>"),
        ("1.json", json.dumps({"question": "What?", "answer": "That"})),
    )
    first, second = _samples(file)
    assert [(remark.kind, remark.what) for remark in first.remarks] == [
        ("unread-key", "url"),
        ("unread-key", ".txt"),
        ("unread-key", ".npy"),
    ]
    (remark,) = second.remarks
    assert remark.kind == "unread-content" and '".svg"' in remark.what


def test_a_tar_has_its_own_images(tmp_path: Path) -> None:
    record = {"left_image": "x.png", "right_image": "y.png", "question": "Same?", "answer": "No"}
    file = _tar(
        tmp_path / "mine.tar", ("0.0.jpg", RED), ("0.1.jpg", RED), ("0.json", json.dumps(record))
    )
    (sample,) = _samples(file)
    assert len(sample.images) == 2 and all(isinstance(one, FileSlice) for one in sample.images)


def test_images_that_the_record_names_and_the_tar_lacks(tmp_path: Path) -> None:
    record = {"images": ["a.jpg", "b.jpg"], "question": "What?", "answer": "That"}
    file = _tar(tmp_path / "mine.tar", ("0.jpg", RED), ("0.json", json.dumps(record)))
    with pytest.raises(ValueError, match=r"sample 0: its \.json names 2 images, and 1 lie beside"):
        _samples(file)
