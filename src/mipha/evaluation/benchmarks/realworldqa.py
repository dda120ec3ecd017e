"""RealWorldQA: 765 questions about photographs, many from vehicles. There are two protocols.

xAI published the data and no scorer. The file that is given decides, and a note names it:

    RealWorldQA.tsv    VLMEvalKit's: every question has options, and the answer is read by its rules
    test .parquet      xAI's: options and instruction stand inside the question, some questions want
                       a word or a number; read by lmms-eval's rules since April 2026

Numbers of the two do not compare: Qwen2.5-VL-3B has 65.4 by the first and 60.0 by the second.

Source: open-compass/VLMEvalKit e8e78f05 `vlmeval/dataset/image_mcq.py`,
    `vlmeval/utils/matching_util.py`; EvolvingLMMs-Lab/lmms-eval 75571cfe `tasks/realworldqa`,
    `tasks/_task_utils/mcq_extract.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.benchmarks.mmbench import PANDAS_NO_VALUE
from mipha.evaluation.files import (
    AGAIN,
    OfficialRecord,
    QuestionId,
    TableImages,
    find_shards,
    read_parquet,
    read_record,
    read_rows,
)
from mipha.evaluation.multiple_choice import (
    LETTER,
    LETTERS,
    is_chinese,
    read_option,
    read_ranked_letter,
)

TSV = "RealWorldQA.tsv"
PARQUET = ("data/test-*.parquet", "test-*.parquet", "test.parquet")
SOURCE = (
    f"get {TSV} of VLMEvalKit, or the test .parquet files of "
    "huggingface.co/datasets/xai-org/RealworldQA for lmms-eval's protocol"
)

_DIRECTLY = "\nAnswer the question directly."
_CHINESE = {LETTER: "\n请直接回答选项字母。", _DIRECTLY: "\n请直接回答问题。"}
_OPTIONS = "ABCD"
"""Letters of the options in xAI's questions."""


class _TableRow(OfficialRecord):
    index: QuestionId
    question: str
    answer: str = Field(min_length=1)


class _Row(OfficialRecord):
    question: str
    answer: str = Field(min_length=1)


def read(root: Path, split: str) -> list[Question]:
    """Return every question in the order of the file.

    Args:
        root: Folder with the .tsv file or with .parquet files, or one file; the .tsv comes first.
        split: `test`.

    Returns:
        Questions whose facts are `protocol` (`VLMEvalKit` or `lmms-eval`), `answer`, `choices`
        (letter to text, of the .tsv file; None of the .parquet file) and `image` (hash of the
        image, or the id where there is none).
    """
    return _read_questions(root, with_images=True)


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions; the images need not be there."""
    return _read_questions(path, with_images=False)


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge whether the letter is the right one, or the text the right word."""
    parsed: dict[str, str | None] = {}
    right = {}
    contributions = []
    for question in questions:
        facts, text = question.facts, predictions[question.id]
        answer = facts["answer"].strip().lower()
        if facts["choices"] is not None:
            kind, parsed[question.id] = "", read_option(text, facts["choices"])
            is_right = bool(facts["choices"]) and parsed[question.id] == facts["answer"]
        elif answer.upper() in tuple(_OPTIONS):
            kind, parsed[question.id] = "multiple_choice", read_ranked_letter(text, _OPTIONS)
            is_right = parsed[question.id] == answer.upper()
        else:
            kind, is_right = "open", text.lower().strip().rstrip(".") == answer

        right[question.id] = float(is_right)
        names = ("accuracy", kind) if kind else ("accuracy",)
        contributions.append((facts["image"], dict.fromkeys(names, right[question.id])))
    protocols = {
        "VLMEvalKit": "VLMEvalKit's .tsv file and rules; not comparable with lmms-eval's numbers",
        "lmms-eval": "xAI's .parquet file and lmms-eval's rules; not comparable with VLMEvalKit's "
        "numbers, such as those of the OpenVLM leaderboard",
    }
    protocol = questions[0].facts["protocol"]
    return Judgement(
        per_question=right,
        contributions=contributions,
        parsed=parsed,
        notes=(f"by {protocols[protocol]}",),
        rules=protocol,
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right: of all, and of either kind of question in xAI's file."""
    kinds = [name for name in ("multiple_choice", "open") if name in totals.names]
    return {name: 100 * totals.mean(name) for name in ("accuracy", *kinds)}


def _read_questions(root: Path, with_images: bool) -> list[Question]:
    path = root if root.suffix == ".tsv" else root / TSV
    if path.is_file():
        return _read_table(path, with_images)

    images = TableImages(with_images)
    questions: list[Question] = []
    for path in find_shards(root, (TSV, *PARQUET), SOURCE):
        for where, cells in read_parquet(path, ("question", "answer")):
            row = read_record(_Row, cells, where)
            question_id = str(len(questions))
            name, image = images.read(cells.get("image"), where, question_id)
            facts = {
                "protocol": "lmms-eval",
                "answer": row.answer,
                "choices": None,
                "image": name,
            }
            questions.append(Question(question_id, row.question.strip(), image, facts))
    return questions


def _read_table(path: Path, with_images: bool) -> list[Question]:
    images = TableImages(with_images)
    questions = []
    for where, cells in read_rows(path, ("question", "answer")):
        row = read_record(_TableRow, cells, where)
        choices = {
            letter: cells[letter]
            for letter in LETTERS
            if cells.get(letter, "") not in PANDAS_NO_VALUE
        }
        if choices and row.answer not in tuple(LETTERS):
            raise ValueError(
                f"{where}: answer {row.answer!r} should be the letter of an option: {AGAIN}"
            )

        name, image = images.read(cells.get("image"), where, row.index)
        facts = {
            "protocol": "VLMEvalKit",
            "answer": row.answer,
            "choices": choices,
            "image": name,
        }
        questions.append(Question(row.index, _make_prompt(row.question, choices), image, facts))
    return questions


def _make_prompt(question: str, choices: Mapping[str, str]) -> str:
    text = question + "".join(f"\n{letter}. {option}" for letter, option in choices.items())
    instruction = LETTER if choices else _DIRECTLY
    return text + (_CHINESE[instruction] if is_chinese(text) else instruction)


BENCHMARK = Benchmark(
    name="realworldqa",
    metrics=(
        Metric("accuracy", "%", "questions answered right"),
        Metric("multiple_choice", "%", "questions with options, of xAI's file"),
        Metric("open", "%", "questions that want a word or a number, of xAI's file"),
    ),
    splits={"test": Split(765)},
    protocol=(
        "RealWorldQA, of VLMEvalKit's file: question, lettered options, then `Answer with the "
        "option's letter from the given choices directly.`, option read by the rules of VLMEvalKit "
        "e8e78f05 without a judge; of xAI's file: the question as published, letter or word read "
        "by the rules of lmms-eval 75571cfe; greedy, unreadable is wrong; mean over questions; "
        "95 % interval: cluster bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    rules="VLMEvalKit",
    id_advice="RealWorldQA's ids are the index of the .tsv file, or the row of the .parquet file",
)
