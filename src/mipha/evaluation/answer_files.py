"""Files of answers, ours and those that other programs write -> question id to text.

    JSON lines           {"question_id": ..., "text": "..."}, a line a question: ours and LLaVA's
    JSON list            the same objects in a list, such as GQA's and VQA's results files
    JSON object          question id to text, such as MM-Vet's results file
    .tsv, .csv, .xlsx    a table with a header, such as MMBench's upload and VLMEvalKit's results
    a folder             a file for each part of the benchmark, where its scorer reads those

An object or a row names its question as `question_id`, `questionId`, `index`, `id` or `image`, and
its answer as `text` or `prediction`; other keys are ignored. `answer` may be the right answer as
well as the given one, so it is read only where no key can hold the other of the two.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mipha.errors import import_optional
from mipha.evaluation.benchmark import Benchmark, Question
from mipha.files import read_json_lines, table_reader

_IDS = ("question_id", "questionId", "index", "id", "image")
_TEXTS = ("text", "prediction")
_BESIDE_ANSWER = frozenset((*_IDS, "answer", "question", "image_id"))
"""Keys beside which `answer` is the answer that was given."""

_WRITE = 'write {"question_id": ..., "text": "..."}'
_DELIMITERS = {".tsv": "\t", ".csv": ","}


def read_answers(path: Path, benchmark: Benchmark, questions: Sequence[Question]) -> dict[str, str]:
    """Return question id to text, of exactly these questions.

    Args:
        path: A file, or a folder where the benchmark has answers in several files.
        benchmark: The benchmark.
        questions: Its questions. Those whose facts say `optional` may be missing.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file has another form, an id twice, an unknown or a missing id: names the
            file, the place in it, and the id.
    """
    if not path.is_dir():
        answers = read_answer_records(path)
    elif benchmark.read_answer_folder is not None:
        answers = benchmark.read_answer_folder(path, questions)
    else:
        raise ValueError(f"{path} is a folder: give the file with the answers to {benchmark.name}")

    # Every id must be one of the benchmark's, and stand there once.
    advice = f"; {benchmark.id_advice}" if benchmark.id_advice else ""
    wanted = {question.id for question in questions}
    places: dict[str, str] = {}
    found: dict[str, str] = {}
    for where, question_id, text in answers:
        if question_id in found:
            raise ValueError(
                f"{where}: question_id {question_id} is also {places[question_id]}: "
                f"keep one of the two{advice}"
            )
        if question_id not in wanted:
            raise ValueError(
                f"{where}: no question has the id {question_id} (ids look like "
                f"{questions[0].id}): are these the annotations?{advice}"
            )
        places[question_id] = f"on {where.removeprefix(f'{path} ')}"
        found[question_id] = text

    required = [question.id for question in questions if not question.facts.get("optional")]
    if missing := [question_id for question_id in required if question_id not in found]:
        raise ValueError(
            f"{path} lacks {len(missing)} of {len(required)} questions, such as "
            f"{', '.join(missing[:3])}: predict those too{advice}"
        )
    return found


def read_answer_records(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield place, question id and text of every answer in a file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file has another form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix in (*_DELIMITERS, ".xlsx"):
        for where, row in _read_table(path):
            yield where, *_read_record(row, where)
        return

    # A file that is JSON as a whole is a list or one object; else it has a value a line.
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if isinstance(content, list):
        for number, record in enumerate(content, start=1):
            where = f"{path} record {number}"
            yield where, *_read_record(record, where)
    elif isinstance(content, dict) and not any(key in content for key in _IDS):
        for key, text in content.items():
            if not isinstance(text, str):
                raise ValueError(
                    f"{path} has {_shown(text)} under {key!r}, and not a text as the answer to "
                    f"that question: {_WRITE}, a line a question"
                )
        for key, text in content.items():
            yield f"{path} key {key}", key, text
    else:
        for number, record in read_json_lines(path):
            where = f"{path} line {number}"
            yield where, *_read_record(record, where)


def _read_record(record: Any, where: str) -> tuple[str, str]:
    """Return question id and text of one object."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} is not a JSON object ({_shown(record)}): {_WRITE}")

    # The question.
    id_key = next((key for key in _IDS if key in record), None)
    if id_key is None:
        raise ValueError(f"{where} has no 'question_id', only {_keys(record)}: {_WRITE}")
    question_id = record[id_key]
    if not isinstance(question_id, (str, int)):
        raise ValueError(f"{where}: {id_key} {question_id!r} should be a text or a whole number")

    # Its answer.
    text_keys = [key for key in _TEXTS if key in record]
    if not text_keys and "answer" in record and record.keys() <= _BESIDE_ANSWER:
        text_keys = ["answer"]
    if not text_keys:
        raise ValueError(f"{where} has no 'text' or 'prediction', only {_keys(record)}: {_WRITE}")
    if len(text_keys) > 1:
        raise ValueError(
            f"{where} has 'text' and 'prediction', and one of them is not the answer: {_WRITE}"
        )
    text = record[text_keys[0]]
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: {text_keys[0]} {_shown(text)} should be a valid string: {_WRITE}"
        )
    return str(question_id), text


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield place and cells of every row; an empty cell of the answer is an empty text.

    Raises:
        ValueError: A column that is read stands twice, or a row has more cells than columns.
    """
    rows = _spreadsheet_rows(path) if path.suffix == ".xlsx" else _delimited_rows(path)
    header: list[str] = []
    for number, cells in enumerate(rows, start=1):
        if not header:
            header = cells
            for name in (*_IDS, *_TEXTS, "answer"):
                if header.count(name) > 1:
                    raise ValueError(f"{path} has several columns {name!r}: keep one of them")
        elif any(cells):
            if any(cells[len(header) :]):
                raise ValueError(
                    f"{path} row {number} has {len(cells)} cells, but the first row has "
                    f"{len(header)}: put a text that holds a delimiter in quotes"
                )
            yield f"{path} row {number}", dict(zip(header, cells, strict=False))


def _spreadsheet_rows(path: Path) -> Iterator[list[str]]:
    openpyxl = import_optional("openpyxl", "reading an .xlsx file", "evaluation")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # of many kinds: a zip file's, an XML parser's, openpyxl's own
        raise ValueError(f"{path} is not a spreadsheet ({error}): write it again") from error
    for cells in book.active.iter_rows(values_only=True):
        yield [_cell(cell) for cell in cells]


def _delimited_rows(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from table_reader(file, _DELIMITERS[path.suffix])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table in UTF-8 ({error}): write it again") from error


def _cell(value: Any) -> str:
    """Return a cell as text; a whole number may stand there as a float."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "no key"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " ..."
