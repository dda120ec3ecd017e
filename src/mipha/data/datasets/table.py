"""Your own data as a table: a row is an image, a question and its answer, or image and caption.

    image,question,answer
    cat.jpg,What is it?,A cat.

    {"image": "cat.jpg", "question": "What is it?", "answer": "A cat."}
    {"file_name": "cat.jpg", "text": "A cat on a sofa."}
    {"instruction": "What is it?", "input": "", "output": "A cat.", "images": ["cat.jpg"]}
    {"system": "Be brief.", "history": [["Hi", "Hello"]], "query": "What is it?",
     "response": "A cat.", "images": ["cat.jpg"]}
    {"image": "cat.jpg", "question": "What is it?", "options": ["A cat", "A dog"], "answer": 0}

A .csv or .tsv whose first line names the columns, JSON lines, or one JSON list. A row with an empty
image is text alone. Image paths start from the folder of the file. A caption answers the request
"Describe the image." Options stand behind the question, and the answer is the letter of one.

Of several `answers` to one question, the most frequent is learned, the first of those where two
are: VQAv2's ten. Lists of `questions` and `answers` are turns of one conversation: OCR-VQA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from mipha.data.dataset import DataSet
from mipha.data.datasets._choices import (
    ANSWER_NUMBERS,
    option_columns,
    read_choice,
    stands_for_column,
)
from mipha.data.datasets._images import IMAGE_COLUMNS, choose_images, is_list, short
from mipha.data.datasets._keys import Keys, parse_list
from mipha.data.datasets._records import (
    LINE_SUFFIXES,
    TABLE_SUFFIXES,
    Row,
    Rows,
    put_images_first,
    record_rows,
)
from mipha.data.datasets._regions import READS
from mipha.data.sample import Message, Sample

QUESTIONS = ("question", "prompt", "query", "instruction", "problem", "input")
ANSWERS = (
    "answer",
    "multiple_choice_answer",
    "response",
    "completion",
    "output",
    "solution",
    "answers",
)
CAPTIONS = ("caption", "text", "description")
CONTEXTS = ("hint", "context", "passage")
"""Names of words that stand before the question; an `input` beside an instruction follows it."""

INSTRUCTION = "Describe the image."


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the rows of a split; arguments and errors as in `messages`.

    Raises:
        ValueError: Also where a table is not UTF-8 or leaves a quote open.
    """
    return record_rows("table", root, split, (*TABLE_SUFFIXES, *LINE_SUFFIXES), image_root)


def to_sample(row: Row) -> Sample:
    """Read one question and answer, or one caption.

    Raises:
        RecordError: The row has no such columns, a cell is empty or not text, or the answer is
            none of the options.
    """
    if not isinstance(row.content, Mapping):
        raise row.fault(
            f"the row is not an object: {str(row.content)[:80]}", "name its columns in an object"
        )
    named = by_name(row.content)
    if len(named) < len(row.content):
        names = [plain_name(name) for name in row.content]
        twice = next(name for name in names if names.count(name) > 1)
        raise row.fault(f"it has two columns {twice!r}, case aside", "rename one of them")
    row = row._replace(content=_by_meaning(row, named))
    columns = columns_of(row.content)
    if columns is None:
        raise row.fault(
            f"it has the columns {', '.join(map(str, row.content)) or 'none'}",
            f"wanted a question ({', '.join(QUESTIONS)}) and an answer ({', '.join(ANSWERS)}), "
            f"or an image and a caption ({', '.join(CAPTIONS)})",
        )
    keys = row.keys()
    keys.read.update(columns)
    images = keys.take_images()

    # A caption.
    if len(columns) == 1:
        caption = _read_text(row, columns[0])
        if not images:
            raise row.fault("its caption is about no image", "give one, or remove the row")
        turns = keys.with_marks([Message("user", INSTRUCTION), Message("assistant", caption)])
        return row.sample(put_images_first(turns, len(images)), images, keys)

    # A question and its answer, with all that stands around them.
    if is_list(row.content[columns[0]]):
        asked = _read_pairs(row, *columns)
    else:
        question, answer = _read_question(row, keys, columns[0]), row.content[columns[1]]
        if options := option_columns(row.content):
            form = row.reading.answer_form
            question, answer = read_choice(keys, question, options, answer, form)
        elif columns[1] in ("multiple_choice_answer", "answers") or (
            "answer" in row.reading.columns and is_list(answer)
        ):
            answer = _most_frequent(row, keys, columns[1])
        else:
            _check_answer(row, keys, columns[1])
            answer = _read_text(row, columns[1])
        asked = [Message("user", question), Message("assistant", answer)]
    asked = keys.with_marks(asked)
    turns = [*keys.take_system(), *keys.take_history(), *asked]
    return row.sample(put_images_first(turns, len(images)), images, keys)


def by_name(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a record by its columns' names in small letters; people write them in either case."""
    return {plain_name(name): value for name, value in content.items()}


def plain_name(name: Any) -> str:
    """Return a column's name in small letters, without spaces."""
    return str(name).strip().lower().replace(" ", "_")


def columns_of(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Name the columns with question and answer; else the one with the caption of an image.

    Args:
        content: A record, as `by_name` gives it.

    Returns:
        One or two names; None where the record has neither. Of several names one that is not None
        counts, because a table of several kinds of rows has the columns of all.
    """
    question, answer, caption = (
        _first_of(content, names) for names in (QUESTIONS, ANSWERS, CAPTIONS)
    )
    if is_list(content.get("questions")) and is_list(content.get("answers")):
        return "questions", "answers"
    filled = {name for name in (question, answer, caption) if name and content[name] is not None}
    if question and answer not in filled and option_columns(content):
        answer = _first_of(content, (*ANSWERS, *ANSWER_NUMBERS))
    if question and answer and filled != {caption}:
        return question, answer
    has_image = choose_images(content) or any(name in content for name in IMAGE_COLUMNS)
    return (caption,) if caption and has_image else None


def _first_of(content: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first name whose value is not None, else the first that is there at all."""
    present = [name for name in names if name in content]
    filled = (name for name in present if content[name] is not None)
    return next(filled, present[0] if present else None)


def _by_meaning(row: Row, content: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose columns have the names that are read, as the recipe's `columns` say."""
    for meaning, column in row.reading.columns.items():
        if plain_name(column) not in content:
            raise row.fault(
                f"it has no column {column!r} for the {meaning}",
                f"the columns are {', '.join(content)}",
            )
        value = content.pop(plain_name(column))
        if meaning in content:
            content[f"other {meaning}"] = content.pop(meaning)
        content = {meaning: value, **content}
    return content


def _read_pairs(row: Row, questions: str, answers: str) -> list[Message]:
    """Return the turns of lists of questions and answers."""
    asked, said = row.content[questions], row.content[answers]
    if not is_list(said) or len(asked) != len(said) or not asked:
        held = f"a list of {len(said)}" if is_list(said) else short(said)
        raise row.fault(
            f"its {questions} is a list of {len(asked)}, and its {answers} is {held}",
            "wanted one answer for each question",
        )
    turns: list[Message] = []
    for number, (question, answer) in enumerate(zip(asked, said, strict=True)):
        if not all(isinstance(text, str) and text.strip() for text in (question, answer)):
            raise row.fault(
                f"question {number} or its answer is {short(question)}, {short(answer)}",
                "wanted text that is not empty",
            )
        turns += [Message("user", question), Message("assistant", answer)]
    return turns


def _most_frequent(row: Row, keys: Keys, column: str) -> str:
    """Return the answer that most of several people gave, the first of those where two are.

    Source: VQAv2's `multiple_choice_answer` is its most frequent answer.
    """
    if column == "multiple_choice_answer":
        keys.read.add("answers")
        if row.content[column] is not None:
            return _read_text(row, column)
    given = parse_list(row.content.get("answer" if column == "answer" else "answers"))
    words = [
        word.get("answer") if isinstance(word, Mapping) else word
        for word in (given if is_list(given) else [])
    ]
    if not words or any(not isinstance(word, str) or not word.strip() for word in words):
        raise row.fault(f"its answers are {short(given)}", "wanted a list of texts")
    return max(dict.fromkeys(words), key=words.count)


def _read_question(row: Row, keys: Keys, column: str) -> str:
    """Return the question, after its context and before its input."""
    question = _read_text(row, column)
    text = None if column == "input" else keys.take("input")
    if text is not None and str(text).strip():
        question = f"{question}\n{_read_text(row, 'input')}"
    for name in CONTEXTS:
        value = keys.content.get(name)
        if isinstance(value, str) and value.strip():
            keys.read.add(name)
            question = f"Context: {value}\n{question}"
    return question


def _check_answer(row: Row, keys: Keys, column: str) -> None:
    """Remark on a number or letter that may stand for an option which nothing reads."""
    answer = str(row.content[column]).strip()
    if not (answer.isdecimal() or (len(answer) == 1 and answer.isalpha() and answer.isupper())):
        return
    if stands_for_column(row.content, answer):
        about = f"the {column} may be one of the columns of options, which are not complete"
        keys.remark("unclear-choice", about, f"{about}: {short(row.content[column])}")
    for name, value in row.content.items():
        value = parse_list(value)
        if name in keys.read or not is_list(value) or len(value) < 2:
            continue
        is_number = answer.isalpha() or int(answer) <= len(value)
        if is_number and answer not in value and all(isinstance(item, str) for item in value):
            about = f'the {column} may be the number of one of "{name}", which nothing reads'
            keys.remark("unclear-choice", about, f"{about}: {short(row.content[column])}")


def _read_text(row: Row, column: str) -> str:
    value = row.content[column]
    if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise row.fault(f"its {column} is {str(value)[:80]!r}", "wanted text that is not empty")
    return value


DATASET = DataSet(
    "table", load, to_sample, takes_image_root=True, reads=("answer_form", "columns", *READS)
)
