"""Boxes and points in records of own data: what they mean is said, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mipha.data.check.linter import check_data
from mipha.data.dataset import LoadedData, data_recipe, load_data
from mipha.data.faults import RecordError
from mipha.data.mixture import Mixture
from mipha.data.region_text import write_sample
from mipha.data.sample import Sample


def _load(root: Path, row: dict[str, Any], *settings: str) -> LoadedData:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 100), "red").save(root / "a.png")
    Image.new("RGB", (200, 100), "red").save(root / "turned.png", exif=exif)
    (root / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return load_data(data_recipe(str(root / "rows.jsonl"), settings=settings))


def _sample(root: Path, row: dict[str, Any], *settings: str) -> Sample:
    data = _load(root, row, *settings)
    return data.to_sample(data.records[0])


def _asked(question: str, answer: str, image: str = "a.png", **objects: Any) -> dict[str, Any]:
    turns = [("user", question), ("assistant", answer)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"messages": messages, "images": [image], "objects": objects}


def _conversation(question: str, answer: str, **objects: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "image": "a.png", "objects": objects}


@pytest.mark.parametrize("make", [_asked, _conversation])
def test_placeholders_are_filled_in_order(make: Any, tmp_path: Path) -> None:
    row = make(
        "Where are <ref-object> and <ref-object>?",
        "<bbox> and <bbox>.",
        ref=["it", "that"],
        bbox=[[0, 0, 100, 50], [100, 50, 200, 100]],
    )
    sample = _sample(tmp_path, row)
    assert [region.numbers for region in sample.regions] == [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)]
    assert [region.label for region in sample.regions] == ["it", "that"]
    assert sample.messages[0].text.endswith("Where are it and that?")
    assert (
        write_sample(sample, None).messages[1].text
        == "[0, 0, 500, 500] and [500, 500, 1000, 1000]."
    )
    assert sample.remarks == ()


@pytest.mark.parametrize(
    ("objects", "settings", "wanted"),
    [
        ({"bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1"}, [], (0.1, 0.2, 0.3, 0.4)),
        ({"bbox": [[100, 200, 300, 400]]}, ["bbox_scale=thousand"], (0.1, 0.2, 0.3, 0.4)),
        ({"bbox": [[20, 20, 40, 20]]}, ["bbox_format=xywh"], (0.1, 0.2, 0.3, 0.4)),
        ({"bbox": [[0.1, 0.35, 0.3, 0.45]]}, ["bbox_scale=square"], (0.1, 0.2, 0.3, 0.4)),
        ({"bbox": [[20, 20]]}, [], (0.1, 0.2)),
    ],
)
def test_the_recipe_says_what_numbers_are(
    objects: dict, settings: list[str], wanted: tuple, tmp_path: Path
) -> None:
    (region,) = _sample(tmp_path, _asked("Where?", "<bbox>", **objects), *settings).regions
    assert region.numbers == pytest.approx(wanted)


def test_an_image_that_is_stored_turned(tmp_path: Path) -> None:
    """Stored 200 x 100, shown 100 x 200: the left half as stored is the upper half upright."""
    row = _asked("Where?", "<bbox>", image="turned.png", bbox=[[0, 0, 100, 100]])
    (region,) = _sample(tmp_path, row, "bbox_frame=stored").regions
    assert (region.numbers, region.size) == ((0, 0, 1, 0.5), (100, 200))
    (region,) = _sample(tmp_path, row).regions
    assert region.numbers == (0, 0, 1, 0.5), "the same numbers in the upright image"


@pytest.mark.parametrize(
    ("row", "kind", "sentence"),
    [
        (_asked("?", "<bbox>", bbox=[]), "region-count", "1 <bbox> for 0 of its objects"),
        (_asked("<ref-object>?", "!", ref=["a", "b"]), "region-count", "1 <ref-object> for 2"),
        (_asked("?", "<bbox>", bbox=[[1, 2, 3]]), "region-scale", "wanted four numbers"),
        (_asked("?", "<bbox>", bbox=[["a", 2]]), "region-scale", "wanted four numbers"),
        (_asked("?", "<bbox>", bbox=[[0.1, 0.1, 0.2, 1]]), "region-scale", "fractions where"),
        (
            _asked("?", "<bbox>", bbox=[[9, 9, 20, 30]], bbox_type="norm1"),
            "region-scale",
            "more than 1 where fractions are meant",
        ),
        (_asked("?", "<bbox>", bbox=[[9, 9, 2, 3]], bbox_type="x"), "region-scale", "bbox_type"),
        (_asked("?", "<bbox>", bbox=[[9, 9, 300, 30]]), "region-outside", "reaches outside"),
        (_asked("?", "<bbox>", bbox=[[9, 9, 20, 9]]), "region-empty", "has no area"),
        (_asked("?", "<bbox>", bbox=[[1, 2, 3, 4]], image_id=[1]), "region-count", "image 1 of 1"),
        (_asked("?", "<bbox>", "gone.png", bbox=[[1, 2, 3, 4]]), "missing-image", "no image file"),
        ({"image": "a.png", "captions": [""], "bbox": [1, 2, 3, 4]}, "malformed", "not empty"),
        (
            {"image": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": [7]}},
            "region-count",
            "wanted the name of each in words",
        ),
        (_asked("?", "<bbox>", bbox=5), "region-count", "the bbox of its objects is '5'"),
        (_asked("?", "<bbox>", bbox=[[9, 9, 20, 30]], bbox_type=["real"]), "region-scale", "type"),
        (_asked("?", "<bbox>", bbox=[[9, 9, 20, 30]], image_id=1), "region-count", "image_id of"),
        (_asked("?", "<bbox>", bbox=[[9, 9, 20, 30]], image_id=[0, 0]), "region-count", "2 image_"),
        (_asked("<ref-object>?", "!", ref="a"), "region-count", "the ref of its objects is 'a'"),
        (_asked("<ref-object>?", "!", ref=[None]), "malformed", "wanted a list of texts"),
        (
            {"image": "a.png", "objects": {"bbox": 7, "category": ["a cat"]}},
            "region-count",
            "the bbox of its objects is '7'",
        ),
    ],
)
def test_what_is_wrong_is_named(row: dict, kind: str, sentence: str, tmp_path: Path) -> None:
    settings = () if "objects" in row and "messages" in row else ("bbox_format=xyxy",)
    with pytest.raises(RecordError, match=sentence) as raised:
        _sample(tmp_path, row, *settings)
    assert raised.value.kind == kind and "rows.jsonl" in str(raised.value)


def test_detections_are_one_answer(tmp_path: Path) -> None:
    row = {
        "image": "a.png",
        "objects": {"bbox": [[0, 0, 100, 50], [100, 50, 100, 50]], "category": ["cat", "dog"]},
    }
    sample = write_sample(_sample(tmp_path, row, "bbox_format=xywh"), None)
    assert sample.messages[1].text == "cat [0, 0, 500, 500]\ndog [500, 500, 1000, 1000]"
    row["objects"] = {"bbox": [], "category": []}
    assert _sample(tmp_path, row, "bbox_format=xywh").messages[1].text == "There are none."


@pytest.mark.parametrize(
    ("points", "count", "sentence"),
    [
        ({"x": [10, 20, 30], "y": [10, 20]}, None, r"a region is '\[30, None\]'"),
        ([], 2, "its count is 2, and it has 0 points"),
        ([{"x": 1, "y": 2}, {"x": 5, "y": 6}], 3, "its count is 3, and it has 2 points"),
    ],
)
def test_no_point_is_lost(points: Any, count: int | None, sentence: str, tmp_path: Path) -> None:
    row = {"image": "a.png", "label": "cats", "points": points, "count": count}
    with pytest.raises(RecordError, match=sentence):
        _sample(tmp_path, row, "point_scale=100")


def test_empty_columns_of_other_kinds_of_rows_say_nothing(tmp_path: Path) -> None:
    box = {"image": "a.png", "captions": ["the cat"], "bbox": [0, 0, 100, 50], "objects": None}
    rows = [
        box | {"points": None, "label": None, "question": None},
        {"image": "a.png", "objects": {"bbox": [[0, 0, 9, 9]], "category": ["cat"]}, "query": None},
    ]
    for row, said in zip(rows, ("<region>", "cat <region>"), strict=True):
        assert _sample(tmp_path, row, "bbox_format=xyxy").messages[1].text == said


def test_a_key_is_heeded_wherever_its_rows_stand(tmp_path: Path) -> None:
    rows = [_asked("What?", "That."), {"image": "a.png", "label": "cats", "points": []}]
    _load(tmp_path, rows[0])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(data_recipe(str(tmp_path / "rows.jsonl"), settings=["point_scale=100"]))
    assert data.to_sample(data.records[1]).messages[1].text == "There are none."
    with pytest.raises(ValueError, match="min_ratings has no effect with the data set messages"):
        load_data(data_recipe(str(tmp_path / "rows.jsonl"), settings=["min_ratings.a=1"]))


def test_marks_are_followed(tmp_path: Path) -> None:
    row = {"image": "a.png", "label": "cats", "points": []}
    sample = _sample(tmp_path, row | {"loss_mask": [1, 0]}, "point_scale=100")
    assert not sample.messages[1].learned and not sample.remarks
    with pytest.raises(RecordError, match="so nothing of it is to be learned"):
        _sample(tmp_path, row | {"train": False}, "point_scale=100")


def test_a_tag_without_objects_stays_text(tmp_path: Path) -> None:
    sample = _sample(tmp_path, _asked("What is <region>?", "A tag."))
    assert (sample.regions, sample.messages[0].text) == ((), "<image>\nWhat is <region>?")


def test_the_hash_of_the_data_knows_the_boxes(tmp_path: Path) -> None:
    def digest(*box: int) -> str:
        _load(tmp_path, _asked("?", "<bbox>", bbox=[list(box)]))
        return Mixture([data_recipe(str(tmp_path / "rows.jsonl"))]).check()

    assert digest(1, 2, 30, 40) == digest(1, 2, 30, 40) != digest(1, 2, 30, 41)


def test_a_check_finds_nothing_wrong_with_numbers(tmp_path: Path) -> None:
    data = _load(tmp_path, _asked("Where?", "<bbox>", bbox=[[1, 2, 30, 40]]))
    kinds = {finding.kind for finding in check_data(data, workers=1).findings}
    assert kinds == {"blank-image"}
