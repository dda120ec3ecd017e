"""Official files: what is read, and the sentence about what cannot be."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from mipha.errors import MissingPackage
from mipha.evaluation.files import (
    OfficialRecord,
    QuestionId,
    TableImages,
    decode_image,
    find,
    find_shards,
    image_file,
    read_answers,
    read_record,
    read_rows,
    read_table,
    refuse_repeated,
    write_spreadsheet,
)


class Inner(OfficialRecord):
    name: str


class Record(OfficialRecord):
    question_id: QuestionId
    label: Literal["yes", "no"]
    steps: list[Inner] = Field(default_factory=list)


def test_a_record_keeps_its_types_and_ignores_other_keys() -> None:
    record = read_record(Record, {"question_id": 7, "label": "no", "set": "val"}, "here")
    assert (record.question_id, record.label, record.steps) == ("7", "no", [])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"label": None}, r"x\.json \[3\]: label None should be 'yes' or 'no': get the official"),
        ({"label": "x" * 200}, r"label 'x{79} \.\.\. should be"),
        ({"question_id": 1.5}, r"question_id 1\.5 should be a text or a whole number: get"),
        ({"steps": {}}, r"steps \{\} should be a valid list: get"),
        ({"steps": [{}]}, r"x\.json \[3\] has no 'steps\.0\.name': get"),
        ({"steps": ["x"]}, r"steps\.0 'x' should be an object: get"),
    ],
)
def test_a_wrong_value_is_named_in_one_sentence(changed: dict[str, Any], sentence: str) -> None:
    row = {"question_id": "7", "label": "no"} | changed
    with pytest.raises(ValueError, match=sentence) as error:
        read_record(Record, row, "x.json [3]")
    assert "\n" not in str(error.value)


def test_what_is_no_record_is_named_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"^line 2 should be an object: fix that line$"):
        read_record(Record, ["7"], "line 2", fix="fix that line")


def test_the_first_name_that_exists_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.json").touch()
    assert find(tmp_path, ("a.json", "b.json"), "get it") == tmp_path / "b.json"
    assert find(tmp_path / "b.json", ("a.json",), "get it") == tmp_path / "b.json"
    with pytest.raises(FileNotFoundError, match=r"has no a\.json or c\.json: get it"):
        find(tmp_path, ("a.json", "c.json"), "get it")
    with pytest.raises(FileNotFoundError, match=r"nowhere: give the folder with a\.json\. get it"):
        find(tmp_path / "nowhere", ("a.json",), "get it")
    with pytest.raises(FileNotFoundError, match=r"no image .*c\.png: get it"):
        image_file(tmp_path / "c.png", "get it")


def test_a_table_gives_its_rows_with_their_lines(tmp_path: Path) -> None:
    long = "x" * 200_000  # beyond what the csv module takes by default
    (tmp_path / "t.tsv").write_text(f'index\timage\n1\t"a\nb"\n2\t{long}\n')
    rows = list(read_table(tmp_path / "t.tsv", ("index",)))
    assert [where.rpartition(" ")[2] for where, _ in rows] == ["3", "4"]
    assert [row for _, row in rows] == [
        {"index": "1", "image": "a\nb"},
        {"index": "2", "image": long},
    ]
    with pytest.raises(ValueError, match=r"t\.tsv has no column A or B: give the official"):
        list(read_table(tmp_path / "t.tsv", ("index", "A", "B")))


def test_an_image_in_a_cell() -> None:
    assert decode_image(base64.b64encode(b"png").decode(), "here") == b"png"
    with pytest.raises(ValueError, match="line 3: the image is not base64"):
        decode_image("A" * 65, "line 3")


def test_the_parts_of_a_split_are_found_in_order_and_all_of_them(tmp_path: Path) -> None:
    names = [f"val-0000{number}-of-00003.parquet" for number in range(3)]
    for name in [*reversed(names), "test-00000-of-00002.parquet"]:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).touch()
    patterns = ("val-*.parquet", "data/val-*.parquet")
    assert [path.name for path in find_shards(tmp_path, patterns, "get it")] == names
    assert find_shards(tmp_path / "data" / names[1], patterns, "get it") == [
        tmp_path / "data" / names[1]
    ]
    with pytest.raises(FileNotFoundError, match=r"has 1 of the 2 files of test-00000.*: get it"):
        find_shards(tmp_path, ("data/test-*.parquet",), "get it")
    (tmp_path / "data" / names[0]).unlink()
    with pytest.raises(FileNotFoundError, match="has 2 of the 3 files"):
        find_shards(tmp_path, patterns, "get it")
    with pytest.raises(FileNotFoundError, match=r"has no dev-\*\.parquet: get it"):
        find_shards(tmp_path, ("dev-*.parquet",), "get it")


def test_an_id_that_stands_in_a_file_twice_is_named_with_both_places() -> None:
    places: dict[str, str] = {}
    refuse_repeated(places, "7", "a.json row 1")
    refuse_repeated(places, "8", "a.json row 2")
    with pytest.raises(ValueError, match=r"^row 3 has the index 7 of a\.json row 1: keep one of"):
        refuse_repeated(places, "7", "row 3", "index")


def test_equal_images_of_a_table_are_one_object_with_one_name() -> None:
    images = TableImages(are_shown=True)
    name, image = images.read({"bytes": b"pixels", "path": None}, "row 1", "1")
    again = images.read(base64.b64encode(b"pixels").decode(), "row 2", "2")
    assert again == (name, b"pixels") and again[1] is image
    assert images.read(b"others", "row 3", "3")[0] != name
    with pytest.raises(ValueError, match="row 4 has no image: get the official file again"):
        images.read({"bytes": None, "path": "a.png"}, "row 4", "4")

    labels = TableImages(are_shown=False)
    assert labels.read(b"pixels", "row 1", "1") == (name, None)
    assert labels.read(None, "row 2", "2") == ("2", None)


def test_texts_stay_texts_in_a_spreadsheet() -> None:
    openpyxl = pytest.importorskip("openpyxl")
    rows = [{"index": 1, "answer": "=1+1"}, {"index": 2, "answer": None}]
    sheet = openpyxl.load_workbook(io.BytesIO(write_spreadsheet(("index", "answer"), rows))).active
    assert list(sheet.iter_rows(values_only=True)) == [("index", "answer"), (1, "=1+1"), (2, None)]
    assert sheet["B2"].data_type == "s"
    with pytest.raises(ValueError, match="answer of row 1 has 40,000 characters"):
        write_spreadsheet(("index", "answer"), [{"index": 1, "answer": "a" * 40_000}])


def test_a_spreadsheet_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingPackage, match=r"openpyxl.*mipha-vlm\[evaluation\]"):
        write_spreadsheet(("index",), [])


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (("1\t{image}", "1\t{image}"), "line 3 has the index 1 of .*line 2: keep one"),
        (("1\t2", "2\t"), "line 2: the image is neither base64 nor the index of a row with"),
        (("1\t2", "2\t1"), "line 2: the image is neither"),
        (("1\t{image}", "2\t9"), "line 3: the image is neither"),
    ],
)
def test_a_shared_image_that_is_not_there_is_named(
    rows: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.tsv"
    lines = ["index\timage", *(row.format(image="a" * 80) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        list(read_rows(path, ()))


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("['a', \"b's\"]", ["a", "b's"]),
        *((cell, [cell]) for cell in ("a", "", "[a, b]", "[1, 2]", "[]", "['a'", "('a',)")),
    ],
)
def test_answers_of_a_cell(cell: str, answers: list[str]) -> None:
    assert read_answers(cell) == answers
