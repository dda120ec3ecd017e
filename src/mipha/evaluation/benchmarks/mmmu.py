"""MMMU: college questions in 30 subjects, with up to seven images in each.

The official rules read a letter, and draw one at random where they find none. The draws have a seed
and an order, so they are always the same for the same answers; `guessed` counts them, and
`unreadable_is_wrong` is the accuracy without them.

    A   (A) text   A text   Answer: A   The answer is A.    A
    a   (a)   A)   A. text   **A**   a short option         guessed

An open answer is right if a number or a text that stands behind words such as "is" or "=" agrees.

The official prompt for LLaVA shows the first image only. The split `all-images` asks the same
questions with every image that a question names, in front of the text, as lmms-eval does.

Source: MMMU-Benchmark/MMMU bb0b95a9 `mmmu/main_parse_and_eval.py`, `mmmu/utils/eval_utils.py`,
    `mmmu/utils/data_utils.py`, `mmmu/configs/llava1.5.yaml`; EvolvingLMMs-Lab/lmms-eval 75571cfe
    `tasks/mmmu` (images).
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import SHORT
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    TableImages,
    find_shards,
    read_parquet,
    read_record,
    refuse_repeated,
)
from mipha.evaluation.multiple_choice import LETTER, LETTERS

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}
SEED = 42
"""Seed of the letters that are drawn."""
SOURCE = (
    "get <Subject>/validation-*.parquet of all 30 subjects from huggingface.co/datasets/MMMU/MMMU, "
    "or data/validation-*.parquet from lmms-lab/MMMU"
)

_STRIPPED = ",.!?;:'"
_FEW_WORDS = 5
"""Words up to which an option's text is not looked for in an answer."""
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_EMPTY_KEYS = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)

Key = str | float
"""What an open answer may mean: a number, or a text in lower case."""


class _Row(OfficialRecord):
    id: str = Field(pattern=r"^[a-z]+_\w+_\d+$")
    question: str
    options: str
    answer: str
    question_type: Literal["multiple-choice", "open"]


def read(root: Path, split: str) -> list[Question]:
    """Return every question, subjects in alphabetical order, each in the order of its file.

    Args:
        root: Folder with a folder for each subject, or with `data/`, or one .parquet file.
        split: `validation`, `all-images` (the same questions) or `test`.

    Returns:
        Questions whose facts are `choices` (letter to text, empty for an open question), `answer`
        (letter, or the right texts; not of the private split), `subject`, `kind` and `image`
        (hash of the first image, or the id where there is none).
    """
    return _read_questions(root, split, with_images=True)


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions; the images need not be there."""
    return _read_questions(path, "validation", with_images=False)


def read_letter(text: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter that an answer names last; None where the rules find none.

    Args:
        text: The answer, verbatim.
        choices: Letter to option text.
    """
    for mark in _STRIPPED:
        text = text.strip(mark)
    text = f" {text} "

    # In brackets; else between spaces; else, in a longer answer, by its text.
    for pattern in ("({})", " {} "):
        places = {letter: text.rfind(pattern.format(letter)) for letter in choices}
        if named := {letter: place for letter, place in places.items() if place >= 0}:
            return max(named, key=lambda letter: named[letter])
    if len(text.split()) <= _FEW_WORDS:
        return None
    places = {letter: text.lower().rfind(option.lower()) for letter, option in choices.items()}
    named = {letter: place for letter, place in places.items() if place >= 0}
    return max(named, key=lambda letter: named[letter]) if named else None


def read_open_answer(text: str) -> list[Key]:
    """Return what an open answer may mean: texts behind indicators, and every number in them."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    keys = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        shortest = ""
        for indicator in indicators:
            if indicator in line:
                rest = line.split(indicator)[-1].strip()
                if not shortest or len(rest) < len(shortest):
                    shortest = rest
        if shortest and shortest not in _EMPTY_KEYS:
            keys.append(shortest)

    keys = keys or [text]
    numbers = [found for key in keys for pattern in _NUMBERS for found in pattern.findall(key)]
    normalised = [value for key in (*keys, *numbers) for value in normalise(key)]
    return list(dict.fromkeys(normalised))


def normalise(text: str) -> list[Key]:
    """Return a text as it is compared: a number with two decimals, or in lower case."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def is_right_open(found: Sequence[Key], answers: Sequence[str]) -> bool:
    """Return whether a text holds a right one, or a number equals a right one."""
    wanted = [value for answer in answers for value in normalise(answer)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(
        any(text in value for text in texts) if isinstance(value, str) else value in wanted
        for value in found
    )


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge letters, drawn ones too, and open answers."""
    letters, guessed = _choose_letters(questions, predictions)
    right = {}
    contributions = []
    for question in questions:
        facts = question.facts
        if question.id in letters:
            is_right = letters[question.id] == facts["answer"]
        else:
            is_right = is_right_open(read_open_answer(predictions[question.id]), facts["answer"])
        right[question.id] = float(is_right)

        names = [
            "overall",
            f"domain.{DOMAIN_OF[facts['subject']]}",
            f"subject.{facts['subject']}",
            facts["kind"],
        ]
        amounts = dict.fromkeys(names, right[question.id]) | {
            "guessed": float(question.id in guessed),
            "unreadable_is_wrong": 0.0 if question.id in guessed else right[question.id],
        }
        contributions.append((facts["image"], amounts))
    return Judgement(
        per_question=right,
        contributions=contributions,
        parsed=letters,
        submission=_make_submission(questions, predictions, letters),
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right: of all, by domain, subject and kind; and the letters drawn."""
    groups = sorted(name for name in totals.names if name.startswith(("domain.", "subject.")))
    kinds = [kind for kind in ("multiple-choice", "open") if kind in totals.names]
    names = ("overall", "unreadable_is_wrong", *kinds, *groups)
    return {name: 100 * totals.mean(name) for name in names} | {"guessed": totals.sum("guessed")}


def make_upload(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """Return the file of EvalAI's challenge 2179: id to letter or text."""
    letters, _ = _choose_letters(questions, predictions)
    answers = _make_submission(questions, predictions, letters)
    content = json.dumps(answers, ensure_ascii=False, indent=1) + "\n"
    return {"mmmu.json": content.encode("utf-8", "surrogatepass")}


def _choose_letters(
    questions: Sequence[Question], predictions: Mapping[str, str]
) -> tuple[dict[str, str], set[str]]:
    """Return the letter of every multiple-choice answer, and the ids of those that were drawn.

    Draws go through the subjects in alphabetical order and through the questions of each, whatever
    the order of the answers.
    """
    draw = random.Random(SEED)
    letters, guessed = {}, set()
    for question in sorted(questions, key=lambda question: question.facts["subject"]):
        if choices := question.facts["choices"]:
            letter = read_letter(predictions[question.id], choices)
            if letter is None:
                letter = draw.choice(list(choices))
                guessed.add(question.id)
            letters[question.id] = letter
    ids = [question.id for question in questions if question.id in letters]
    return {question_id: letters[question_id] for question_id in ids}, guessed


def _make_submission(
    questions: Sequence[Question], predictions: Mapping[str, str], letters: Mapping[str, str]
) -> dict[str, str]:
    return {
        question.id: letters.get(question.id, predictions[question.id]) for question in questions
    }


def _read_questions(root: Path, split: str, with_images: bool) -> list[Question]:
    images = TableImages(with_images)
    place_of: dict[str, str] = {}
    questions = []
    for where, cells in _read_rows(root, "validation" if split == "all-images" else split):
        row = read_record(_Row, cells, where)
        refuse_repeated(place_of, row.id, where, "id")
        subject = "_".join(row.id.split("_")[1:-1])
        if subject not in DOMAIN_OF:
            raise ValueError(f"{where}: id {row.id!r} names no subject of MMMU: {AGAIN}")
        options = _read_options(row, where)
        choices = dict(zip(LETTERS, options, strict=False))

        # The images: the first, or all that the question and its options name.
        numbers = [1]
        if split == "all-images":
            named = re.findall(r"<image (\d)>", " ".join((row.question, *options)))
            numbers = sorted({int(number) for number in named if cells.get(f"image_{number}")})
            numbers = numbers or [1]
        read_images = [images.read(cells.get(f"image_{n}"), where, row.id) for n in numbers]
        shown = tuple(image for _, image in read_images if image is not None)

        facts: dict[str, Any] = {
            "choices": choices,
            "subject": subject,
            "kind": row.question_type,
            "image": read_images[0][0],
        }
        if split != "test":
            facts["answer"] = _read_gold(row, choices, where)
        image = shown if split == "all-images" else next(iter(shown), None)
        questions.append(Question(row.id, _make_prompt(row, options), image or None, facts))
    return sorted(questions, key=lambda question: question.facts["subject"])


def _read_rows(root: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    patterns = (f"data/{split}-*.parquet", f"{split}-*.parquet", f"{split}.parquet")
    folders = [root]
    if root.is_dir() and not any(path for name in patterns for path in root.glob(name)):
        own = {subject: root / subject for subject in sorted(DOMAIN_OF)}
        folders = [folder for folder in own.values() if folder.is_dir()] or [root]
    for folder in folders:
        for path in find_shards(folder, patterns[1:] if folder != root else patterns, SOURCE):
            yield from read_parquet(path, ("id", "question", "options", "question_type"))


def _read_options(row: _Row, where: str) -> list[str]:
    """Return the options, which the file has as the text of a Python list."""
    options = _read_list(row.options)
    if options is None:
        raise ValueError(f"{where}: options {row.options!r} is not the text of a list: {AGAIN}")
    if (row.question_type == "multiple-choice") != bool(options) or len(options) > len(LETTERS):
        raise ValueError(
            f"{where}: question_type {row.question_type!r} does not go with "
            f"{len(options)} options: {AGAIN}"
        )
    return options


def _read_gold(row: _Row, choices: Mapping[str, str], where: str) -> str | list[str]:
    """Return the letter, or the right texts of an open question; some are the text of a list."""
    if not choices:
        return _read_list(row.answer) or [row.answer]
    if row.answer not in choices:
        raise ValueError(
            f"{where}: answer {row.answer!r} should be one of {', '.join(choices)}: {AGAIN}"
        )
    return row.answer


def _read_list(text: str) -> list[str] | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return [str(item) for item in value] if isinstance(value, list) else None


def _make_prompt(row: _Row, options: Sequence[str]) -> str:
    """Return the official prompt for LLaVA-1.5; a blank line follows the options."""
    if not options:
        return row.question + SHORT
    listed = "".join(
        f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False)
    )
    return f"{row.question}\n{listed}{LETTER}"


BENCHMARK = Benchmark(
    name="mmmu",
    metrics=(
        Metric("overall", "%", "questions answered right, unreadable letters drawn with seed 42"),
        Metric("unreadable_is_wrong", "%", "questions answered right where nothing is drawn"),
        Metric("multiple-choice", "%", "multiple-choice questions"),
        Metric("open", "%", "open questions"),
        Metric("domain", "%", "questions of one of the six domains"),
        Metric("subject", "%", "questions of one of the thirty subjects"),
        Metric("guessed", "questions", "multiple-choice answers that named no option"),
    ),
    splits={
        "validation": Split(900),
        "all-images": Split(900),
        "test": Split(10500, "EvalAI challenge 2179"),
    },
    protocol=(
        "MMMU validation, official prompt for LLaVA-1.5 with the first image (split all-images: "
        "with every image that the question names, in front of the text), greedy; official "
        "parser, a random option with seed 42 where it reads none; mean over questions; 95 % "
        "interval: cluster bootstrap over first images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    submission=make_upload,
    id_advice="MMMU's ids are those of the files, such as validation_Art_1",
)
