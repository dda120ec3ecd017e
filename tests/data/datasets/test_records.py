"""Record files are indexed, not read: each record comes back alone, whole, and with the line that
an editor would show.

Which file is of which split, by the hub's words.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mipha.data.dataset import data_recipe, load_data
from mipha.data.datasets._images import image_folders
from mipha.data.datasets._records import (
    JsonRecords,
    Part,
    Rows,
    TableRecords,
    record_file,
    record_rows,
    split_files,
)
from mipha.data.faults import RecordError

_texts = st.text(max_size=8) | st.text(alphabet='[]{},:"\\\n\r', max_size=8)
_values = st.recursive(
    st.none() | st.integers() | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=5,
)
_few = settings(max_examples=40)


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": {"image": 1, "image": 2}}\n{"a": NaN}\n')
    records = JsonRecords(tmp_path / "a.jsonl")
    with pytest.raises(RecordError, match=r"a\.jsonl, line 1: an object has the key 'image' twice"):
        records.read(0)
    assert records.read(1) == {"a": None}


@pytest.mark.parametrize("depth", [200, 975, 5000])
def test_a_deep_value_is_no_traceback(depth: int, tmp_path: Path) -> None:
    deep = "[" * depth + "1" + "]" * depth
    (tmp_path / "a.jsonl").write_text(f'{{"question": "a", "answer": "b", "meta": {deep}}}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl, line 1: .*(more than 100 deep|recursion)"):
        JsonRecords(tmp_path / "a.jsonl").read(0)
    (tmp_path / "a.csv").write_text(f"question,answer,meta\na,b,{deep}\n")
    loaded = load_data(data_recipe(str(tmp_path / "a.csv")))
    (remark,) = loaded.to_sample(loaded.records[0]).remarks
    assert remark.what == "meta"


def test_a_byte_order_mark_inside_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"a": 1}\n' * 2
    )  # two files, one behind another
    assert _all(JsonRecords(tmp_path / "a.jsonl")) == [{"a": 1}] * 2


def _all(records: JsonRecords | TableRecords) -> list[Any]:
    return [records.read(index) for index in range(len(records))]


@_few
@given(
    values=st.lists(_values, max_size=4), indent=st.sampled_from([None, 0, 2]), ascii=st.booleans()
)
def test_any_list_comes_back(
    values: list, indent: int | None, ascii: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("list") / "a.json"
    file.write_bytes(
        b"\xef\xbb\xbf \n" + json.dumps(values, indent=indent, ensure_ascii=ascii).encode() + b"\n "
    )
    records = JsonRecords(file)
    assert _all(records) == values
    assert [records.where(index) for index in range(len(records))] == [
        f"{file}, row {index}" for index in range(len(values))
    ]
    assert _all(JsonRecords(file, most=2)) == _all(records)[:2]


@_few
@given(
    values=st.lists(st.dictionaries(_texts, _values, max_size=3), max_size=4),
    blank=st.sampled_from(["", "\n", " \r\n"]),
)
def test_any_lines_come_back_with_their_numbers(
    values: list, blank: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One line alone may be an object around a list of records: that is another test's."""
    assume(len(values) != 1 or not any(isinstance(value, list) for value in values[0].values()))
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    file.write_text(
        blank + f"\r\n{blank}".join(map(json.dumps, values)), encoding="utf-8-sig", newline=""
    )
    records = JsonRecords(file)
    assert _all(records) == values
    lines = file.read_bytes().decode("utf-8-sig").split("\n")
    assert [
        json.loads(lines[int(records.name(index)) - 1]) for index in range(len(records))
    ] == values
    assert _all(JsonRecords(file, most=2)) == values[:2]


@_few
@given(
    rows=st.lists(st.tuples(_texts, _texts, st.text(max_size=8)), max_size=4),
    mark=st.sampled_from(",;\t"),
    bom=st.booleans(),
)
def test_any_table_comes_back_with_its_line_numbers(
    rows: list, mark: str, bom: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [[cell.replace("\0", "") for cell in row] for row in rows]
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=mark, quoting=csv.QUOTE_ALL).writerows(
        [["image", "question", "answer"], *rows]
    )
    file = tmp_path_factory.mktemp("table") / "a.csv"
    file.write_bytes(b"\xef\xbb\xbf" * bom + buffer.getvalue().encode())
    records = TableRecords(file)
    assert _all(records) == [
        {
            name: cell or None
            for name, cell in zip(("image", "question", "answer"), row, strict=True)
        }
        for row in rows
    ]
    line = 2
    for index, row in enumerate(rows):
        assert records.where(index) == f"{file}, line {line}"
        line += 1 + sum(cell.count("\n") for cell in row)
    assert _all(TableRecords(file, most=2)) == _all(records)[:2]


def test_a_tsv_is_separated_by_tabs_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("image\t question \n\na,b;c\tx,y\n\n")
    records = record_file(tmp_path / "a.tsv")
    assert _all(records) == [{"image": "a,b;c", "question": "x,y"}]
    assert records.name(0) == "3"
    (tmp_path / "empty.csv").touch()
    assert len(record_file(tmp_path / "empty.csv")) == len(record_file(tmp_path / "a.tsv", 0)) == 0


@pytest.mark.parametrize(
    "text", ["[", '[{"a": 1}', '[{"a": 1}}', '[{"a": "x', "[1, 2] 3", "[[1, 2]", '["a, b', "[1]]"]
)
def test_a_list_that_is_cut_short_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(
        ValueError,
        match=r"a\.json is not valid JSON: its list is not closed, or does not end the file",
    ):
        JsonRecords(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text",
    [
        '[1, {"a": }, 3]',
        '[1, {"a" 1}, 3]',
        '[1, "\\x", 3]',
        "[1, 2 2, 3]",
        "[1,, 3]",
        f"[1, {'[' * 99999}{']' * 99999}, 3]",
    ],
)
def test_a_broken_row_does_not_hide_the_others(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    records = JsonRecords(tmp_path / "a.json")
    assert (records.read(0), records.read(2), len(records)) == (1, 3, 3)
    with pytest.raises(
        ValueError,
        match=r"a\.json, row 1: this is not valid JSON: .*; write it again, or remove it",
    ):
        records.read(1)


def test_a_long_broken_file_is_refused_at_once(tmp_path: Path) -> None:
    """A quote that is never closed must not make the search start again at each of two million
    places.
    """
    (tmp_path / "a.json").write_text('[{"a": "' + "x" * 2_000_000)
    with pytest.raises(ValueError, match="not closed"):
        JsonRecords(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a,b\n1,2\n3,\xff\n", "line 3 is not UTF-8"),
        (b'a,b\n1,2\n3,"x\n4,5\n', "line 3 is not a row .* end of data; .* that quote twice"),
        (b'a,b\n1,2\n"x"y,3\n', "line 3 is not a row of separated values: .* that quote twice"),
        (b"a,b\r1,2\r", "line 1 is not a row of .*: it ends with CR alone; end lines with LF"),
        (b"a,b,a\n1,2,3\n", "two columns 'a'"),
    ],
)
def test_a_table_that_cannot_be_taken_apart_is_an_error(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.csv.*{sentence}"):
        TableRecords(tmp_path / "a.csv")


def test_cells_of_a_table(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What?"}]
    image = "data:image/png;base64," + "A" * 200_000
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "messages"], [image, json.dumps(turns)], ["[", ""]])
    limit = csv.field_size_limit()
    first, second = _all(TableRecords(tmp_path / "a.csv"))
    assert first == {"image": image, "messages": turns}
    assert second == {"image": "[", "messages": None}
    assert csv.field_size_limit() == limit


def test_files_of_no_split_are_named(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-2.jsonl", "val.jsonl", "more.jsonl"):
        (tmp_path / name).write_text("{}\n")
    rows = record_rows("messages", tmp_path, "train", (".jsonl",), ())
    assert len(rows) == 2 and "1 files are not read" in rows.left_out
    assert "more.jsonl" in rows.left_out and "val" not in rows.left_out
    (tmp_path / "more.jsonl").unlink()
    assert record_rows("messages", tmp_path, "train", (".jsonl",), ()).left_out is None


def test_a_row_with_another_number_of_cells_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,answer\na.png,yes\nb.png,no, it is not\n")
    records = TableRecords(tmp_path / "a.csv")
    assert records.read(0) == {"image": "a.png", "answer": "yes"}
    with pytest.raises(
        ValueError,
        match=r"a\.csv, line 3: it has 3 cells for 2 columns; put text with a ',' in quotes",
    ):
        records.read(1)


def test_files_stand_one_after_another_and_the_index_travels(tmp_path: Path) -> None:
    for name, values in (("a", [1, 2]), ("none", []), ("b", [3])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(str, values)))
    files = [tmp_path / f"{name}.jsonl" for name in ("a", "none", "b")]
    rows = Rows(
        [Part(f"mine/{file.stem}", JsonRecords(file), image_folders(file)) for file in files],
    )
    again = pickle.loads(pickle.dumps(rows))  # what a data loader does where it cannot fork
    for copy in (rows, again):
        assert [(row.id, row.content) for row in copy] == [
            ("mine/a/1", 1),
            ("mine/a/2", 2),
            ("mine/b/1", 3),
        ]
    assert (
        rows[-1] == rows[2]
        and rows[-1].where == f"{files[2]}, line 1"
        and rows[0].folders.base == tmp_path
    )
    for outside in (3, -4):
        with pytest.raises(IndexError):
            rows[outside]
    assert len(pickle.dumps(rows)) < 3000


def test_the_index_is_small(tmp_path: Path) -> None:
    """Twenty thousand records of a thousand bytes take 24 bytes each."""
    file = tmp_path / "a.jsonl"
    file.write_text((json.dumps({"text": "x" * 1000}) + "\n") * 20_000)
    assert len(pickle.dumps(JsonRecords(file))) < 20_000 * 25 + 2000


def _splits(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).touch()


@pytest.mark.parametrize(
    ("files", "split", "wanted"),
    [
        (["data.csv"], "train", ["data"]),
        (["train.csv", "test.csv"], "train", ["train"]),
        (["my_train_file.csv", "dev.csv", "test-file.csv", "eval1.csv"], "validation", ["dev"]),
        (
            ["my_train_file.csv", "dev.csv", "test-file.csv", "eval1.csv"],
            "test",
            ["eval1", "test-file"],
        ),
        (["training.csv", "valid.csv"], "val", ["valid"]),
        (
            ["train-00001-of-00002.csv", "train-00000-of-00002.csv"],
            "train",
            ["train-00000-of-00002", "train-00001-of-00002"],
        ),
        (["0.csv", "1.csv", "2.csv"], "train", ["0", "1", "2"]),
        (["part-0001.csv", "part-0002.csv"], "train", ["part-0001", "part-0002"]),
        (["data/train-0.csv", "data/test-0.csv"], "test", ["data/test-0"]),
        (["train/a.csv", "train/b.csv", "val/a.csv"], "train", ["train/a", "train/b"]),
        (["train/a.csv", "train/b.csv", "val/a.csv"], "dev", ["val/a"]),
        (["cats.csv", "dogs.csv"], "dogs", ["dogs"]),
        (["dev.csv", "cats.csv"], "dev", ["dev"]),
        (
            ["train.csv", ".train.csv", "_train.csv", "train.csv.txt", "other/train.csv"],
            "train",
            ["train"],
        ),
        (["retrain.csv", "train.csv"], "train", ["train"]),
        (["train.CSV"], "train", ["train"]),
    ],
)
def test_files_of_a_split(files: list[str], split: str, wanted: list[str], tmp_path: Path) -> None:
    _splits(tmp_path, *files)
    assert [name for name, _ in split_files("mine", tmp_path, split, (".csv", ".jsonl"))] == wanted


@pytest.mark.parametrize(
    ("files", "split", "sentence"),
    [
        (
            ["cats.csv", "dogs.csv"],
            "train",
            "no split 'train', only cats and dogs: give one file, such as .*cats.csv",
        ),
        (
            ["train.csv", "val.csv"],
            "test",
            "no split 'test', only train and validation: give one file",
        ),
        (["test.csv"], "train", "no split 'train', only test"),
        (["00.csv", "x.csv"], "train", "only that of names without a word and x"),
        ([], "train", "use a folder that holds one"),
    ],
)
def test_a_split_that_is_not_there(
    files: list[str], split: str, sentence: str, tmp_path: Path
) -> None:
    _splits(tmp_path, *files)
    with pytest.raises(ValueError, match=sentence):
        split_files("mine", tmp_path, split, (".csv",))


def test_the_first_kind_of_file_that_is_there_counts(tmp_path: Path) -> None:
    _splits(tmp_path, "train.jsonl", "settings.json")
    assert split_files("mine", tmp_path, "train", (".csv", ".jsonl", ".json")) == [
        ("train", tmp_path / "train.jsonl")
    ]


def test_one_file_is_train(tmp_path: Path) -> None:
    _splits(tmp_path, "test.csv")
    assert split_files("mine", tmp_path / "test.csv", "train", (".csv",)) == [
        ("test", tmp_path / "test.csv")
    ]
    with pytest.raises(ValueError, match="no split 'test': use train"):
        split_files("mine", tmp_path / "test.csv", "test", (".csv",))
    with pytest.raises(FileNotFoundError, match="mine: no file or folder"):
        split_files("mine", tmp_path / "gone", "train", (".csv",))
    with pytest.raises(
        ValueError, match=r"mine has no packaged copy: set the data's root to a \.csv file"
    ):
        split_files("mine", None, "train", (".csv",))


RECORDS = [{"image": "a.png", "question": "q [1], {?}", "answer": 'r"ed'}, {"question": "s"}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda rows: {"data": rows},
        lambda rows: {"info": {"data": [1]}, "version": 2, "data": rows, "tags": ["a", "b"]},
        lambda rows: {'a"b': "[{", "rows": rows, "empty": []},
    ],
)
def test_a_list_under_one_key_of_an_object_is_read(wrap, indent, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(wrap(RECORDS), indent=indent))
    records = JsonRecords(file)
    assert _all(records) == RECORDS
    assert [records.where(index) for index in (0, 1)] == [f"{file}, row 0", f"{file}, row 1"]
    assert _all(JsonRecords(file, most=1)) == RECORDS[:1]


def test_keys_beside_the_list_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"system": "Be brief.", "note": "", "data": RECORDS}, indent=1))
    rows = record_rows("messages", file, "train", (".json",), ())
    assert rows.left_out == "nothing reads the keys beside the list: system"


def test_objects_over_several_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(record, indent=1) for record in RECORDS) + "\n")
    assert _all(JsonRecords(file)) == RECORDS
    assert _all(JsonRecords(file, most=1)) == RECORDS[:1]
    for record in ({"messages": [{"role": "user"}], "images": []}, {"texts": [{"user": "a"}]}):
        for indent in (None, 1):
            file.write_text(json.dumps(record, indent=indent))
            assert _all(JsonRecords(file)) == [record]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {"images": [{"id": 1}], "annotations": [{"id": 1}, {"id": 2}]},
            r"holds one object with the lists images \(1\), annotations \(2\): for COCO's captions",
        ),
        (
            {"a": [{"id": 1}], "b": [{"id": 1}]},
            r"holds .* lists a \(1\), b \(1\): save the one list",
        ),
        ({"1": {"question": "q"}, "2": {"question": "q"}}, "holds one object with objects under 1"),
    ],
)
def test_an_object_without_one_list_is_named_as_such(content, sentence, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(ValueError, match=rf"a\.json {sentence}"):
        JsonRecords(tmp_path / "a.json")


def test_an_object_that_is_no_json_is_not_blamed_on_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n "data": [\n  {"a": 1,}\n ]\n}')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON: .* line 3"):
        JsonRecords(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,b\nc,d\n".encode("utf-16"), "is UTF-16 or UTF-32: save it as UTF-8"),
        ("a,b\nc,d\n".encode("utf-16-le"), "is no text in UTF-8, it begins with .*: save it"),
        (gzip.compress(b"a,b\nc,d\n", mtime=0), "is compressed: decompress it"),
    ],
)
def test_another_encoding_is_named(
    name: str, content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {sentence}"):
        record_file(tmp_path / name)


def test_a_row_in_latin_1_is_named(tmp_path: Path) -> None:
    text = '{"a": "x"}\n{"a": "café"}\n'
    (tmp_path / "a.jsonl").write_bytes(text.encode("latin-1"))
    records = JsonRecords(tmp_path / "a.jsonl")
    assert records.read(0) == {"a": "x"}
    with pytest.raises(ValueError, match=r"line 2: this is not UTF-8: byte 0xe9 after .*caf"):
        records.read(1)
