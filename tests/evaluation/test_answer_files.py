"""Files of answers: our own lines, and the results files of the benchmarks and other programs."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mipha.evaluation.answer_files import read_answers
from mipha.evaluation.benchmark import Question, load_benchmark
from mipha.evaluation.files import write_spreadsheet

BENCHMARK = replace(load_benchmark("easy_vqa"), id_advice="")
ASKED = [Question(str(number), "is it?", None) for number in range(4)]
TEXTS = {"0": "yes", "1": "no", "2": "", "3": "7"}


def read(path: Path, questions: list[Question] = ASKED) -> dict[str, str]:
    return read_answers(path, BENCHMARK, questions)


def write_lines(path: Path, *rows: dict[str, object] | str) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    )
    return path


def test_a_file_of_answers_is_scored_in_any_order_and_with_any_other_keys(
    tmp_path: Path,
) -> None:
    rows = [
        {"question_id": int(q.id) if q.id == "2" else q.id, "text": "yes", "model_id": "x"}
        for q in reversed(ASKED)
    ]
    assert read(write_lines(tmp_path / "p.jsonl", *rows)) == dict.fromkeys("0123", "yes")


def test_text_is_taken_verbatim(tmp_path: Path) -> None:
    rows = [{"question_id": question.id, "text": f" {question.id}\u2028\n "} for question in ASKED]
    assert read(write_lines(tmp_path / "p.jsonl", *rows))["3"] == " 3\u2028\n "


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"question_id": "0", "text": "a"}, "{"], r"p\.jsonl line 2 is not valid JSON"),
        ([{"question_id": "0", "text": "a"}, "[1]"], r"p\.jsonl line 2 is not a JSON object"),
        (["[1]"], r"p\.jsonl record 1 is not a JSON object \(1\): write"),
        (["3"], r"p\.jsonl line 1 is not a JSON object"),
        (
            [{"question_id": "0", "said": "a"}],
            r"line 1 has no 'text' or 'prediction', only 'question_id', 'said': write",
        ),
        ([{"number": "0", "text": "a"}, {}], r"line 1 has no 'question_id', only 'number', 'text'"),
        (
            [{"question_id": "0", "text": "is it?", "prediction": "yes"}],
            r"line 1 has 'text' and 'prediction', and one of them is not the answer",
        ),
        (
            [{"question_id": "0", "answer": "yes", "response": "no"}],
            r"line 1 has no 'text' or 'prediction', only 'question_id', 'answer', 'response'",
        ),
        ([{"0": "yes", "1": 1}], r"p\.jsonl has 1 under '1', and not a text"),
        ([{"model": "x", "results": []}], r"p\.jsonl has \[\] under 'results', and not a text"),
        (['[{"index": 1, "prediction": null}]'], r"record 1: prediction None should be a valid st"),
        (
            [{"question_id": "0", "text": None}],
            r"p\.jsonl line 1: text None should be a valid string: write .*question_id",
        ),
        (
            [{"question_id": 0.5, "text": "a"}],
            r"line 1: question_id 0\.5 should be a text or a whole number",
        ),
        (
            [{"question_id": "0", "text": "a"}, {"question_id": 0, "text": "b"}],
            r"line 2: question_id 0 is also on line 1",
        ),
        (
            [{"question_id": "9", "text": "a"}],
            r"line 1: no question has the id 9 \(ids look like 0\)",
        ),
        ([{"question_id": "1", "text": "a"}], r"lacks 3 of 4 questions, such as 0, 2, 3"),
    ],
)
def test_a_wrong_line_is_named(
    tmp_path: Path, rows: list[dict[str, object] | str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        read(write_lines(tmp_path / "p.jsonl", *rows))


def save_list(path: Path, id_key: str, text_key: str) -> Path:
    records = [{id_key: int(name), text_key: text} for name, text in TEXTS.items()]
    path.write_text(json.dumps(records, indent=1))
    return path


@pytest.mark.parametrize("id_key", ["question_id", "questionId", "index", "id"])
@pytest.mark.parametrize("text_key", ["text", "prediction", "answer"])
def test_results_files_are_lists_or_lines_with_other_keys(
    id_key: str, text_key: str, tmp_path: Path
) -> None:
    """GQA's, VQA's, SEED-Bench's and VLMEvalKit's, as a list and a line each."""
    assert read(save_list(tmp_path / "list.json", id_key, text_key)) == TEXTS
    lines = write_lines(tmp_path / "lines.jsonl", *json.loads((tmp_path / "list.json").read_text()))
    assert read(lines) == TEXTS


def test_other_forms(tmp_path: Path) -> None:
    """An object of texts, images as ids, one line alone, and the mark that begins some files."""
    (tmp_path / "object.json").write_text(json.dumps(TEXTS, indent=2))
    assert read(tmp_path / "object.json") == TEXTS
    images = [Question("a.jpg", "?", None)]
    (tmp_path / "image.json").write_text('[{"image": "a.jpg", "answer": "cat"}]')
    assert read(tmp_path / "image.json", images) == {"a.jpg": "cat"}
    one = write_lines(tmp_path / "one.jsonl", {"question_id": "0", "text": "yes"})
    assert read(one, ASKED[:1]) == {"0": "yes"}
    marked = tmp_path / "marked.json"
    marked.write_text(
        json.dumps([{"index": name, "prediction": text} for name, text in TEXTS.items()]),
        encoding="utf-8-sig",
    )
    assert read(marked) == TEXTS


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".xlsx"])
def test_tables_are_read_with_empty_cells_as_empty_answers(ending: str, tmp_path: Path) -> None:
    """MMBench's upload and VLMEvalKit's results: the right answer stands in them too."""
    path = tmp_path / f"p{ending}"
    columns = ["index", "question", "answer", "prediction"]
    rows: list[dict[str, Any]] = [
        {"index": int(name), "question": 'a "b",\tc', "answer": "A", "prediction": text or None}
        for name, text in TEXTS.items()
    ]
    if ending == ".xlsx":
        pytest.importorskip("openpyxl")
        path.write_bytes(write_spreadsheet(columns, rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if ending == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    assert read(path) == TEXTS
    path.write_bytes(b"\xff\xfe\x00 broken")
    with pytest.raises(ValueError, match=rf"p\{ending} is not a (table|spreadsheet)"):
        read(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("index,prediction,prediction\n0,a,b\n", "several columns 'prediction': keep one"),
        ("index,prediction\n0,red, or blue\n", "row 2 has 3 cells, but the first row has 2"),
    ],
)
def test_a_table_in_which_an_answer_is_not_one_cell_is_refused(
    content: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text("index,prediction,other,other\n0,a,b,c,,\n")
    assert read(tmp_path / "p.csv", ASKED[:1]) == {"0": "a"}


def test_a_folder_and_ids_that_start_anew_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder: give the file with the answers to easy_vqa"):
        read(tmp_path)
    pope = load_benchmark("pope")
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.json"):
        read(tmp_path / "none.json")
    twice = [{"question_id": 1, "text": "no"}] * 2
    with pytest.raises(ValueError, match="keep one of the two; POPE's files start their ids anew"):
        read_answers(
            write_lines(tmp_path / "p.jsonl", *twice), pope, [Question("1", "?", None), *ASKED]
        )
