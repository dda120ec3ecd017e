"""Multiple choice: the options of a row, and which of them is its answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from mipha.data.datasets._images import is_list, short
from mipha.data.datasets._keys import Keys, parse_list

OPTIONS = ("options", "choices", "candidates", "answer_choices", "multiple_choices")
"""Names under which a row gives its options."""

ANSWER_NUMBERS = (
    "answer_index",
    "answer_idx",
    "correct_choice_idx",
    "correct_answer_idx",
    "correct_index",
    "correct_option",
    "answer_id",
    "answer_key",
    "answerkey",
    "label",
    "target",
    "gold",
)
"""Names under which a row says which option is right, where it has no answer in words."""

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""Source: LLaVA-1.5, the prompt for multiple choice."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_COLUMN = re.compile(r"(?:option|choice|answer)?_?([a-h])|(?:option|choice)_?([1-8])")
_LETTERED = re.compile(r"\(?([A-Za-z])(?:\)\s*|[.:]\s+)")
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")


class Choice(NamedTuple):
    """A multiple choice question, as it is asked and answered.

    Args:
        question: Question, options and instruction.
        answer: The right option in the wanted form.
    """

    question: str
    answer: str


def option_columns(content: Mapping[str, Any]) -> list[str]:
    """Return the columns that hold options: one with all of them, or one for each.

    Args:
        content: A row by the names of its columns in small letters.
    """
    for name in OPTIONS:
        if content.get(name) not in (None, "", [], {}):
            return [name]
    columns = [name for name in content if _place(name)]
    while columns and _is_empty(content[columns[-1]]):
        columns.pop()
    places = "".join(map(_place, columns))
    num_filled = sum(not _is_empty(content[name]) for name in columns)
    is_complete = places in ("abcdefgh"[: len(columns)], "12345678"[: len(columns)])
    return columns if num_filled > 1 and is_complete else []


def stands_for_column(content: Mapping[str, Any], answer: str) -> bool:
    """Return whether an answer is the letter or number of a column that may hold an option.

    Args:
        content: A row by the names of its columns in small letters.
        answer: Words of the answer.
    """
    places = [_place(name) for name, value in content.items() if not _is_empty(value)]
    return answer.lower() in places and len(list(filter(None, places))) > 1


def _place(column: str) -> str:
    """Return the letter or number of a column that may hold an option; empty for any other."""
    match = _COLUMN.fullmatch(column)
    return "".join(filter(None, match.groups())) if match else ""


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def read_choice(
    keys: Keys, question: str, columns: Sequence[str], answer: Any, form: str = "letter"
) -> Choice:
    """Read a question with options.

    Args:
        keys: Keys of the row.
        question: Words of the question.
        columns: Columns of the options, as `option_columns` gives them.
        answer: Number of an option from 0, its letter or its words, as the row gives it.
        form: What the answer is to be: `letter`, with the instruction to give it, `text` or
            `letter-text` (A. a cat).

    Raises:
        RecordError: The options cannot be read, or the answer is none of them or could be two.
    """
    # Options that are empty are none: a table has as many columns as its longest question.
    read = zip_longest(*_read_options(keys, columns), fillvalue="")
    filled = [(option, label) for option, label in read if not _is_empty(option)]
    options, labels = [_text(option) for option, _ in filled], [label for _, label in filled]
    if not all(isinstance(option, str | int | float) for option, _ in filled):
        raise keys.fault(
            f"its {columns[0]} are {short(keys.content.get(columns[0]))}",
            "wanted a list of texts",
            "unclear-choice",
        )
    if all(_lettered(option, place) for place, option in enumerate(options)):
        options = [_LETTERED.sub("", option) for option in options]
    if len(options) < 2 or len(options) > len(LETTERS):
        raise keys.fault(
            f"its {columns[0]} are {short(keys.content.get(columns[0]))}",
            "wanted a list of two options or more",
            "unclear-choice",
        )
    number = _number_of(keys, options, labels, answer)

    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    if not all(line in question for line in lines):
        question = "\n".join([question, *lines])
    if form == "letter" and "letter" not in question:
        question += f"\n{INSTRUCTION}"
    forms = {"letter": LETTERS[number], "text": options[number], "letter-text": lines[number]}
    return Choice(question, forms[form])


def _read_options(keys: Keys, columns: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Return the options, and the letters or numbers that the row gives them."""
    keys.read.update(columns)
    if len(columns) > 1:
        return [keys.content[name] for name in columns], [_place(c).upper() for c in columns]

    value = parse_list(keys.content[columns[0]])
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels = value.get("label") or LETTERS
        return list(value["text"]), [str(label) for label in labels]
    if isinstance(value, Mapping):
        return list(value.values()), [str(label) for label in value]
    if is_list(value):
        if value and all(isinstance(item, Mapping) and "text" in item for item in value):
            labels = [str(item.get("label", item.get("id", ""))) for item in value]
            return [item["text"] for item in value], labels
        return list(value), list(LETTERS)
    if isinstance(value, str):
        return [line.strip() for line in re.split(r"\n|;|\|", value)], list(LETTERS)
    return [], []


def _number_of(keys: Keys, options: list[str], labels: list[str], answer: Any) -> int:
    """Return the number of the right option, from 0."""
    if isinstance(answer, str) and (match := _LETTERED.match(answer)):
        rest = answer[match.end() :].strip().casefold()
        if rest in [option.strip().casefold() for option in options]:
            answer = match[1]  # as in "B. a dog"
    named = parse_list(answer)
    if is_list(named) and len(named) == 1:
        answer = named[0]
    said = _text(answer).strip()
    folded = [option.strip().casefold() for option in options]
    found = {place for place, option in enumerate(folded) if option == said.casefold()}

    # A number is an index from 0, unless the options are numbers themselves.
    if isinstance(answer, int | float) and not isinstance(answer, bool) and answer == int(answer):
        said = str(int(answer))
    is_counted = labels == list(LETTERS[: len(labels)])
    if said.isdecimal() and is_counted:
        if int(said) < len(options):
            found.add(int(said))
    elif said in labels:
        found.add(labels.index(said))
    elif (match := _LETTER.fullmatch(said)) and len(found) == 0:
        letter = match[1].upper()
        if letter in labels:
            found.add(labels.index(letter))
        elif all(map(str.isdecimal, labels)) and LETTERS.index(letter) < len(options):
            found.add(LETTERS.index(letter))

    if len(found) != 1:
        listed = ", ".join(options)[:80]
        which = "none of its options" if not found else "more than one of its options"
        raise keys.fault(
            f"its answer {short(answer)} is {which}: {listed}",
            f"give the words of one, or one of {', '.join(labels)}"
            + (" or its number from 0" if is_counted else ""),
            "unclear-choice",
        )
    return found.pop()


def _lettered(option: str, place: int) -> bool:
    """Return whether an option begins with its own letter, as in `A. a cat`."""
    match = _LETTERED.match(option)
    return match is not None and match[1].upper() == LETTERS[place]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
