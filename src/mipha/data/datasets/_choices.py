"""Multiple choice: the options of a row, and which of them is its answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
_LETTERED = re.compile(r"\(?([A-Za-z])[).:]\s+")
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
    found = {name: _COLUMN.fullmatch(name) for name in content}
    columns = [name for name, match in found.items() if match and content[name] is not None]
    places = ["".join(filter(None, found[name].groups())) for name in columns]  # type: ignore[union-attr]
    wanted = "abcdefgh" if places and places[0].isalpha() else "12345678"
    return columns if len(columns) > 1 and "".join(places) == wanted[: len(columns)] else []


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
    options, letters = _read_options(keys, columns)
    if all(_lettered(option, place) for place, option in enumerate(options)):
        options = [_LETTERED.sub("", option) for option in options]
    if len(options) < 2 or len(options) > len(LETTERS):
        raise keys.fault(
            f"its {columns[0]} are {short(keys.content.get(columns[0]))}",
            "wanted a list of two options or more",
            "unclear-choice",
        )
    number = _number_of(keys, options, letters, answer)

    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    if not all(line in question for line in lines):
        question = "\n".join([question, *lines])
    if form == "letter" and "letter" not in question:
        question += f"\n{INSTRUCTION}"
    forms = {"letter": LETTERS[number], "text": options[number], "letter-text": lines[number]}
    return Choice(question, forms[form])


def _read_options(keys: Keys, columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of the options, and the letters or numbers that the row gives them."""
    keys.read.update(columns)
    if len(columns) > 1:
        return [_text(keys.content[name]) for name in columns], list(LETTERS[: len(columns)])

    value = parse_list(keys.content[columns[0]])
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels = value.get("label") or LETTERS
        return [_text(item) for item in value["text"]], [str(label) for label in labels]
    if isinstance(value, Mapping):
        return [_text(item) for item in value.values()], [str(label) for label in value]
    if is_list(value):
        if value and all(isinstance(item, Mapping) and "text" in item for item in value):
            labels = [str(item.get("label", item.get("id", ""))) for item in value]
            return [_text(item["text"]) for item in value], labels
        return [_text(item) for item in value], list(LETTERS[: len(value)])
    if isinstance(value, str):
        lines = [line.strip() for line in re.split(r"\n|;|\|", value) if line.strip()]
        return [re.sub(r"^\(?[A-H][).:]\s*", "", line) for line in lines], list(LETTERS)
    return [], []


def _number_of(keys: Keys, options: list[str], letters: list[str], answer: Any) -> int:
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
    if said.isdecimal() and letters[:1] == ["A"]:
        if int(said) < len(options):
            found.add(int(said))
    elif said in letters[: len(options)]:
        found.add(letters.index(said))
    elif (match := _LETTER.fullmatch(said)) and len(found) == 0:
        letter = match[1].upper()
        if letter in letters[: len(options)]:
            found.add(letters.index(letter))
        elif letters[:1] == ["A"] and LETTERS.index(letter) < len(options):
            found.add(LETTERS.index(letter))

    if len(found) != 1:
        listed = ", ".join(options)[:80]
        which = "none of its options" if not found else "more than one of its options"
        raise keys.fault(
            f"its answer {short(answer)} is {which}: {listed}",
            "give the option's letter, its words, or its number from 0",
            "unclear-choice",
        )
    return found.pop()


def _lettered(option: str, place: int) -> bool:
    """Return whether an option begins with its own letter, as in `A. a cat`."""
    match = _LETTERED.match(option)
    return match is not None and match[1].upper() == LETTERS[place]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
