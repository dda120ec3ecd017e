"""Parquet with images as bytes or as paths: rows are records, and pixels stay in the file until
they are wanted.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mipha.data.check.images import image_facts
from mipha.data.datasets import parquet
from mipha.data.faults import RecordError
from mipha.data.images import open_image
from mipha.data.sample import Sample

pyarrow = pytest.importorskip("pyarrow")
SAVED = Path(__file__).parent / "saved_by_datasets"
TURNED = Image.Exif()
TURNED[0x0112] = 6
RED = (SAVED / "red.png").read_bytes()


def _samples(root: Path, **options: Any) -> list[Sample]:
    return [parquet.DATASET.to_sample(row) for row in parquet.load(root, "train", **options)]


def _write(path: Path, row_group_size: int = 2, **columns: list) -> Path:
    import pyarrow.parquet

    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def test_an_image_a_row_over_several_row_groups() -> None:
    first, text, last = _samples(SAVED / "questions.parquet")
    assert [message.text for message in first.messages] == ["<image>\nWhich colour?", "red"]
    assert (text.images, text.messages[0].text) == ((), "Hello?")
    assert open_image(first.images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(last.images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert str(last.images[0]).endswith("questions.parquet, row 0 of row group 1")
    assert last.id == "parquet/questions/2"


def test_lists_of_images() -> None:
    both, text, one = _samples(SAVED / "messages.parquet")
    assert [open_image(image).getpixel((0, 0)) for image in both.images] == [
        (255, 0, 0),
        (0, 0, 255),
    ]
    assert both.messages[0].text == "<image>\n<image>\nCompare."
    assert (text.images, len(one.images)) == ((), 1)


def test_paths_instead_of_bytes_are_paths(tmp_path: Path) -> None:
    """`Dataset.to_parquet` writes them so where the images were files; then they stay inside the
    data's folder like any path.
    """
    assert _samples(SAVED / "paths.parquet")[0].images == (SAVED / "red.png",)
    shutil.copy(SAVED / "paths.parquet", tmp_path)
    (tmp_path / "red.png").symlink_to(SAVED / "red.png")
    with pytest.raises(
        ValueError, match=r"paths\.parquet, row 0: the image path 'red\.png' leads out"
    ):
        _samples(tmp_path / "paths.parquet")
    assert _samples(tmp_path / "paths.parquet", image_root=[SAVED])[0].images == (
        SAVED / "red.png",
    )
    plain = _write(
        tmp_path / "plain.parquet",
        image_path=["a.png", None],
        question=["What?", "Hello?"],
        answer=["That", "Hi."],
    )
    assert [sample.images for sample in _samples(plain)] == [(tmp_path / "a.png",), ()]


@pytest.mark.parametrize("name", ["image", "picture", "jpg"])
def test_plain_bytes_under_any_name(name: str, tmp_path: Path) -> None:
    file = _write(
        tmp_path / "a.parquet",
        **{name: [RED, None, RED], "question": ["a", "b", "c"], "answer": ["d", "e", "f"]},
    )
    first, text, last = _samples(file)
    assert (first.images[0].read(), text.images, last.images[0].read()) == (RED, (), RED)


def test_lists_of_plain_bytes(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "a.parquet",
        images=[[RED, b"x"], [], None],
        question=["a", "b", "c"],
        answer=["d", "e", "f"],
    )
    assert [[image.read() for image in sample.images] for sample in _samples(file)] == [
        [RED, b"x"],
        [],
        [],
    ]


def test_cells_that_hold_json(tmp_path: Path) -> None:
    turns = '[{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That"}]'
    file = _write(tmp_path / "a.parquet", image=[RED], conversations=[turns])
    (sample,) = _samples(file)
    assert [message.text for message in sample.messages] == ["<image>\nWhat?", "That"]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([["a"], ["b"]], names=["image", "image"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has two columns 'image': rename one"):
        parquet.load(tmp_path / "a.parquet", "train")


def test_the_column_named_image_is_the_image(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.parquet", mask=[b"m"], image=[RED], question=["a"], answer=["b"])
    assert _samples(file)[0].images[0].read() == RED
    file = _write(tmp_path / "b.parquet", left=[b"m"], right=[RED], question=["a"], answer=["b"])
    with pytest.raises(
        ValueError, match=r"b\.parquet has images in the columns left, right: rename"
    ):
        parquet.load(file, "train")


def test_files_of_a_split_in_the_hubs_layout(tmp_path: Path) -> None:
    for shard in (1, 0):
        _write(
            tmp_path / f"data/train-0000{shard}-of-00002.parquet",
            question=[f"{shard}"] * 3,
            answer=["x"] * 3,
        )
    _write(tmp_path / "data/test-00000-of-00001.parquet", question=["t"], answer=["x"])
    rows = parquet.load(tmp_path, "train")
    assert [row.content["question"] for row in rows] == ["0"] * 3 + ["1"] * 3
    assert rows[4].id == "parquet/data/train-00001-of-00002/1"
    assert pickle.loads(pickle.dumps(rows))[4] == rows[4]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "a.parquet",
        image=[{"bytes": RED, "path": None}, {"bytes": None, "path": "x.png"}],
        label=[1, 2],
    )
    with pytest.raises(
        ValueError, match=r"a\.parquet, row 0: it holds label, image, which fits no known format"
    ):
        _samples(file)
    file = _write(
        tmp_path / "b.parquet",
        image=[{"bytes": RED, "path": None}, {"bytes": None, "path": "x.png"}],
        text=["a", "b"],
    )
    with pytest.raises(FileNotFoundError, match=r"no image file .*x\.png"):
        open_image(_samples(file)[1].images[0])
    for number, content in enumerate((b"", b"PAR1 and no more", file.read_bytes()[:-20])):
        (tmp_path / f"{number}.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{number}\.parquet cannot be read as parquet"):
            parquet.load(tmp_path / f"{number}.parquet", "train")
    damaged = bytearray(file.read_bytes())
    damaged[4:200] = bytes(196)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"damaged\.parquet, row 0(: it| of row group 0)? cannot be read"
    ):
        open_image(_samples(tmp_path / "damaged.parquet")[0].images[0])


def test_bytes_and_paths_in_one_column(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(RED)
    inside, outside = {"bytes": RED, "path": "x.png"}, {"bytes": None, "path": "x.png"}
    nothing = {"bytes": None, "path": None}
    texts = [{"user": "a", "assistant": "b"}]
    one = [inside, outside, None, nothing]
    (first, second, third, fourth) = _samples(
        _write(tmp_path / "a.parquet", 4, image=one, texts=[texts] * 4)
    )
    assert second.images == (tmp_path / "x.png",) and third.images == ()
    assert [kind for kind, _ in image_facts(fourth.images[0], "it").problems] == ["missing-image"]

    many = [[inside, outside], [], [outside], [inside]]
    samples = _samples(_write(tmp_path / "b.parquet", 4, images=many, texts=[texts] * 4))
    assert [len(sample.images) for sample in samples] == [2, 0, 1, 1]
    for image in (first.images[0], samples[0].images[0], samples[3].images[0]):
        assert image.read() == RED
    assert samples[0].images[1:] == samples[2].images == (tmp_path / "x.png",)


def test_nulls_in_a_column_of_image_lists(tmp_path: Path) -> None:
    """None and [] are text alone; a null inside is an error, in the middle as at the end."""
    file = _write(
        tmp_path / "a.parquet",
        images=[None, [], [None, {"bytes": RED, "path": None}]],
        texts=[[{"user": "a", "assistant": "b"}]] * 3,
    )
    rows = parquet.load(file, "train")
    assert [parquet.DATASET.to_sample(row).images for row in (rows[0], rows[1])] == [(), ()]
    with pytest.raises(RecordError, match=r"row 2: image 0 of its 2 images is null") as raised:
        parquet.DATASET.to_sample(rows[2])
    assert raised.value.kind == "null-image"


def test_an_image_without_bytes_and_path_is_missing(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "a.parquet",
        image=[{"bytes": RED, "path": None}, {"bytes": None, "path": None}],
        text=["a", "b"],
    )
    facts = image_facts(_samples(file)[1].images[0], "it")
    assert [kind for kind, _ in facts.problems] == ["missing-image"]


def test_other_arrow_types_hold_the_same_records(tmp_path: Path) -> None:
    """Large lists, dictionary-encoded words, and the object of lists of `datasets` before 4."""
    texts = [{"user": ["a", "c"], "assistant": ["b", "d"]}]
    words = pyarrow.array(["here"]).dictionary_encode()
    images = pyarrow.array([[RED]], pyarrow.large_list(pyarrow.large_binary()))
    file = _write(tmp_path / "a.parquet", images=images, texts=texts, source=words)
    (sample,) = _samples(file)
    assert [m.text for m in sample.messages] == ["<image>\na", "b", "c", "d"]
    assert (sample.images[0].read(), sample.remarks) == (RED, ())


@pytest.mark.parametrize(
    ("mode", "kind", "more"),
    [
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {"transparency": 0}),
        ("CMYK", "JPEG", {}),
        ("I;16", "PNG", {}),
        ("P", "GIF", {"save_all": True, "append_images": [Image.new("P", (8, 6))]}),
        ("RGB", "WEBP", {"save_all": True, "append_images": [Image.new("RGB", (8, 6))]}),
        ("RGB", "MPO", {"save_all": True, "append_images": [Image.new("RGB", (8, 6))]}),
        ("RGB", "JPEG", {"exif": TURNED}),
    ],
)
def test_pixels_are_those_of_the_file(mode: str, kind: str, more: dict, tmp_path: Path) -> None:
    image = Image.new(mode, (8, 6))
    image.putpixel((3, 2), {"RGBA": (255, 0, 0, 255), "LA": (9, 200)}.get(mode, 0))
    image.save(tmp_path / "a", kind, **more)
    content = (tmp_path / "a").read_bytes()
    file = _write(tmp_path / "a.parquet", image=[{"bytes": content, "path": "a"}], text=["a"])
    stored = open_image(_samples(file)[0].images[0])
    assert stored.tobytes() == open_image(tmp_path / "a").tobytes()
    assert stored.size == ((6, 8) if "exif" in more else (8, 6))


def test_a_scan_gives_the_rows_without_their_images(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "a.parquet",
        image=[RED] * 3,
        texts=[{"user": ["a"], "assistant": [answer]} for answer in "bcd"],
        source=["x"] * 3,
    )
    rows = parquet.load(file, "train")
    wanted = [{"texts": row.content["texts"]} for row in rows]
    assert list(rows.scan(lambda key: key == "texts")) == wanted
    assert wanted[2] == {"texts": [{"user": "a", "assistant": "d"}]}
