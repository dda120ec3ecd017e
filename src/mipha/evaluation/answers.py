"""Short answers made comparable, exactly as three official programs do it, and the VQA accuracy that compares them.

    m4c            LLaVA's uploads, TextVQA
    vqa_official   the VQA scorer since 2021, for people and models alike
    vizwiz_api     the VizWiz API, for models only

The rules look like tidy English processing and are not; the quirks decide scores and are kept: a mark next to a space
anywhere is deleted everywhere, else it becomes a space; only the first 32 periods go; "none" is 0; "a" is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from sys import intern
from typing import Any

from mipha.catalog.contractions import CONTRACTIONS, CURLY_CONTRACTIONS
from mipha.evaluation.files import field

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"} | {
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = frozenset({"a", "an", "the"})

_PERIOD = re.compile(r"\.(?!\d)")
_NUM_PERIODS = 32
"""The scorers pass `re.UNICODE`, which is 32, where `re.sub` takes the number of replacements."""
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_ANSWER_IDS = [*range(1, 11)]
_CACHE = 1 << 16
"""Different answers remembered: people and models give few, again and again."""


@lru_cache(_CACHE)
def m4c(text: str) -> str:
    """What the m4c answer processor makes of a text: what LLaVA uploads, and both sides of TextVQA.

    Source: facebookresearch/mmf b0ffc7fb `EvalAIAnswerProcessor`; haotian-liu/LLaVA c121f043 `llava/eval/m4c_evaluator.py`.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(plain(text)), CONTRACTIONS)


@lru_cache(_CACHE)
def vqa_official(text: str) -> str:
    """What the VQA scorer makes of a text where it normalises at all.

    Source: GT-Vision-Lab/VQA a013f004 `vqaEval.py`: `processPunctuation`, `processDigitArticle`.
    """
    return _words(_punctuation(plain(text)), CONTRACTIONS)


@lru_cache(_CACHE)
def vizwiz_api(text: str) -> str:
    """What the VizWiz API makes of a prediction; human answers it takes as they are.

    Source: VizWiz API `vqaEval.py` (copy in ranishah0402/VizWiz-VQA-ds598 7f189ba4).
    """
    return _words(_punctuation(plain(text)), CURLY_CONTRACTIONS)


@lru_cache(_CACHE)
def plain(text: str) -> str:
    """Newlines and tabs to spaces, then none at the ends: where all three programs start."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def agreement(
    prediction: str, answers: Sequence[str], annotators: Sequence[int] | None = None
) -> float:
    """VQA accuracy: with each human answer left out in turn, a third for each equal one among the others, at most 1; the mean.

    With ten answers: 0.3 for one that is equal, 0.6 for two, 0.9 for three, 1 for four or more.

    Args:
        prediction: As it is compared.
        answers: Of the humans, as they are compared; at least one.
        annotators: `mixed_up_annotators`: who is left out together with whom if their answers are equal.

    Source: GT-Vision-Lab/VQA a013f004 `vqaEval.py`; https://visualqa.org/evaluation.html.
    """
    equal, num = answers.count(prediction), len(answers)
    if annotators is None:
        return (equal * min(1.0, (equal - 1) / 3) + (num - equal) * min(1.0, equal / 3)) / num
    records = list(zip(answers, annotators, strict=True))
    matches = [
        sum(other[0] == prediction and other != left_out for other in records)
        for left_out in records
    ]
    return sum(min(1.0, match / 3) for match in matches) / num


def mixed_up_annotators(answers: Sequence[Mapping[str, Any]]) -> tuple[int, ...] | None:
    """For each person's answer the number of the first that differs in nothing but the text; None where all differ.

    The VQA scorer finds "the others" as the records that are not equal to the one left out, so without `answer_id` people with the
    same answer leave one another out. Official files number the people, which makes them differ.

    Source: GT-Vision-Lab/VQA a013f004 `vqaEval.py`: `item != gtAnsDatum`.
    """
    if [answer.get("answer_id") for answer in answers] == _ANSWER_IDS[: len(answers)]:
        return None
    rests = [{key: value for key, value in answer.items() if key != "answer"} for answer in answers]
    first = tuple(rests.index(rest) for rest in rests)
    return None if len(set(first)) == len(first) else first


def human_answers(record: Any, where: str) -> tuple[str, ...]:
    """The texts of `"answers": [{"answer": text}, ...]`, in order, equal ones as one object.

    Raises:
        ValueError: There are none, or they have another form; names where.
    """
    answers = field(record, "answers", where)
    try:
        texts = tuple(intern(answer["answer"]) for answer in answers)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{where}: its answers are not a list of {{"answer": "..."}}: get the official file again'
        ) from error
    if not texts:
        raise ValueError(f"{where} has no human answer: get the official file again")
    return texts


def _punctuation(text: str) -> str:
    # Every decision is made on the text as it came in, so the order of the marks does not matter.
    if marks := [mark for mark in MARKS if mark in text]:
        delete_all = _DIGIT_COMMA_DIGIT.search(text) is not None
        text = text.translate(
            {
                ord(mark): "" if delete_all or f"{mark} " in text or f" {mark}" in text else " "
                for mark in marks
            }
        )
    return _PERIOD.sub("", text, count=_NUM_PERIODS)


def _words(text: str, contractions: Mapping[str, str]) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)
