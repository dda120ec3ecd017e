"""MMBench's files: the table of questions with their pictures, and the spreadsheet that its server takes.

Source: haotian-liu/LLaVA c121f043 `llava/eval/model_vqa_mmbench.py` (prompt) and `scripts/convert_mmbench_for_submission.py` (upload);
    open-compass/VLMEvalKit e8e78f05 `vlmeval/dataset/image_base.py` (pictures that rows share).
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mipha.evaluation.benchmark import Question
from mipha.evaluation.prompts import LETTERS, options

# The official programs read the file with pandas, for which an empty cell and these texts are all the same: no value. So a prompt ends
# before an option "None" or "NA". The official scorer loses such options too, on their way through spreadsheets, and one that is the gold
# answer can then never be right; here the scorer knows every option that has a text.
# Source: pandas 3.1 `pandas._libs.parsers.STR_NA_VALUES`; LLaVA c121f043 `model_vqa_mmbench.py:is_none`.
PANDAS_NO_VALUE = frozenset(
    (
        *("", "None", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A", "NULL", "null"),
        *("nan", "-nan", "NaN", "-NaN", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
    )
)
NO_VALUE = frozenset(("", "nan", "NaN"))
"""Cells without a text: empty, or what a program made of an empty one."""

ROTATION = 1_000_000
"""A rotation of a question stands at the question's index plus a multiple of this."""

_LONGEST_REFERENCE = 64
"""Characters: an image cell up to here is the index of another row, whose picture this row shares."""
_LONGEST_CELL = 32_767
"""Characters that a cell of a spreadsheet can hold."""
_NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6

_ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def read(path: Path, instruction: str, with_labels: bool, with_images: bool) -> list[Question]:
    """Every row of a file, in its order.

    Args:
        path: The .tsv file.
        instruction: End of the prompt.
        with_labels: Every row must have an answer; else one that is there is kept.
        with_images: Decode the pictures, each once however many rows show it.

    Returns:
        Questions whose facts are `group` (index without the rotation), `question`, `choices` (letter to text), `answer` (letter, where
        there is one), `image` (hash of the picture, or the group where there is none), `l2-category`, `category`, and `row` (cells
        that an upload keeps, by column).

    Raises:
        ValueError: Not such a file: names the line.
    """
    rows: dict[int, tuple[str, dict[str, str]]] = {}
    pictures: dict[int, str] = {}
    shared: dict[int, int] = {}
    decoded: dict[str, bytes] = {}
    for where, row in _rows(path):
        index = _index(row, where)
        if index in rows:
            raise ValueError(
                f"{where}: index {index} stands on an earlier line as well: get the file again"
            )
        cell = row.pop("image", "")
        if len(cell) > _LONGEST_REFERENCE:
            # Files of 2023 repeat the picture in every rotation.
            pictures[index] = sha256 = hashlib.sha256(cell.encode()).hexdigest()
            if with_images and sha256 not in decoded:
                decoded[sha256] = _decode(cell, where)
        elif cell.isdecimal():
            shared[index] = int(cell)
        rows[index] = where, row
    questions = []
    for index, (where, row) in rows.items():
        picture = pictures.get(shared.get(index, index))
        if with_images and picture is None:
            raise ValueError(
                f"{where}: the image is neither a picture in base64 nor the index of a row with one: get the file again"
            )
        facts = _facts(index, row, where, with_labels)
        image = picture or f"question {facts['group']}"
        questions.append(
            Question(
                str(index), _prompt(row, instruction), decoded.get(image), facts | {"image": image}
            )
        )
    return questions


def spreadsheet(questions: Sequence[Question], predictions: Mapping[str, str]) -> bytes:
    """The upload: one line a row with the answer in the seventh column.

    Raises:
        ModuleNotFoundError: openpyxl is not installed.
        ValueError: A text is too long for a cell.
    """
    try:
        from openpyxl import Workbook
    except ModuleNotFoundError as error:
        mend = 'pip install "mipha-vlm[evaluation]"'
        raise ModuleNotFoundError(
            f"MMBench's upload is made with openpyxl, which is not installed: {mend}",
            name="openpyxl",
        ) from error
    book = Workbook()
    sheet = book.active
    columns = list(questions[0].facts["row"])
    columns.insert(_PREDICTION_COLUMN, "prediction")
    sheet.append(columns)
    for line, question in enumerate(questions, start=2):
        row = question.facts["row"] | {"prediction": predictions[question.id]}
        for number, column in enumerate(columns, start=1):
            if column == "index":
                sheet.cell(line, number, int(question.id))
            elif column == "prediction" or row[column] not in NO_VALUE:
                # Without the type, text that begins with "=" would be a formula, and "#N/A" an error.
                sheet.cell(
                    line, number, cell_text(row[column], f"{column} of row {question.id}")
                ).data_type = "s"
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def cell_text(text: str, name: str) -> str:
    """Text as it goes into a cell, without the characters that no spreadsheet can hold.

    Those that part words become a space, all others a replacement character, so that the rules read the same in it.

    Args:
        text: Any.
        name: For the error.

    Raises:
        ValueError: Too long.
    """
    if len(text) > _LONGEST_CELL:
        raise ValueError(
            f"{name} has {len(text):,} characters, and a cell of a spreadsheet holds {_LONGEST_CELL:,}: shorten it"
        )
    return re.sub(
        "[\x00-\x08\x0e-\x1b\ud800-\udfff\ufffe\uffff]",
        "\ufffd",
        re.sub("[\x0b\x0c\x1c-\x1f]", " ", text),
    )


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(file and line, column to cell) of each row."""
    limit = csv.field_size_limit(2**31 - 1)  # a picture is far longer than a cell may be by default
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            columns = next(reader, [])
            if missing := [
                column for column in ("index", "question", "A", "B") if column not in columns
            ]:
                raise ValueError(
                    f"{path} has no column {' or '.join(missing)}: give the official .tsv file"
                )
            for cells in reader:
                where = f"{path} line {reader.line_num}"
                if cells and len(cells) != len(columns):
                    raise ValueError(
                        f"{where} has {len(cells)} cells, and the first line {len(columns)}: get the file again"
                    )
                if cells:
                    yield where, dict(zip(columns, cells, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table in UTF-8 ({error}): get the file again") from error
    finally:
        csv.field_size_limit(limit)


def _index(row: Mapping[str, str], where: str) -> int:
    if not row["index"].isdecimal():
        raise ValueError(
            f"{where}: index {row['index'][:20]!r} is not a whole number: get the file again"
        )
    return int(row["index"])


def _decode(cell: str, where: str) -> bytes:
    try:
        return base64.b64decode(cell)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"{where}: the image is not base64 ({error}): get the file again"
        ) from error


def _facts(index: int, row: Mapping[str, str], where: str, with_label: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "group": index % ROTATION,
        "question": row["question"],
        "choices": {
            letter: row[letter] for letter in LETTERS if row.get(letter, "") not in NO_VALUE
        },
        "row": {column: cell for column, cell in row.items() if column not in _NOT_UPLOADED},
    }
    for kind in ("l2-category", "category"):
        value = row.get(kind, "")
        facts[kind] = None if value in NO_VALUE else _ABBREVIATIONS.get(value, value)
    label = row.get("answer", "")
    if label in NO_VALUE:
        if with_label:
            raise ValueError(
                f"{where} has no answer: give a file whose labels are public, such as that of the dev split"
            )
        return facts
    if label not in list(LETTERS) or not row.get(label):
        raise ValueError(
            f"{where}: the answer {label!r} is the letter of none of its options: get the file again"
        )
    return facts | {"answer": label}


def _prompt(row: Mapping[str, str], instruction: str) -> str:
    hint = row.get("hint", "")
    shown: list[str] = []
    for letter in "ABCD":
        if _is_none(row.get(letter, "")):
            break
        shown.append(row[letter])
    return ("" if _is_none(hint) else f"{hint}\n") + row["question"] + options(shown) + instruction


def _is_none(cell: str) -> bool:
    """Whether the prompt leaves a cell out."""
    return cell in PANDAS_NO_VALUE or cell.lower() in ("nan", "none")
