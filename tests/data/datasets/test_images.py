"""Images that records name: inside the data's own folders, whatever a record says and whatever
links there are.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mipha.data.datasets._images import (
    ImageFolders,
    image_folders,
    image_source,
    path_inside,
    with_images,
)
from mipha.data.datasets._keys import Keys
from mipha.data.images import FileSlice


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A record file beside pictures, inner and outer links, and a secret next door."""
    folder, outside = tmp_path / "data", tmp_path / "outside"
    (folder / "pictures").mkdir(parents=True)
    outside.mkdir()
    for file in (folder / "a.png", folder / "pictures" / "b.png", outside / "secret.png"):
        file.write_bytes(b"x")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "inner.png").symlink_to("pictures/b.png")
    (folder / "chain.png").symlink_to("link.png")
    (folder / "elsewhere").symlink_to(outside)
    (folder / "loop").symlink_to("loop")
    (tmp_path / "data and more").mkdir()
    (tmp_path / "data and more" / "secret.png").write_bytes(b"x")
    (folder / "train.jsonl").touch()
    return folder / "train.jsonl"


def test_base64_is_an_image(data: Path) -> None:
    noise = Image.effect_noise((20, 20), 90)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    text = base64.encodebytes(buffer.getvalue()).decode()  # in lines
    for value in (text, f"data:image/png;base64,{text}", f"DATA:image/png;base64,{text}"):
        assert image_source(value, image_folders(data), "here") == buffer.getvalue()


@pytest.mark.parametrize(
    "path",
    [
        "a.png",
        "./a.png",
        "pictures/b.png",
        "pictures/../a.png",
        "inner.png",
        "not yet there.png",
        "a b,c:d.png",
    ],
)
def test_a_path_inside_is_the_path_as_written(path: str, data: Path) -> None:
    assert path_inside(image_folders(data), path, "here") == data.parent / path


def test_an_absolute_path_inside_is_one_too(data: Path) -> None:
    assert (
        path_inside(image_folders(data), str(data.parent / "a.png"), "here")
        == data.parent / "a.png"
    )


@pytest.mark.parametrize(
    "path",
    [
        "../outside/secret.png",
        "pictures/../../outside/secret.png",
        "link.png",
        "chain.png",
        "elsewhere/secret.png",
        "/etc/passwd",
        "//etc/passwd",
        "../data and more/secret.png",
        "elsewhere/../secret.png",
        "..",
        ".",
        "pictures/..",
        "C:\\x.png",
        "C:x.png",
        "\\x.png",
        "a\\..\\..\\x.png",
    ],
)
def test_a_path_that_leads_out_is_refused(path: str, data: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^train\.jsonl, line 3: the image path .* leads out of .*data"
    ):
        path_inside(image_folders(data), path, "train.jsonl, line 3")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("http://host/a.png", "is an address; nothing is downloaded"),
        ("https://host/a.png", "is an address"),
        ("file:///etc/passwd", "leads out"),
        ("file://localhost/etc/passwd", "leads out"),
        ("s3://bucket/a.png", "is an address"),
        ("loop/a.png", "leads out|cannot be followed"),
        ("a" * 300, "cannot be followed"),
        ("\ud800.png", "cannot be followed"),
        ("a\0.png", "wanted a path"),
        ("", "wanted a path"),
        (None, "is None; wanted a path"),
        (["a.png"], "wanted a path"),
        (7, "wanted a path"),
        ({"path": None}, "wanted a path"),
        ({"caption": "a"}, "wanted a path"),
        ("data:image/png;base64,@@", "not valid base64"),
        ("data:image/png,abc", "not valid base64"),
    ],
)
def test_what_is_no_path_is_refused(path: object, sentence: str, data: Path) -> None:
    with pytest.raises(ValueError, match=rf"^line 3: the image .*({sentence})"):
        image_source(path, image_folders(data), "line 3")


def test_an_image_root_opens_one_more_folder_and_moves_the_start(data: Path) -> None:
    outside = data.parent.parent / "outside"
    moved = image_folders(data, [outside])
    assert path_inside(moved, "secret.png", "here") == outside / "secret.png"
    assert path_inside(moved, str(data.parent / "a.png"), "here") == data.parent / "a.png"
    both = image_folders(data, [data.parent, outside])
    for name in ("a.png", "link.png", "elsewhere/secret.png", "../outside/secret.png"):
        assert path_inside(both, name, "here") == data.parent / name
    with pytest.raises(ValueError, match="leads out"):
        path_inside(both, "../data and more/secret.png", "here")


def test_the_refusal_says_what_to_write(data: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"image_root=\[{data.parent}, {data.parent.parent / 'outside'}\]$"
    ):
        path_inside(image_folders(data), "link.png", "here")


def test_a_folder_is_looked_at_where_it_is_now(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative folders mean another place when the working directory changes."""
    folders = ImageFolders(Path("."), (str(data.parent),))
    monkeypatch.chdir(data.parent)
    assert path_inside(folders, "a.png", "here") == Path("a.png")
    monkeypatch.chdir(data.parent.parent)
    with pytest.raises(ValueError, match="leads out"):
        path_inside(folders, "a.png", "here")


def test_the_hubs_download_cache_is_one_folder(tmp_path: Path) -> None:
    """There every file is a link, `snapshots/<revision>/a.png` -> `blobs/<hash>`."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1f"
    blobs.mkdir()
    (snapshot / "images").mkdir(parents=True)
    for name, blob in (("train.jsonl", "aa"), ("images/b.png", "bb")):
        (blobs / blob).write_bytes(b"x")
        (snapshot / name).symlink_to(blobs / blob)
    folders = image_folders(snapshot / "train.jsonl")
    assert path_inside(folders, "images/b.png", "here") == snapshot / "images/b.png"
    with pytest.raises(ValueError, match="leads out"):
        path_inside(folders, "../../secret", "here")


def test_which_images_a_record_gives() -> None:
    place = FileSlice(Path("x.tar"), 0, 1, "a")

    def images(**content: object) -> list[object]:
        return Keys(content, ImageFolders(Path("/"), ()), "here").take_images()

    assert images(text="hello") == images(image=None, images=None) == []
    assert images(image="a", path="b") == ["a"]
    assert images(images=["a", "b"], image="c") == ["a", "b"]
    assert images(image=["a", "b"]) == ["a", "b"]
    assert images(file_name="a", image=None) == ["a"]
    assert images(image_2="b", image_1="a", image_10="c") == ["a", "b", "c"]
    assert images(image="a", image2="b", file_name="a") == ["a", "b"]
    assert images(left_image="b", right_image="a") == ["b", "a"]
    assert images(image_id="3", image_size="4", image_3=None, caption_image_1=7) == []
    assert image_source(place, ImageFolders(Path("/"), ()), "here") == place
    assert image_source({"bytes": b"x", "path": "y"}, ImageFolders(Path("/"), ()), "here") == b"x"
    with pytest.raises(ValueError, match=r'here: "images" is .a.; wanted a list of paths'):
        images(images="a")
    assert with_images({"image": "../a", "path": "b", "text": "t"}, [place]) == {
        "text": "t",
        "image": place,
    }
    assert with_images({"image": "../a"}, []) == {"images": []}


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=_json | st.text(alphabet="./\\:a~\0\ud800", max_size=12))
def test_nothing_that_a_record_says_reads_outside(
    value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(tmp_path_factory.getbasetemp()).resolve()
    try:
        source = image_source(value, image_folders(folder / "train.jsonl"), "here")
    except ValueError as error:
        assert str(error).startswith("here: ")
    else:
        assert isinstance(source, bytes) or source.resolve().is_relative_to(folder)
        json.dumps(value)
