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
    decode_image,
    find,
    image_file,
    read_record,
    read_table,
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
