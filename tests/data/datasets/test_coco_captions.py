"""COCO's captions file: the published layout, its two splits, and annotations that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mipha.cli import app
from mipha.data.datasets import coco_captions
from mipha.data.sample import Sample

IMAGES = [
    {"id": 9, "file_name": "000000000009.jpg", "height": 48, "width": 64, "license": 3},
    {"id": 25, "file_name": "000000000025.jpg", "height": 48, "width": 64, "license": 2},
]
ANNOTATIONS = [
    {"image_id": 25, "id": 1, "caption": "A giraffe eats the leaves of a tall tree."},
    {"image_id": 9, "id": 2, "caption": "Some food on a tray. "},
    {"image_id": 25, "id": 3, "caption": "Two giraffes stand near a tree in a park."},
]


def write(
    root: Path, annotations: Any = ANNOTATIONS, images: Any = IMAGES, split: str = "train2017"
) -> Path:
    """The captions file and the images of a split."""
    root.mkdir(exist_ok=True)
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (root / f"captions_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    (root / split).mkdir(exist_ok=True)
    for image in IMAGES:
        noise = Image.effect_noise((64, 48), 40 + int(image["id"]))
        noise.convert("RGB").save(root / split / str(image["file_name"]))
    return root


def samples(root: Path, split: str = "train", *image_root: Path) -> list[Sample]:
    rows = coco_captions.load(root, split, image_root)
    return [coco_captions.DATASET.to_sample(row) for row in rows]


def test_a_sample_is_one_caption_of_its_image(tmp_path: Path) -> None:
    first, second, third = samples(write(tmp_path))
    assert [first.id, second.id] == [
        "coco_captions/train2017/0/1",
        "coco_captions/train2017/1/2",
    ]
    assert [(message.role, message.text) for message in first.messages] == [
        ("user", "<image>\nDescribe the image."),
        ("assistant", "A giraffe eats the leaves of a tall tree."),
    ]
    assert first.images == third.images == (tmp_path / "train2017" / "000000000025.jpg",)
    assert second.images == (tmp_path / "train2017" / "000000000009.jpg",)


def test_the_files_of_a_split(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, ANNOTATIONS[:1], split="val2017")
    (only,) = samples(tmp_path, "validation")
    assert only.images == (tmp_path / "val2017" / "000000000025.jpg",)

    # As COCO's archives unpack.
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "captions_train2017.json"
    file.rename(tmp_path / "annotations" / file.name)
    assert samples(tmp_path)[0].images == (tmp_path / "train2017" / "000000000025.jpg",)
    elsewhere = tmp_path / "elsewhere"
    assert samples(tmp_path, "train", elsewhere)[0].images == (elsewhere / "000000000025.jpg",)


@pytest.mark.parametrize(
    ("annotation", "sentence"),
    [
        ("a dog", "the row is not an object: a dog"),
        ({"image_id": 9}, "its caption is 'None'"),
        ({"image_id": 9, "caption": " "}, "its caption is ' '"),
        ({"image_id": 7, "caption": "A dog."}, "its image_id is 7, which no image of the file has"),
        ({"caption": "A dog."}, "its image_id is None"),
        ({"image_id": [9], "caption": "A dog."}, r"its image_id is \[9\]"),
    ],
)
def test_a_malformed_annotation_is_named(annotation: Any, sentence: str, tmp_path: Path) -> None:
    write(tmp_path, [ANNOTATIONS[0], annotation])
    with pytest.raises(ValueError, match=rf"captions_train2017\.json, annotation 1: {sentence}"):
        samples(tmp_path)


def test_a_path_that_leads_out_is_refused(tmp_path: Path) -> None:
    write(tmp_path, images=[{"id": 25, "file_name": "../../secret.jpg"}])
    with pytest.raises(ValueError, match=r"annotation 0: the image path '\.\./\.\./secret\.jpg'"):
        samples(tmp_path)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test': use train or validation"):
        coco_captions.load(tmp_path, "test")
    with pytest.raises(ValueError, match="no packaged copy"):
        coco_captions.load(None, "train")
    with pytest.raises(FileNotFoundError, match=r"annotations/captions_train2017\.json"):
        coco_captions.load(tmp_path, "train")
    for content, sentence in (
        ("[]", "has no lists of images and annotations"),
        ('{"images": {}, "annotations": []}', "has no lists of images and annotations"),
        ('{"images": [{"id": "9"}], "annotations": []}', "image 0 is not"),
        ("[", "not valid JSON"),
    ):
        (tmp_path / "captions_train2017.json").write_text(content)
        with pytest.raises(ValueError, match=rf"captions_train2017\.json.*{sentence}"):
            coco_captions.load(tmp_path, "train")


def test_the_data_set_is_checked_by_its_name(tmp_path: Path) -> None:
    root = write(tmp_path / "coco")
    done = CliRunner().invoke(app, ["check", "coco_captions", "--root", str(root)])
    assert done.exit_code == 0 and "3 rows, 3 samples, 3 images (2 different)" in done.output, (
        done.output
    )
    write(root, [*ANNOTATIONS, {"image_id": 7, "caption": "A dog."}])
    (root / "train2017" / "000000000009.jpg").unlink()
    done = CliRunner().invoke(app, ["check", "coco_captions", "--root", str(root)])
    said = " ".join(done.output.split())
    assert done.exit_code == 1 and "its image_id is 7" in said, said
    assert "there is no file" in said, said
