"""Short answers: the prompt for one, and the comparison that the official VQA programs make.

    m4c            LLaVA's uploads, TextVQA
    vqa_official   the VQA scorer since 2021, for people and models alike
    vizwiz_api     the VizWiz API, for models only

The rules look like tidy English processing, but their quirks decide scores and are kept: a mark
next to a space anywhere is deleted everywhere, else it becomes a space; only the first 32 periods
go; "none" is 0; "a" is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from sys import intern
from typing import Any

from mipha.evaluation.files import AGAIN

SHORT = "\nAnswer the question using a single word or phrase."
"""End of a LLaVA-1.5 prompt that asks for a short answer.

Source: haotian-liu/LLaVA c121f043 `scripts/v1_5/eval`, `llava/eval/model_vqa*.py`.
"""

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
NUM_PERIODS = 32
"""The scorers pass `re.UNICODE`, which is 32, where `re.sub` takes the number of replacements."""
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_ANSWER_IDS = [*range(1, 11)]
_CACHE = 1 << 16
"""Different answers remembered: people and models give few, again and again."""

_PAIRS = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's
howd=how'd howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd
itd've=it'd've it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't
mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've
neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at
'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've she's=she's shouldve=should've
shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's
someoned=someone'd someoned've=someone'd've someone'dve=someone'd've someonell=someone'll
someones=someone's somethingd=something'd somethingd've=something'd've something'dve=something'd've
somethingll=something'll thats=that's thered=there'd thered've=there'd've there'dve=there'd've
therere=there're theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll
theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've
werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've whens=when's
whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've who'dve=who'd've
wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't
wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all
yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've
youd=you'd youd've=you'd've you'dve=you'd've youll=you'll youre=you're youve=you've
"""
CONTRACTIONS: dict[str, str] = dict(pair.split("=") for pair in _PAIRS.split())
"""A word without its apostrophe to the word with it, with every oddity of the official table.

Some oddities decide scores: keys with a capital (`Im`, `Ive`) never match, because words are
lower-cased first; `lets` is missing; `somebody'd` loses its apostrophe.

Source: GT-Vision-Lab/VQA a013f004 `PythonEvaluationTools/vqaEvaluation/vqaEval.py`; the same
    table in facebookresearch/mmf b0ffc7fb and in haotian-liu/LLaVA c121f043
    `llava/eval/m4c_evaluator.py`.
"""

_STRAIGHT_KEYS = {"couldn'tve", "hadn'tve"}
_STRAIGHT_VALUES = {
    *("ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"),
}


def _curl(text: str, straight: set[str]) -> str:
    return text if text in straight else text.replace("'", "’")


CURLY_CONTRACTIONS: dict[str, str] = {
    _curl(key, _STRAIGHT_KEYS): _curl(value, _STRAIGHT_VALUES)
    for key, value in CONTRACTIONS.items()
}
"""The same table with the smart quotes of an editor: all but two keys and eight values.

So `dont` becomes `don’t`, which no person typed, and never matches.

Source: VizWiz API `vqaEval.py` (copy in ranishah0402/VizWiz-VQA-ds598 7f189ba4), the VQA scorer's
    table of 2015.
"""


@lru_cache(_CACHE)
def m4c(text: str) -> str:
    """Normalise a text as the m4c answer processor does: LLaVA's uploads, both sides of TextVQA.

    Source: facebookresearch/mmf b0ffc7fb `EvalAIAnswerProcessor`; haotian-liu/LLaVA c121f043
        `llava/eval/m4c_evaluator.py`.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(plain(text)), CONTRACTIONS)


@lru_cache(_CACHE)
def vqa_official(text: str) -> str:
    """Normalise a text as the VQA scorer does, where it normalises at all.

    Source: GT-Vision-Lab/VQA a013f004 `vqaEval.py`: `processPunctuation`, `processDigitArticle`.
    """
    return _words(_punctuation(plain(text)), CONTRACTIONS)


@lru_cache(_CACHE)
def vizwiz_api(text: str) -> str:
    """Normalise a prediction as the VizWiz API does; it takes human answers as they are.

    Source: VizWiz API `vqaEval.py` (copy in ranishah0402/VizWiz-VQA-ds598 7f189ba4).
    """
    return _words(_punctuation(plain(text)), CURLY_CONTRACTIONS)


@lru_cache(_CACHE)
def plain(text: str) -> str:
    """Replace newlines and tabs by spaces and strip the ends: all three programs start so."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def replace_marks(text: str) -> str:
    """Delete each of `MARKS` that stands next to a space anywhere; else it becomes a space.

    Every mark is deleted where the text has a digit, a comma and a digit in a row.
    """
    marks = [mark for mark in MARKS if mark in text]
    if not marks:
        return text

    # Every decision rests on the text as it came in, so the order of the marks is irrelevant.
    delete_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    deleted = {mark for mark in marks if delete_all or f"{mark} " in text or f" {mark}" in text}
    return text.translate({ord(mark): "" if mark in deleted else " " for mark in marks})


def agreement(
    prediction: str, answers: Sequence[str], annotators: Sequence[int] | None = None
) -> float:
    """Return the VQA accuracy of a prediction.

    Each human answer is left out in turn. The rest give a third for each equal answer, at most 1,
    and the result is the mean. With ten answers it is 0.3 for one that is equal, 0.6 for two, 0.9
    for three, 1 for four or more.

    Args:
        prediction: The text as it is compared.
        answers: Human answers as they are compared; at least one.
        annotators: People who are left out together if their answers are equal, from
            `mixed_up_annotators`.

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
    """Return for each answer the number of the first that differs in nothing but the text.

    The VQA scorer takes as "the others" all records that are not equal to the one left out. So
    without `answer_id`, people with the same answer are left out together. Official files number
    the people, which makes them differ.

    Returns:
        A number per answer; None where all answers differ in more than the text.

    Source: GT-Vision-Lab/VQA a013f004 `vqaEval.py`: `item != gtAnsDatum`.
    """
    if [answer.get("answer_id") for answer in answers] == _ANSWER_IDS[: len(answers)]:
        return None
    rests = [{key: value for key, value in answer.items() if key != "answer"} for answer in answers]
    first = tuple(rests.index(rest) for rest in rests)
    return None if len(set(first)) == len(first) else first


def human_answers(answers: Sequence[Any], where: str) -> tuple[str, ...]:
    """Return the texts of `[{"answer": text}, ...]`, in order, equal ones as one object.

    Raises:
        ValueError: There are none, or they have another form; names the place.
    """
    try:
        texts = tuple(intern(answer["answer"]) for answer in answers)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{where}: its answers are not a list of {{"answer": "..."}}: {AGAIN}'
        ) from error
    if not texts:
        raise ValueError(f"{where} has no human answer: {AGAIN}")
    return texts


def _punctuation(text: str) -> str:
    return _PERIOD.sub("", replace_marks(text), count=NUM_PERIODS)


def _words(text: str, contractions: Mapping[str, str]) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)
