"""Official files: found by name, read as validated records, with errors that name the place.

find, find_shards       where a file lies, in one piece or in several
image_file, find_image  where an image lies
read_json_or_table      rows of a benchmark that is published in several forms
read_official           the content of a JSON file
read_record             a record of it as a pydantic model
read_table              rows of a .tsv file
read_parquet            rows of a .parquet file
read_rows               rows of a .parquet file, or of a .tsv file of VLMEvalKit
read_answers            answers that a cell holds as a Python list
refuse_repeated         an id that stands in a file twice
TableImages             images inside a table, equal ones once
decode_image            an image that a table holds as base64 text
write_spreadsheet       an .xlsx file, for servers that take one
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import hashlib
import io
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError

from mipha.errors import import_optional
from mipha.files import read_json, table_reader

AGAIN = "get the official file again"
"""Advice for a damaged file."""

_LONGEST_SHOWN = 80
"""Characters of a wrong value that an error shows."""
LONGEST_REFERENCE = 64
"""Characters: an image cell up to here is the index of another row, whose image this row shares."""
_LONGEST_CELL = 32_767
"""Characters that a cell of a spreadsheet can hold."""


class OfficialRecord(BaseModel):
    """A record of an official file: values of exactly these types; other keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


Record = TypeVar("Record", bound=OfficialRecord)


def _check_id(value: Any) -> str:
    if not isinstance(value, (str, int)):
        raise ValueError("should be a text or a whole number")
    return str(value)


QuestionId = Annotated[str, PlainValidator(_check_id)]
"""An id that a file may write as a number."""


def find(root: Path, names: Sequence[str], source: str) -> Path:
    """Return the first of the files that exists under a folder, or the root if it is a file.

    Args:
        root: A folder with official files (others may lie there too), or one official file.
        names: Paths under the folder, the usual one first.
        source: Where the files come from, for the error.

    Raises:
        FileNotFoundError: None of them exists.
    """
    if root.is_file():
        return root
    for name in names:
        if (root / name).is_file():
            return root / name
    if not root.is_dir():
        raise FileNotFoundError(f"no {root}: give the folder with {' or '.join(names)}. {source}")
    raise FileNotFoundError(f"{root} has no {' or '.join(names)}: {source}")


def find_shards(root: Path, patterns: Sequence[str], source: str) -> list[Path]:
    """Return the files of a split, in order; `x-00000-of-00003.parquet` is one of three.

    Args:
        root: A folder with official files, or one of them.
        patterns: Glob patterns under the folder; the first that any file has is taken.
        source: Where the files come from, for the error.

    Raises:
        FileNotFoundError: There is none, or a part of a split is missing.
    """
    if root.is_file():
        return [root]
    found = next((paths for name in patterns if (paths := sorted(root.glob(name)))), [])
    if not found:
        raise FileNotFoundError(f"{root} has no {' or '.join(patterns)}: {source}")

    for number, path in enumerate(found):
        part = re.search(r"-(\d{5})-of-(\d{5})\.parquet$", path.name)
        if part and (int(part[1]) != number or int(part[2]) != len(found)):
            raise FileNotFoundError(
                f"{path.parent} has {len(found)} of the {int(part[2])} files of {path.name}: "
                f"{source}"
            )
    return found


def image_file(path: Path, source: str) -> Path:
    """Return the path of an image, if there is a file.

    Raises:
        FileNotFoundError: There is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}: {source}")
    return path


def find_image(folder: Path, names: Sequence[str], source: str) -> Path:
    """Return the path of an image that may lie in one of several places, the usual one first.

    Raises:
        FileNotFoundError: It is in none of them.
    """
    paths = [folder / name for name in names]
    return image_file(next((path for path in paths if path.is_file()), paths[0]), source)


def read_json_or_table(
    root: Path,
    names: Sequence[str],
    patterns: Sequence[str],
    source: str,
    unpack: Callable[[Path], Iterable[tuple[str, Any]]] | None = None,
) -> Iterator[tuple[str, dict[str, Any], Path | None]]:
    """Yield place, row, and the folder of the .json file; None for a row with its image.

    Args:
        root: A folder with official files, or one of them.
        names: Paths of the .json file, which comes first, the usual one first.
        patterns: See `find_shards`; a .tsv file of VLMEvalKit may be the last.
        source: Where the files come from, for errors.
        unpack: Yields place and row of every question of the .json file; None: it is a list.

    Raises:
        FileNotFoundError: None of the files is there.
        MissingPackage: The file is a .parquet, and pyarrow is not installed.
        ValueError: A file is malformed.
    """
    paths = [root] if root.suffix == ".json" else [root / name for name in names]
    path = next((path for path in paths if path.is_file()), None)
    if path is not None:
        for where, row in (unpack or read_list)(path):
            if not isinstance(row, dict):
                raise ValueError(f"{where} is not an object: {AGAIN}")
            yield where, row, path.parent
        return

    for path in find_shards(root, [*names, *patterns], source):
        for where, row in read_rows(path, ()):
            yield where, row, None


def read_list(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and record of every record of a .json file that is a list.

    Raises:
        ValueError: The file is not JSON, or no list.
    """
    content = read_official(path)
    if not isinstance(content, list):
        raise ValueError(f"{path} is not a list of questions: {AGAIN}")
    for number, record in enumerate(content):
        yield f"{path} record {number} (from 0)", record


def read_official(path: Path) -> Any:
    """Return the content of an official JSON file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is not JSON, or not UTF-8.
    """
    return read_json(path, fix=AGAIN)


def read_record(schema: type[Record], record: Any, where: str, fix: str = AGAIN) -> Record:
    """Return a record as an object of its schema.

    Args:
        schema: Keys and their types.
        record: Plain values from a JSON file.
        where: File and line, or file and record, for the error.
        fix: Advice to the user, for the error.

    Raises:
        ValueError: A key is missing, or a value has another type; names place, key and value.
    """
    try:
        return schema.model_validate(record)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{_describe_problem(problem, where)}: {fix}") from error


def read_table(path: Path, required: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a .tsv file, each with file and line, as column to cell.

    Args:
        path: The file; its first line names the columns.
        required: Columns that must be there.

    Raises:
        ValueError: A column is missing, a line has another number of cells, or this is no table.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = table_reader(file, "\t")
            columns = next(reader, [])
            if missing := [column for column in required if column not in columns]:
                raise ValueError(
                    f"{path} has no column {' or '.join(missing)}: give the official .tsv file"
                )

            for cells in reader:
                where = f"{path} line {reader.line_num}"
                if cells and len(cells) != len(columns):
                    raise ValueError(
                        f"{where} has {len(cells)} cells, but the first line has {len(columns)}: "
                        f"{AGAIN}"
                    )
                if cells:
                    yield where, dict(zip(columns, cells, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table in UTF-8 ({error}): {AGAIN}") from error


def read_parquet(path: Path, required: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a .parquet file, each with file and row, as column to plain value.

    Args:
        path: The file.
        required: Columns that must be there.

    Raises:
        MissingPackage: pyarrow is not installed.
        ValueError: A column is missing, or this is no .parquet file.
    """
    pyarrow = import_optional("pyarrow", f"reading {path}", "evaluation")
    parquet = import_optional("pyarrow.parquet", f"reading {path}", "evaluation")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if missing := [column for column in required if column not in columns]:
                raise ValueError(
                    f"{path} has no column {' or '.join(missing)}: give the official .parquet file"
                )

            # A few rows at a time, because images are large.
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a .parquet file ({error}): {AGAIN}") from error


def read_rows(path: Path, required: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a .parquet file, or of a .tsv file of VLMEvalKit.

    Rows of a .tsv file share images: a short image cell is the index of the row that has the image.
    It is replaced by that image.

    Args:
        path: The file.
        required: Columns that must be there; a .tsv file must have an index too.

    Raises:
        MissingPackage: The file is a .parquet, and pyarrow is not installed.
        ValueError: A column is missing, an index stands twice, the image that a row shares is not
            there, or this is neither kind of file.

    Source: open-compass/VLMEvalKit e8e78f05 `vlmeval/dataset/image_base.py`.
    """
    if path.suffix != ".tsv":
        yield from read_parquet(path, required)
        return

    # A reference may point to a later row, so the shared images are found before.
    columns = ("index", *required)
    references = {
        row["image"]
        for _, row in read_table(path, columns)
        if len(row.get("image", "")) <= LONGEST_REFERENCE
    }
    shared = {
        row["index"]: row["image"]
        for _, row in (read_table(path, columns) if references - {""} else ())
        if row["index"] in references and len(row["image"]) > LONGEST_REFERENCE
    }

    place_of: dict[str, str] = {}
    for where, row in read_table(path, columns):
        refuse_repeated(place_of, row["index"], where, "index")
        image = row.get("image", "")
        if image and len(image) <= LONGEST_REFERENCE:
            if image not in shared:
                raise ValueError(
                    f"{where}: the image is neither base64 nor the index of a row with an image: "
                    f"{AGAIN}"
                )
            row["image"] = shared[image]
        yield where, row


def read_answers(cell: str) -> list[str]:
    """Return the answers of a cell: those of a Python list of texts, else the cell itself."""
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]
    is_list = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    return value if is_list else [cell]


def refuse_repeated(
    place_of: dict[Any, str], value: Hashable, where: str, name: str = "question_id"
) -> None:
    """Note where an id stands, and refuse it if it stands in the file already.

    Args:
        place_of: Every id so far to its place; gets this one.
        value: The id.
        where: File and line, or file and record.
        name: Key of the id in the file.

    Raises:
        ValueError: The id was there before; names both places.
    """
    if value in place_of:
        raise ValueError(
            f"{where} has the {name} {value} of {place_of[value]}: keep one of the two"
        )
    place_of[value] = where


class TableImages:
    """Images that the rows of a table hold; equal ones are kept once.

    Args:
        are_shown: Whether a model will be asked. Where only labels are read, no image is kept, and
            a row may lack its own.
    """

    def __init__(self, are_shown: bool) -> None:
        self.are_shown = are_shown
        self._known: dict[str, bytes] = {}

    def read(self, cell: Any, where: str, question_id: str) -> tuple[str, bytes | None]:
        """Return a name that equal images share, and the image file if it will be shown.

        Args:
            cell: Bytes, bytes in a struct with their path, or base64 text.
            where: File and row, for the error.
            question_id: Name of an image that is not there.

        Raises:
            ValueError: An image that will be shown is missing, or a text is not base64.
        """
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(content, str):
            content = decode_image(content, where)
        if not content:
            if self.are_shown:
                raise ValueError(f"{where} has no image: {AGAIN}")
            return question_id, None

        name = hashlib.sha256(content).hexdigest()
        return name, self._known.setdefault(name, content) if self.are_shown else None


def decode_image(cell: str, where: str) -> bytes:
    """Return the bytes of an image that a table holds as base64 text.

    Raises:
        ValueError: The text is not base64.
    """
    try:
        return base64.b64decode(cell)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: the image is not base64 ({error}): {AGAIN}") from error


def write_spreadsheet(
    columns: Sequence[str], rows: Iterable[Mapping[str, str | int | None]]
) -> bytes:
    """Return the content of an .xlsx file.

    Args:
        columns: Names in the first line; the first column names a row in errors.
        rows: Column to text, whole number, or None for an empty cell.

    Raises:
        MissingPackage: openpyxl is not installed.
        ValueError: A text is too long for a cell.
    """
    openpyxl = import_optional("openpyxl", "writing an .xlsx upload", "evaluation")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(list(columns))

    for line, row in enumerate(rows, start=2):
        for number, column in enumerate(columns, start=1):
            value = row[column]
            if isinstance(value, str):
                # Without the type, text that begins with "=" is a formula, and "#N/A" an error.
                text = cell_text(value, f"{column} of row {row[columns[0]]}")
                sheet.cell(line, number, text).data_type = "s"
            elif value is not None:
                sheet.cell(line, number, value)

    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def cell_text(text: str, name: str) -> str:
    """Return a text as it goes into a cell, without characters that no spreadsheet can hold.

    Characters that separate words become a space, all others a replacement character, so that the
    reading rules find the same in it.

    Args:
        text: Any text.
        name: Name of the text, for the error.

    Raises:
        ValueError: The text is too long.
    """
    if len(text) > _LONGEST_CELL:
        raise ValueError(
            f"{name} has {len(text):,} characters, but a cell of a spreadsheet holds "
            f"{_LONGEST_CELL:,}: shorten it"
        )
    spaced = re.sub("[\x0b\x0c\x1c-\x1f]", " ", text)
    return re.sub("[\x00-\x08\x0e-\x1b\ud800-\udfff\ufffe\uffff]", "\ufffd", spaced)


def _describe_problem(problem: Any, where: str) -> str:
    """Return place, key, value and fault of a problem that pydantic found in a record."""
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"{where} has no {key!r}"

    said = "should be an object"
    if problem["type"] != "model_type":
        said = re.sub("^(Value error,|Input|List|String) ", "", problem["msg"])
        said = said.replace(" after validation", "")
    if not key:
        return f"{where} {said}"

    value = repr(problem["input"])
    if len(value) > _LONGEST_SHOWN:
        value = value[:_LONGEST_SHOWN] + " ..."
    return f"{where}: {key} {value} {said}"
