"""Own test sets: their questions, and the metrics that they can be scored by.

data --load_test_set--> questions with right answers --a metric, given or derived--> Benchmark

    exact    the same text, apart from case, spaces, and marks around it
    choice   the letter of the right option, read as MMBench's scorer reads it
    number   a number that is off by 5 % at most
    vqa      agreement with several people, as the VQA scorer has it
    anls     how few letters are wrong, for text that was read from a document
    f1       words in common, for answers in sentences
    box      one box, near enough to the right one
    boxes    any number of boxes, matched to the right ones
    judge    a grade by a language model, with a rubric

Each question is scored from 0 to 1 against the nearest of its right answers, and the number is
their mean.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.data.datasets.grounding import NONE
from mipha.data.images import SUFFIXES, image_key
from mipha.data.region_text import DEFAULT, parse_regions
from mipha.data.regions import Numbers
from mipha.data.test_set import GoldQuestion, load_test_set
from mipha.evaluation import boxes
from mipha.evaluation.anls import anls
from mipha.evaluation.answers import agreement, m4c
from mipha.evaluation.benchmark import (
    Benchmark,
    Judge,
    Judgement,
    Metric,
    Plan,
    Question,
    Reply,
    Split,
    list_benchmarks,
)
from mipha.evaluation.judge import MOST_UNREAD_IN_A_ROW, explain_unread, strip_reasoning
from mipha.evaluation.multiple_choice import LETTERS, read_option
from mipha.evaluation.relaxed import is_relaxed_match, read_number
from mipha.lookup import did_you_mean
from mipha.recipe import DataRecipe

FEWEST_PEOPLE = 4
"""Answers that a question needs for VQA accuracy: with fewer, no answer could score 1."""

JUDGE, BOX, BOXES = "judge", "box", "boxes"
METRICS = {
    "exact": "questions whose answer is a right one, apart from case, spaces and marks around it",
    "choice": "questions answered by the letter or the words of the right option",
    "number": "questions answered by a number that is off by 5 % at most; other text must be equal",
    "vqa": "VQA accuracy: agreement with the people who answered, each left out in turn",
    "anls": "average normalised Levenshtein similarity; below 0.5 it is 0",
    "f1": "mean F1 of the words in common with the nearest right answer, as SQuAD has it",
    BOX: f"questions whose box has an IoU of {boxes.THRESHOLD} or more with the right one",
    BOXES: f"mean F1 of boxes that are matched one to one by an IoU of {boxes.THRESHOLD} or more",
    JUDGE: "mean grade by a judge, from 0 % to 100 %",
}
"""Metrics of own test sets, each with its meaning."""

_MOST_WORDS = 5
"""Words of a right answer up to which the whole of it is compared."""
_MOST_COUNT = 100
"""Whole numbers from 0 to this, without it, are taken for counts, which must be exact."""

_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s+(\S.*)$", re.MULTILINE)
_LETTER = re.compile(r"\(?([A-Z])(?:[.):]|$)", re.IGNORECASE)
_MARKS = string.whitespace + string.punctuation.replace("%", "").replace("$", "") + "“”‘’。！？"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SIGNS = str.maketrans({"−": "-", **dict.fromkeys("$€£¥")})
"""What stands for a hyphen in front of a number, and what does not count there."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?%?")

_ANY_SIZE = (1, 1)
"""Where nothing is to be found it matters only how many boxes were said."""

_TRIES = 3
_JUDGE_TOKENS = 1024
_SCALE = re.compile(r"scale:\s*(-?\d+(?:\.\d+)?)\s*(?:to|-|,)\s*(-?\d+(?:\.\d+)?)\s*\n", re.I)
_GRADE = re.compile(r"score\W{0,4}[:=：]\W{0,8}?(-?\d+(?:\.\d+)?)", re.I)
_WHOLE = re.compile(r"\W*?(-?\d+(?:\.\d+)?)(?:\W*|\s*(?:/|out of)\s*\d+(?:\.\d+)?\W*)", re.I)
_OUT_OF = re.compile(r"[\s*(]*(?:(%)|(?:/|out of)\s*(\d+(?:\.\d+)?))", re.I)
_MORE = re.compile(r",\d|[\s*]*[-–—]\s*\d|\s+(?:or|to)\s+\d", re.I)
"""What may follow a number: the highest grade, or digits that make it another one or a range."""


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked about an answer.

    Args:
        text: The question to the judge, in which {question}, {gold} and {answer} are replaced.
        low: Lowest grade.
        high: Highest grade.
    """

    text: str
    low: float = 0.0
    high: float = 1.0

    def prompt(self, question: Question, answer: str) -> str:
        """Return the question to the judge about one answer."""
        parts = {
            "question": question.text,
            "gold": " or ".join(question.facts["answers"]),
            "answer": answer,
        }
        # All at once: an answer may hold a word in braces itself.
        filled = re.sub(r"\{(question|gold|answer)\}", lambda found: parts[found[1]], self.text)
        return (
            f"{filled.rstrip()}\n\nEnd your reply with one line `Score: N`, where N is a number "
            f"from {self.low:g} to {self.high:g}."
        )

    def read(self, reply: Reply) -> float | None:
        """Return the grade of a reply as a number from 0 to 1; None where there is none."""
        text = strip_reasoning(reply)
        found = list(_GRADE.finditer(text))[-1:]
        if not found and (whole := _WHOLE.fullmatch(text)):
            found = [whole]
        # The last digits of a reply that was cut may be missing.
        rest = text[found[0].end(1) :] if found else ""
        if not found or (reply.is_cut and not rest.strip()):
            return None
        # A grade on another scale, such as 4/5 where 10 is the highest, is no grade on this one.
        if _MORE.match(rest):
            return None
        if out_of := _OUT_OF.match(rest):
            highest = 100.0 if out_of[1] else float(out_of[2])
            if highest != self.high:
                return None
        grade = (float(found[0][1]) - self.low) / (self.high - self.low)
        return grade if 0 <= grade <= 1 else None


def read_rubric(path: Path) -> Rubric:
    """Read a rubric: a text with {answer}, and {question} and {gold} if the judge shall see them.

    A first line such as `scale: 1 to 5` sets the grades, which are 0 to 1 without it.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The text has no {answer}, or the scale is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no rubric {path}: check the path")
    text = path.read_text(encoding="utf-8")
    low, high = 0.0, 1.0
    if found := _SCALE.match(text):
        low, high, text = float(found[1]), float(found[2]), text[found.end() :]
        if low >= high:
            raise ValueError(f"{path}: the scale goes from {low:g} to {high:g}: turn it round")
    if "{answer}" not in text:
        raise ValueError(
            f"{path} has no {{answer}}, so the judge would not see what it grades: "
            "write {question}, {gold} and {answer} where they belong"
        )
    return Rubric(text, low, high)


def plan_own_data(
    data: DataRecipe,
    metric: str | None = None,
    rubric: Path | None = None,
    max_new_tokens: int = 128,
    with_answers: bool = True,
    form: str = DEFAULT,
) -> Plan:
    """Return the questions of a test set, as those of a benchmark.

    Args:
        data: Place and format of the data, of any kind that training reads.
        metric: One of `METRICS`; None: derived from the right answers, and said in the notes.
        rubric: Text that a judge is asked with; for the metric `judge`.
        max_new_tokens: Longest answer, in tokens.
        with_answers: Whether every question must have a right answer.
        form: Form in which the model writes boxes, of `region_text.FORMS`.

    Raises:
        FileNotFoundError: There are no such data, no such rubric, or an image is missing.
        ValueError: The data are malformed, an answer is missing, or the metric does not fit.
    """
    if metric is not None and metric not in METRICS:
        raise ValueError(f"no metric {metric!r}: {did_you_mean(metric, METRICS)}")
    if rubric is not None and metric is None:
        metric = JUDGE
    if (metric == JUDGE) != (rubric is not None):
        raise ValueError("--metric judge and --rubric FILE belong together: give both")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}: give 1 or more")
    criteria = read_rubric(rubric) if rubric else None

    # Read the questions, and choose the metric by their right answers.
    found = load_test_set(data)
    needs_gold = with_answers and (criteria is None or "{gold}" in criteria.text)
    if needs_gold and (lacking := [one for one in found.questions if not one.answers]):
        unread = [note for note in found.notes if "nothing reads" in note]
        raise ValueError(
            f"{len(lacking):,} of {len(found.questions):,} questions have no right answer, such as "
            f"{lacking[0].where}{''.join(f' ({note})' for note in unread)}: add them, or let "
            "`mipha predict` answer without a score"
        )
    questions = [_as_question(one, form) for one in found.questions]
    notes = [*found.notes, *filter(None, [found.about_ids])]
    if metric is not None:
        _check_fit(metric, found.questions, questions)
    elif with_answers:
        metric, reason = _derive(found.questions, questions)
        notes.append(f"scored by {metric}, because {reason}; --metric chooses another")

    name = _name_of(data)
    benchmark = replace(
        own_benchmark(metric or "exact", name, tuple(notes), criteria, form),
        splits={data.split: Split(len(questions))},
        max_new_tokens=max_new_tokens,
        read=lambda root, split: questions,
        read_labels=lambda path: questions,
        id_advice=found.about_ids,
    )
    return Plan(benchmark, data.split, questions, tuple(notes))


def plan_images(folder: Path, question: str, max_new_tokens: int = 128) -> Plan:
    """Return one question about every image in a folder and below, in the order of their paths.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
    """
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not images:
        raise FileNotFoundError(f"{folder} holds no image file: give a folder with images")
    asked = [
        Question(path.relative_to(folder).as_posix(), question, path, {"answers": ()})
        for path in images
    ]
    benchmark = replace(
        own_benchmark("exact", folder.resolve().name),
        splits={"train": Split(len(asked))},
        max_new_tokens=max_new_tokens,
    )
    return Plan(benchmark, "train", asked)


def own_benchmark(
    metric: str,
    name: str = "",
    notes: tuple[str, ...] = (),
    rubric: Rubric | None = None,
    form: str = DEFAULT,
) -> Benchmark:
    """Return what scores a test set by a metric; the questions are not part of it.

    Args:
        metric: One of `METRICS`.
        name: Name of the test set.
        notes: Sentences for readers of the score.
        rubric: Text that a judge is asked with.
        form: Form in which the model writes boxes.
    """
    protocol = f"own test set, the question as the whole prompt, greedy; {METRICS[metric]}"
    if rubric is not None:
        protocol += f" (scale {rubric.low:g} to {rubric.high:g}), asked with: {rubric.text}"
    if metric in (BOX, BOXES):
        protocol += f", boxes as {form}"
    own = Metric(metric, "%", METRICS[metric])
    return Benchmark(
        name=name,
        metrics=boxes.METRICS if metric == BOX else (own,),
        splits={},
        protocol=f"{protocol}; mean over questions; 95 % interval: cluster bootstrap over images",
        source="get the data again",
        max_new_tokens=0,
        read=lambda root, split: [],
        read_labels=lambda path: [],
        score=partial(_score, metric, rubric, notes, form),
        measure=boxes.measure_boxes if metric == BOX else partial(_measure, metric),
        judge="required" if metric == JUDGE else None,
        own_metric=metric,
    )


def normalise(text: str) -> str:
    """Return a text as `exact` compares it: case, spaces and the marks around it are gone.

    A letter is the same with its accent as a character of its own (Unicode's NFD) and as one (NFC).
    """
    text = unicodedata.normalize("NFC", text.casefold())
    return " ".join(_THOUSANDS.sub("", text).split()).strip(_MARKS)


def word_f1(prediction: str, answer: str) -> float:
    """Return the F1 of the words that two texts have in common.

    Source: SQuAD 1.1 `evaluate-v1.1.py`: `normalize_answer` and `f1_score`.
    """
    said, right = _words(prediction), _words(answer)
    num_same = sum((Counter(said) & Counter(right)).values())
    if not said or not right:
        return float(said == right)
    return 2 * num_same / (len(said) + len(right))


def is_near(prediction: str, answer: str) -> bool:
    """Return whether a text names a number near the right one, by the rule of relaxed accuracy.

    Thousands separators and currency signs do not count, and words may stand around the number.
    """
    return is_relaxed_match(_as_number(prediction), _as_number(answer))


def options_of(text: str) -> dict[str, str]:
    """Return letter to words of the options that a question lists, one a line from A."""
    options: dict[str, str] = {}
    for letter, words in _OPTION.findall(text):
        if letter == LETTERS[len(options)]:
            options[letter] = words.strip()
    return options if len(options) > 1 else {}


def _as_question(gold: GoldQuestion, form: str) -> Question:
    one = gold.written(form)
    # A place in a larger file is a tuple itself, so it stands in one.
    alone = len(one.images) == 1 and isinstance(one.images[0], Path | bytes)
    image = one.images[0] if alone else (one.images or None)
    options = options_of(one.text)
    key = hashlib.sha256(b"".join(map(image_key, one.images))).hexdigest()
    facts = {
        "answers": one.answers,
        "image": key if one.images else one.id,
        "options": options,
        "letter": _gold_letter(one.answers, options),
        "where": one.where,
    }
    if gold.regions:
        # Models that write boxes in another form are asked the same.
        facts["boxes"] = tuple(r for r in gold.right_regions if len(r.numbers) == 4)
        facts["same_as"] = f"{gold.text}\t{[region.numbers for region in gold.regions]}"
    return Question(one.id, one.text, image, facts, one.before)


def _gold_letter(answers: tuple[str, ...], options: Mapping[str, str]) -> str | None:
    """Return the letter of the right option; None where the answer is none of the options."""
    if len(answers) != 1 or not options:
        return None
    found = _LETTER.match(answers[0].strip())
    if found and found[1] in options and len(answers[0].strip()) <= 4:
        return found[1]
    same = [
        letter for letter, words in options.items() if normalise(words) == normalise(answers[0])
    ]
    if len(same) == 1:
        return same[0]
    return found[1].upper() if found and found[1].upper() in options else None


def _read_choice(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of an answer, where MMBench's scorer cannot tell by the rule for gold ones.

    So `12` is an option beside `1`, of which that scorer finds both in it, and `b` is option B.
    """
    return read_option(text, options) or _gold_letter((text,), options)


def _derive(rows: Sequence[GoldQuestion], questions: Sequence[Question]) -> tuple[str, str]:
    """Return the metric that fits the right answers, and the reason.

    Raises:
        ValueError: Some of the answers are boxes or points, and no metric fits all.
    """
    if any(row.right_regions for row in rows):
        return _derive_by_regions(rows)
    answers = [text for question in questions for text in question.facts["answers"]]
    if all(question.facts["letter"] for question in questions):
        return "choice", "every question lists its options"
    if all(len(question.facts["answers"]) >= FEWEST_PEOPLE for question in questions):
        return "vqa", f"every question has {FEWEST_PEOPLE} answers or more"
    numbers = [read_number(_as_number(text)) for text in answers]
    if all(number is not None for number in numbers):
        if all(number in range(_MOST_COUNT) for number in numbers):
            return "exact", "the answers are counts"
        return "number", "the answers are numbers"
    if all(len(text.split()) <= _MOST_WORDS for text in answers):
        return "exact", f"no answer has more than {_MOST_WORDS} words"
    return "f1", f"some answers have more than {_MOST_WORDS} words"


def _derive_by_regions(rows: Sequence[GoldQuestion]) -> tuple[str, str]:
    """Return the metric of right answers that are boxes; as `_derive`."""
    numbers = [len(row.right_regions) for row in rows]
    if points := [row for row in rows if _has_point(row)]:
        raise ValueError(
            f"{len(points):,} of {len(rows):,} right answers are points, such as "
            f"{points[0].where}, which no metric of own test sets scores: answer them with "
            "`mipha predict`, and score with mipha.evaluation.boxes.score_points"
        )
    if all(number == 1 for number in numbers):
        return BOX, "every right answer is one box"
    if texts := [row for row in rows if not row.right_regions and NONE not in row.answers]:
        raise ValueError(
            f"{len(texts):,} of {len(rows):,} right answers are texts, such as {texts[0].where}, "
            "and the others boxes: give two test sets, or choose a --metric"
        )
    return BOXES, "right answers are several boxes, or none"


def _has_point(row: GoldQuestion) -> bool:
    return any(len(region.numbers) == 2 for region in row.right_regions)


def _check_fit(metric: str, rows: Sequence[GoldQuestion], questions: Sequence[Question]) -> None:
    """Refuse a metric that could not tell right from wrong."""
    if metric == "choice":
        unfit = [row for row, one in zip(rows, questions, strict=True) if not one.facts["letter"]]
        wanted = "options, a line each from `A. `, of which its answer is one"
    elif metric == "vqa":
        unfit = [row for row in rows if len(row.answers) < FEWEST_PEOPLE]
        wanted = f"{FEWEST_PEOPLE} answers or more"
    elif metric == BOX:
        unfit = [row for row in rows if len(row.right_regions) != 1 or _has_point(row)]
        wanted = "a right answer with one box"
    elif metric == BOXES:
        unfit = [row for row in rows if not row.answers or _has_point(row)]
        wanted = "a right answer with boxes, or with none"
    else:
        return
    if unfit:
        raise ValueError(
            f"--metric {metric} needs {wanted}, which {len(unfit):,} of {len(rows):,} questions "
            f"lack, such as {unfit[0].where}: choose another metric"
        )


def _score(
    metric: str,
    rubric: Rubric | None,
    notes: tuple[str, ...],
    form: str,
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    judge: Judge | None = None,
) -> Judgement:
    """Judge every answer from 0 to 1."""
    if metric == BOX:
        judgement = boxes.judge_boxes(questions, predictions, form)
        return replace(judgement, notes=(*notes, *judgement.notes))
    parsed: dict[str, str | None] | None = None
    failed: dict[str, str] = {}
    said: dict[str, tuple[Numbers, ...]] = {}
    if rubric is not None:
        if judge is None:
            raise ValueError(
                "--metric judge is graded by a judge: give one with --judge URL --judge-model "
                "NAME, or --judge-replies FILE"
            )
        scores, failed = _grade(rubric, questions, predictions, judge)
    elif metric == "choice":
        parsed = {
            one.id: _read_choice(predictions[one.id], one.facts["options"]) for one in questions
        }
        scores = {one.id: float(parsed[one.id] == one.facts["letter"]) for one in questions}
        if num := sum(letter is None for letter in parsed.values()):
            notes = (*notes, f"{num:,} answers name none of their options, and count as wrong")
    elif metric == BOXES:
        said = {one.id: _boxes_in(predictions[one.id], one, form) for one in questions}
        scores = {
            one.id: boxes.detection_f1(
                said[one.id], [region.numbers for region in one.facts.get("boxes", ())]
            )
            for one in questions
        }
        silent = sum(bool(one.facts.get("boxes")) and not said[one.id] for one in questions)
        if silent:
            notes = (*notes, f"{silent:,} answers hold no box in the form {form}, where some are")
    else:
        rule = _RULES[metric]
        scores = {one.id: rule(predictions[one.id], one.facts["answers"]) for one in questions}
        wrong = [one for one in questions if metric == "exact" and not scores[one.id]]
        if num := sum(_is_said_in(predictions[one.id], one) for one in wrong):
            notes = (
                *notes,
                f"{num:,} answers say a right one among other words, and count as wrong: ask for "
                "the answer alone, or choose --metric f1",
            )
    return Judgement(
        per_question=scores,
        contributions=[
            (one.facts["image"], {metric: scores[one.id]}) for one in questions if one.id in scores
        ],
        parsed=parsed,
        boxes=said,
        failed=failed,
        notes=notes,
    )


def _is_said_in(text: str, question: Question) -> bool:
    """Return whether a right answer stands in a text, as whole words."""
    right = filter(None, map(normalise, question.facts["answers"]))
    return any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", normalise(text)) for one in right)


def _boxes_in(text: str, question: Question, form: str) -> tuple[Numbers, ...]:
    right = question.facts.get("boxes", ())
    size = right[0].size if right else _ANY_SIZE
    return tuple(one for one in parse_regions(text, form, size) if len(one) == 4)


def _grade(
    rubric: Rubric, questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the judge's grades, and the reasons where there is none."""
    grades: dict[str, float] = {}
    failed: dict[str, str] = {}
    num_in_a_row = 0
    for question in questions:
        prompt = rubric.prompt(question, predictions[question.id])
        replies = []
        for attempt in range(_TRIES):
            reply = judge.ask(question.id, prompt, attempt=attempt, max_tokens=_JUDGE_TOKENS)
            if (grade := rubric.read(reply)) is not None:
                grades[question.id], num_in_a_row = grade, 0
                break
            replies.append(reply)
        else:
            judge.forget(question.id)
            failed[question.id] = explain_unread("score", replies)
            num_in_a_row += 1
            if num_in_a_row == MOST_UNREAD_IN_A_ROW:
                raise ValueError(
                    f"{MOST_UNREAD_IN_A_ROW} answers in a row have no grade, the last "
                    f"({question.id}) because {failed[question.id]}"
                )
    if not grades:
        raise ValueError(f"no answer has a grade: {next(iter(failed.values()))}")
    return grades, failed


def _nearest(rule: Callable[[str, str], float | bool]) -> Callable[[str, Sequence[str]], float]:
    """Return the rule for several right answers, of which the nearest counts."""
    return lambda text, answers: max(float(rule(text, answer)) for answer in answers)


_RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": _nearest(lambda text, answer: normalise(text) == normalise(answer)),
    "number": _nearest(is_near),
    "vqa": lambda text, answers: agreement(m4c(text), [m4c(answer) for answer in answers]),
    "anls": anls,
    "f1": _nearest(word_f1),
}


def _measure(metric: str, totals: Totals) -> dict[str, np.ndarray]:
    return {metric: 100 * totals.mean(metric)}


def _words(text: str) -> list[str]:
    text = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return _ARTICLES.sub(" ", text).split()


def _as_number(text: str) -> str:
    """Return the one number of a text; the normalised text where there is none, or several."""
    found = _NUMBER.findall(text.translate(_SIGNS))
    return found[0].replace(",", "") if len(found) == 1 else normalise(text)


def _name_of(data: DataRecipe) -> str:
    """Return a name for results: that of the data, unless a benchmark has it."""
    root = Path(data.root_name) if isinstance(data.root, str) else data.root
    stem = (root.stem or root.resolve().name) if root else data.dataset
    is_file = bool(root and root.suffix) if isinstance(data.root, str) else root and root.is_file()
    if not is_file and data.split != "test":
        stem += f"-{data.split}"
    name = re.sub(r"[^\w.-]+", "-", stem)
    return f"own-{name}" if name in list_benchmarks() else name
