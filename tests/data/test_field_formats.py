"""Small data sets in the formats of the field, read as their `expected.json` says.

Each folder of `field/` has a README that says what is odd about its rows.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mipha.cli.program import app
from mipha.data.dataset import LoadedData, data_recipe, load_data
from mipha.data.images import open_image
from mipha.data.region_text import write_sample
from mipha.data.sample import IMAGE, Sample

pytest.importorskip("pyarrow")
FIELD = Path(__file__).parent / "field"


def _expected(folder: str) -> dict[str, Any]:
    return json.loads((FIELD / folder / "expected.json").read_text(encoding="utf-8"))


def _load(path: str, *settings: str) -> LoadedData:
    return load_data(data_recipe(str(FIELD / path), settings=settings))


def _samples(data: LoadedData) -> list[Sample]:
    return [data.to_sample(data.records[row]) for row in range(len(data))]


def _said(samples: list[Sample], role: str = "assistant") -> list[list[str]]:
    return [[m.text for m in sample.messages if m.role == role] for sample in samples]


def _check(path: str, tmp_path: Path, *arguments: str, code: int | None = None) -> dict[str, Any]:
    """Run `mipha check --json` as a user does."""
    out = tmp_path / "out.json"
    result = CliRunner().invoke(
        app, ["check", str(FIELD / path), *arguments, "--json", str(out)], catch_exceptions=False
    )
    assert code is None or result.exit_code == code, result.output
    return json.loads(out.read_text(encoding="utf-8"))


def _rows_of(report: dict[str, Any], *left_out: str) -> list[tuple[int, str]]:
    return sorted(
        (found["row"], found["kind"])
        for found in report["findings"]
        if found["row"] is not None and found["kind"] not in left_out
    )


def test_finevision_is_read_by_config(tmp_path: Path) -> None:
    expected = _expected("finevision-mirror")
    for config, wanted in expected["configs"].items():
        samples = _samples(_load(f"finevision-mirror/mirror/{config}"))
        assert [len(sample.images) for sample in samples] == wanted["no_filter"]["images"]
        assert _said(samples) == wanted["no_filter"]["assistant"]
    report = _check("finevision-mirror/mirror/ocr", tmp_path)
    assert _rows_of(report) == [(found["row"], found["kind"]) for found in expected["findings"]]


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("min_ratings.relevance=2", "min_ratings relevance 2"),
        ("min_ratings.visual_dependency=3", "min_ratings visual_dependency 3"),
    ],
)
def test_turns_that_are_rated_low_leave(setting: str, wanted: str, tmp_path: Path) -> None:
    numbers = _expected("finevision-mirror")["configs"]["ocr"][wanted]
    report = _check("finevision-mirror/mirror/ocr", tmp_path, setting)
    assert {key: report[key] for key in numbers} == numbers
    turns = sum(map(len, _said(_samples(_load("finevision-mirror/mirror/ocr", setting)))))
    assert turns == 12 - numbers["turns_left_out"] == sum(f["turns"] for f in report["files"])


def test_a_rating_that_nobody_gave_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"names beauty, and the data have formatting, image_"):
        _load("finevision-mirror/mirror/ocr", "min_ratings.beauty=2")
    with pytest.raises(ValueError, match="leaves out all 2 samples"):
        _load("cauldron-rated.jsonl", "min_ratings.relevance=4")
    with pytest.raises(ValueError, match="min_ratings has no effect with the data set sharegpt"):
        _load("several-images/train.json", "min_ratings.relevance=4")


def test_ratings_may_be_text_or_none_at_all(tmp_path: Path) -> None:
    turns = [{"user": "a?", "assistant": "b"}, {"user": "c?", "assistant": "d"}]
    row = {"images": [], "texts": turns, "relevance_ratings": ["1", "?"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    data = _load(str(tmp_path / "a.jsonl"), "min_ratings.relevance=2")
    assert _said(_samples(data)) == [["d"]]
    assert data.rated is not None and (data.rated.turns_left_out, data.rated.unrated_turns) == (
        1,
        1,
    )


def test_null_ratings_pass_and_are_counted() -> None:
    data = _load("finevision-mirror/mirror/general", "min_ratings.relevance=5")
    assert _said(_samples(data)) == [["Another."]]
    assert data.rated is not None and data.rated._asdict() == {
        "turns_left_out": 1,
        "samples_left_out": 1,
        "unrated_turns": 1,
    }


def test_the_cauldron() -> None:
    expected, samples = _expected("cauldron"), _samples(_load("cauldron"))
    assert [len(sample.images) for sample in samples] == expected["images"]
    assert _said(samples) == expected["assistant"]
    assert not any(sample.remarks for sample in samples)


def test_onevision(tmp_path: Path) -> None:
    expected, samples = _expected("onevision"), _samples(_load("onevision"))
    for sample, images, said in zip(
        samples, expected["images"], expected["assistant"], strict=True
    ):
        if images is not None:
            assert (len(sample.images), *_said([sample])) == (images, said)
    pixels = np.asarray(open_image(samples[2].images[0]))  # (height, width, 3)
    assert (pixels[:, : pixels.shape[1] // 2] == 255).all() and not (pixels == 255).all()

    report = _check("onevision", tmp_path, code=1)
    wanted = sorted((found["row"], found["kind"]) for found in expected["findings"])
    assert _rows_of(report, "unread-key") == wanted
    assert (report["text_only"], report["samples"]) == (1, 6)


def test_several_images(tmp_path: Path) -> None:
    expected, data = _expected("several-images"), _load("several-images/train.json")
    for row, name in ((0, "a"), (2, "c")):
        sample = data.to_sample(data.records[row])
        assert len(sample.images) == expected["images"][name]
        assert _said([sample]) == [expected["assistant"][name]]
    report = _check("several-images/train.json", tmp_path, code=1)
    assert _rows_of(report) == [(1, "image-count")]


def test_a_file_of_the_report_has_its_own_counts(tmp_path: Path) -> None:
    report = _check("finevision-mirror/mirror/ocr", tmp_path)
    first, second = report["files"]
    assert first == {
        "file": "train-00000-of-00002.parquet",
        "rows": 5,
        "samples": 5,
        "text_only": 1,
        "images": 6,
        "turns": 8,
        "findings": {"foreign-marker": 1, "rating-count": 1},
    }
    assert (second["rows"], second["findings"]) == (2, {"duplicate": 2})
    for key in ("rows", "samples", "images", "turns", "text_only"):
        assert report[key] == first[key] + second[key]
    kinds = Counter(first["findings"]) + Counter(second["findings"])
    assert kinds == Counter(report["kinds"])


def test_question_tables() -> None:
    expected = _expected("vqa-tables")
    samples = _samples(_load("vqa-tables/vqa.parquet"))
    assert _said(samples) == expected["vqa.parquet"]["assistant"]
    for form in ("letter", "text"):
        samples = _samples(_load("vqa-tables/choices.parquet", f"answer_form={form}"))
        wanted = expected["choices.parquet"]
        assert _said(samples) == wanted[f"answer_form {form}"]
        assert [len(sample.images) for sample in samples] == wanted["images"]
        for sample, options in zip(samples, wanted["options_written"], strict=True):
            assert options in sample.messages[0].text
    samples = _samples(_load("vqa-tables/choices.parquet", "answer_form=letter-text"))
    assert _said(samples) == [["B. fire"], ["A. tree"]]


def test_documents() -> None:
    expected, samples = _expected("obelics"), _samples(_load("obelics"))
    assert [len(sample.images) for sample in samples] == expected["images"]
    for sample, text, order in zip(
        samples, expected["trained_text"], expected["order"], strict=True
    ):
        assert sample.is_document
        places = sample.messages[0].text.split("\n\n")
        assert ", ".join("image" if p == IMAGE else "text" for p in places) == order
        assert "\n\n".join(place for place in places if place != IMAGE) == text


def test_a_shard_cut_short_is_named_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 files cannot be read: .*train-00000-of-00002"):
        _load("truncated-shard")
    expected = _expected("truncated-shard")["with_skip"]
    data = _load("truncated-shard", "unreadable_shards=skip")
    assert [text for said in _said(_samples(data)) for text in said] == expected["assistant"]
    assert data.left_out is not None and "1 of 2 files are left out" in data.left_out


def test_all_broken_shards_are_named_at_once(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"train-{number}.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"3 of 3 .*train-0.*train-1.*train-2"):
        load_data(data_recipe(str(tmp_path)))
    with pytest.raises(ValueError, match=r"3 of 3 files cannot be read"):
        load_data(data_recipe(str(tmp_path), settings=["unreadable_shards=skip"]))


def test_webdataset() -> None:
    expected = _expected("webdataset")
    data = load_data(data_recipe("webdataset", FIELD / "webdataset"))
    assert [record.id.rpartition("/")[2] for record in data.records] == expected["keys"]
    samples = _samples(data)
    assert [len(sample.images) for sample in samples] == expected["images"]
    assert _said(samples) == expected["assistant"]
    with pytest.raises(ValueError, match=r"000002\.tar cannot be read as a tar"):
        load_data(data_recipe("webdataset", FIELD / "webdataset/cut"))


def _regions(samples: list[Sample]) -> list[list[list[float]]]:
    return [
        [[round(number, 6) for number in region.numbers] for region in sample.regions]
        for sample in samples
    ]


def test_boxes_of_placeholders(tmp_path: Path) -> None:
    expected, data = _expected("boxes-objects"), _load("boxes-objects/train.jsonl")
    samples = [data.to_sample(data.records[row]) for row in range(2)]
    assert _regions(samples) == list(expected["regions_unit"].values())
    written = [write_sample(sample, "thousand") for sample in samples]
    assert _said(written) == list(expected["assistant_thousand"].values())
    assert written[1].messages[0].text == "<image>" + expected["user"]["1"]
    report = _check("boxes-objects/train.jsonl", tmp_path, code=1)
    assert _rows_of(report) == [(2, "region-scale")]


def test_boxes_in_columns() -> None:
    expected = _expected("boxes-columns")
    with pytest.raises(ValueError, match="say bbox_format=xyxy or bbox_format=xywh"):
        _samples(_load("boxes-columns"))
    settings = [f"{key}={value}" for key, value in expected["recipe"].items()]
    samples = _samples(_load("boxes-columns", *settings))
    asked = [text.removeprefix("<image>\n") for texts in _said(samples, "user") for text in texts]
    assert asked == expected["questions"]
    assert [box for boxes in _regions(samples) for box in boxes] == expected["regions_unit"]
    assert _said([write_sample(samples[0], None)]) == [["[100, 200, 500, 800]"]]
    other = _regions(_samples(_load("boxes-columns", "bbox_format=xywh")))
    assert other[0] == [[0.1, 0.2, 0.6, 1.0]], "the same numbers are another box"


def test_points() -> None:
    expected = _expected("points")
    with pytest.raises(ValueError, match="say point_scale, such as point_scale=100"):
        _samples(_load("points"))
    samples = _samples(_load("points", "point_scale=100"))
    assert _regions(samples) == expected["regions_unit"]
    written = [write_sample(sample, "molmo2") for sample in samples]
    assert _said(written) == [[text] for text in expected["molmo2_text"]]
    samples = _samples(_load("points", "point_scale=pixels"))
    assert _regions(samples)[0] == expected["with_point_scale_pixels_row_0"]
