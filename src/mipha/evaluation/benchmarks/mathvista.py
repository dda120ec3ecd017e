"""MathVista: 1,000 questions of mathematics about images, answered at any length.

A language model extracts the short answer from the text, unless the text is one already, and a rule
compares. So the headline needs a judge:

    overall                   the official number: a judge extracts (GPT-4 in the paper)
    response_as_extraction    the text itself is compared: for short answers near the official one
    without_judge             the official program whose judge fails: what the rules cannot read is
                              empty, and an empty answer becomes the shortest option

Without a judge the second is the headline. An option is chosen by its letter, else by the smallest
edit distance, so every text chooses one.

Source: lupantech/MathVista 53d52587 `evaluation/{extract_answer,calculate_score,build_query}.py`,
    `evaluation/prompts/ext_ans.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.anls import edit_distance
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    QuestionId,
    TableImages,
    find_image,
    read_json_or_table,
    read_official,
    read_record,
    refuse_repeated,
)
from mipha.evaluation.judge import UnreadError, ask_each, explain_unread, strip_reasoning
from mipha.evaluation.multiple_choice import LETTERS

GROUPS = ("language", "source", "category", "task", "context", "grade")
"""Keys of the metadata that give a metric each; `skills` holds several."""
JSON = ("testmini.json", "data/testmini.json")
PARQUET = ("data/testmini-*.parquet", "testmini-*.parquet", "testmini.parquet")
SOURCE = (
    "get data/testmini.json and data/query.json from github.com/lupantech/MathVista and images/ "
    "from huggingface.co/datasets/AI4Math/MathVista, or its data/testmini-*.parquet"
)

_TRIES = 5
_MAX_TOKENS = 1024
_LETTER = re.compile(r"\(([a-zA-Z])\)")

_AT_THE_END = ", at the end."
_HINTS = {
    "text": "Please answer the question and provide the correct option letter, e.g., A, B, C, D"
    + _AT_THE_END,
    "integer": "Please answer the question requiring an integer answer and provide the final "
    "value, e.g., 1, 2, 3" + _AT_THE_END,
    "float 1": "Please answer the question requiring a floating-point number with one decimal "
    "place and provide the final value, e.g., 1.2, 1.3, 1.4" + _AT_THE_END,
    "float 2": "Please answer the question requiring a floating-point number with two decimal "
    "places and provide the final value, e.g., 1.23, 1.34, 1.45" + _AT_THE_END,
    "list": "Please answer the question requiring a Python list as an answer and provide the "
    "final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]" + _AT_THE_END,
}

# Question, answer of a model, extracted answer; the first line of each is a hint from above.
_EXAMPLES = (
    (
        "integer",
        "Which number is missing?",
        "The number missing in the sequence is 14.",
        "14",
    ),
    (
        "float 1",
        "What is the fraction of females facing the camera?",
        "The fraction of females facing the camera is 0.6, which means that six out of ten females "
        "in the group are facing the camera.",
        "0.6",
    ),
    (
        "float 2",
        "How much money does Luca need to buy a sour apple candy and a butterscotch candy? "
        "(Unit: $)",
        "Luca needs $1.45 to buy a sour apple candy and a butterscotch candy.",
        "1.45",
    ),
    (
        "list",
        "Between which two years does the line  graph saw its maximum peak?",
        "The line graph saw its maximum peak between 2007 and 2008.",
        "[2007, 2008]",
    ),
    (
        "text",
        "What fraction of the shape is blue?\nChoices:\n(A) 3/11\n(B) 8/11\n(C) 6/11\n(D) 3/5",
        "The correct answer is (B) 8/11.",
        "B",
    ),
)
_FEW_SHOT = (
    "Please read the following example. Then extract the answer from the model response and type "
    "it at the end of the prompt.\n\n"
) + "\n\n".join(
    f"Hint: {_HINTS[hint]}\nQuestion: {question}\n\nModel response: {response}\n\n"
    f"Extracted answer: {answer}"
    for hint, question, response, answer in _EXAMPLES
)


class _Metadata(OfficialRecord):
    language: str
    source: str
    category: str
    task: str
    context: str
    grade: str
    skills: list[str]


class _Record(OfficialRecord):
    pid: QuestionId
    question: str
    choices: list[str] | None
    unit: str | None
    precision: float | None
    answer: str
    question_type: Literal["multi_choice", "free_form"]
    answer_type: Literal["text", "integer", "float", "list"]
    metadata: _Metadata
    query: str | None = Field(default=None, min_length=1)


def read(root: Path, split: str) -> list[Question]:
    """Return every question in the order of the file.

    Args:
        root: Folder with testmini.json (or `data/` that holds it) and images/, or with .parquet
            files, or one file.
        split: `testmini`.

    Returns:
        Questions whose text is the published query, and whose facts are `answer`, `choices` (texts,
        empty without), `answer_type`, `precision`, `groups` (names of the metrics that the question
        counts for) and `image` (name or hash of the image).
    """
    return _read_questions(root, with_images=True)


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions; the images need not be there."""
    return _read_questions(path, with_images=False)


def extract_by_rule(text: str, question: Question) -> str | None:
    """Return an answer that is short already; None where the judge is asked."""
    if not text or text in question.facts["choices"]:
        return text
    read = {"integer": int, "float": float}.get(question.facts["answer_type"])
    if read is None:
        return None
    try:
        return str(read(text))
    except ValueError:
        return None


def normalise(extraction: str, question: Question) -> str | None:
    """Return an extracted answer as it is compared; None where it is no number."""
    facts = question.facts
    if choices := facts["choices"]:
        text = extraction.strip()
        if found := _LETTER.search(text):
            text = found[1].upper()
        letters = LETTERS[: len(choices)]
        if len(text) == 1 and text in letters:
            return choices[letters.index(text)]
        return min(choices, key=lambda choice: edit_distance(text, choice))
    try:
        if facts["answer_type"] == "integer":
            return str(int(float(extraction)))
        if facts["answer_type"] == "float":
            return str(round(float(extraction), facts["precision"]))
    except (ValueError, OverflowError):
        return None
    return extraction


def extraction_prompt(query: str, text: str) -> str:
    """Return the question to the judge."""
    return f"{_FEW_SHOT}\n\n{query}\n\n{text}\n\nExtracted answer: "


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge the extracted answers, and the texts themselves.

    Args:
        questions: Questions with their queries as text.
        predictions: Question id to answer, verbatim.
        judge: Extracts what the rules cannot; None: the text itself is compared.

    Raises:
        ValueError: The judge has no recorded reply, or says nothing to one answer after the other.
    """
    by_rule = {
        question.id: extract_by_rule(predictions[question.id], question) for question in questions
    }
    extracted, failed = dict(by_rule), {}
    if judge is not None:

        def ask(question: Question) -> str:
            return _extract(question, predictions[question.id], judge)

        unread = [question for question in questions if by_rule[question.id] is None]
        read, failed = ask_each(unread, ask, judge)
        extracted |= read

    parsed: dict[str, str | None] = {}
    right: dict[str, float] = {}
    contributions = []
    for question in questions:
        if question.id in failed:
            continue
        facts, text = question.facts, predictions[question.id]
        bare = normalise(text, question)
        own = bare if judge is None else normalise(extracted[question.id] or "", question)
        parsed[question.id] = own
        right[question.id] = float(own == facts["answer"])
        amounts = dict.fromkeys(facts["groups"], right[question.id]) | {
            "response_as_extraction": float(bare == facts["answer"]),
            "without_judge": float(
                normalise(by_rule[question.id] or "", question) == facts["answer"]
            ),
        }
        if judge is not None:
            amounts["overall"] = right[question.id]
        contributions.append((facts["image"], amounts))
    if not right:
        raise ValueError(f"no answer was extracted: {next(iter(failed.values()))}")

    return Judgement(
        per_question=right,
        contributions=contributions,
        parsed=parsed,
        submission={
            question_id: predictions[question_id] if judge is None else extracted[question_id] or ""
            for question_id in right
        },
        failed=failed,
        notes=(_describe_reading(judge, by_rule),),
        rules=None if judge is not None else "official, without its judge",
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right: with the judge where there is one, without, and by group."""
    with_judge = ("overall",) if "overall" in totals.names else ()
    groups = sorted(name for name in totals.names if "." in name)
    names = (*with_judge, "response_as_extraction", "without_judge", *groups)
    return {name: 100 * totals.mean(name) for name in names}


def _extract(question: Question, text: str, judge: Judge) -> str:
    """Ask a judge for the answer that a text gives.

    An empty reply is asked for again, as officially; one of spaces only is an empty answer.
    """
    prompt = extraction_prompt(question.text, text)
    replies = []
    for attempt in range(_TRIES):
        reply = judge.ask(question.id, prompt, attempt=attempt, max_tokens=_MAX_TOKENS)
        if said := strip_reasoning(reply):
            return said.strip()
        replies.append(reply)
    raise UnreadError(explain_unread("answer", replies))


def _describe_reading(judge: Judge | None, by_rule: Mapping[str, str | None]) -> str:
    num_unread = sum(extraction is None for extraction in by_rule.values())
    if judge is None:
        return (
            "scored without a judge, the texts themselves as the extracted answers: "
            f"{num_unread:,} of {len(by_rule):,} would need one; published numbers are with GPT-4"
        )
    return (
        f"the judge extracted {num_unread:,} of {len(by_rule):,} answers; published numbers are "
        "with GPT-4"
    )


def _read_questions(root: Path, with_images: bool) -> list[Question]:
    images = TableImages(with_images)
    place_of: dict[str, str] = {}
    questions = []
    for where, row, folder in read_json_or_table(root, JSON, PARQUET, SOURCE, _unpack):
        record = read_record(_Record, row, where)
        refuse_repeated(place_of, record.pid, where, "pid")
        choices = record.choices or []
        _check_record(record, choices, where)

        # The image: a file beside the .json file, or inside the table.
        image: Path | bytes | None
        if folder is None:
            name, image = images.read(row.get("decoded_image"), where, record.pid)
        else:
            name = str(row.get("image") or "")
            image = find_image(folder, (name, f"../{name}"), SOURCE) if with_images else None

        facts = {
            "answer": record.answer,
            "choices": tuple(choices),
            "answer_type": record.answer_type,
            "precision": None if record.precision is None else int(record.precision),
            "groups": _read_groups(record),
            "image": name,
        }
        text = record.query or _make_query(record, choices)
        questions.append(Question(record.pid, text, image, facts))
    return questions


def _unpack(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and row of every question of testmini.json, with its query if that is beside."""
    content = read_official(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not an object of questions by pid: {AGAIN}")
    beside = path.parent / "query.json"
    queries = read_official(beside) if beside.is_file() else {}
    for pid, row in content.items():
        if isinstance(row, dict):
            row = row | {"query": queries.get(pid)}
        yield f"{path}, question {pid}", row


def _check_record(record: _Record, choices: Sequence[str], where: str) -> None:
    """Refuse a label that no answer could agree with."""
    if (record.question_type == "multi_choice") != bool(choices):
        raise ValueError(
            f"{where}: question_type {record.question_type!r} does not go with "
            f"{len(choices)} choices: {AGAIN}"
        )
    if choices and record.answer not in choices:
        raise ValueError(f"{where}: answer {record.answer!r} should be one of {choices}: {AGAIN}")
    if record.answer_type == "float" and record.precision not in (1, 2):
        raise ValueError(f"{where}: precision {record.precision!r} should be 1 or 2: {AGAIN}")


def _read_groups(record: _Record) -> tuple[str, ...]:
    """Return the metrics that the question counts for."""
    metadata = record.metadata
    return (
        f"question_type.{record.question_type}",
        f"answer_type.{record.answer_type}",
        *(f"{group}.{getattr(metadata, group)}" for group in GROUPS),
        *(f"skills.{skill}" for skill in dict.fromkeys(metadata.skills)),
    )


def _make_query(record: _Record, choices: Sequence[str]) -> str:
    """Return the query that the official program makes of a question."""
    kind = record.answer_type
    hint = _HINTS[f"float {int(record.precision or 1)}" if kind == "float" else kind]
    unit = f" (Unit: {record.unit})" if record.unit else ""
    query = f"Hint: {hint}\nQuestion: {record.question}{unit}"
    if choices:
        query += "\nChoices:"
        for letter, choice in zip(LETTERS, choices, strict=False):
            query += f"\n({letter}) {choice}"
    return query.rstrip()


BENCHMARK = Benchmark(
    name="mathvista",
    metrics=(
        Metric("overall", "%", "questions answered right, answers extracted by a judge"),
        Metric("response_as_extraction", "%", "questions answered right, texts as they are"),
        Metric("without_judge", "%", "the official program whose judge always fails"),
        Metric("question_type", "%", "multiple-choice or free-form questions"),
        Metric("answer_type", "%", "questions whose answer is a text, an integer, a float, a list"),
        *(Metric(group, "%", f"questions of one {group}") for group in GROUPS),
        Metric("skills", "%", "questions that need a skill; one may need several"),
    ),
    splits={"testmini": Split(1000)},
    protocol=(
        "MathVista testmini, the published query as the prompt, greedy; the answer extracted by "
        "rules, else by a judge with the official few-shot prompt (without a judge: the text as it "
        "is), then the official comparison; mean over questions; 95 % interval: cluster bootstrap "
        "over images"
    ),
    source=SOURCE,
    max_new_tokens=512,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    judge="optional",
)
