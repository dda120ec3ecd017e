"""MM-Vet: open questions that mix six capabilities, graded 0 to 1 by a judge.

The official program reads the number that a reply begins with, up to the first space, asks five
times for one, and counts 0 where none comes. Here a reply without a grade is a fault of the judge
and not of the answer: the question then fails and is in no score. And these are read too:

    1. A reply without the part in which the judge thinks (`<think> ... </think>`).
    2. A number at the start, after white space and marks such as `**`, with anything behind it that
       does not make it another number: "1.0\\n\\nBecause", "0.5/1", not "0,5", "5%" or "1/10".
    3. The number after a word such as "score" or "grade", if the reply names just one:
       "Score: 1.0", `{"score": 1.0}`, "\\boxed{1.0}".

Of a reply that the server cut at its limit, a number at the end is read by the official rule only.

Source: yuweihao/MM-Vet acde843e `mm-vet_evaluator.ipynb` (few-shot prompt, reading of a grade,
    tries, averages; the judge there is gpt-4-0613); haotian-liu/LLaVA c121f043
    `scripts/v1_5/eval/mmvet.sh` (the question alone as the prompt).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import field_validator

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Reply, Split
from mipha.evaluation.files import OfficialRecord, find, image_file, read_official, read_record
from mipha.evaluation.judge import MOST_UNREAD_IN_A_ROW, explain_unread, strip_reasoning

CAPABILITIES = {
    "rec": "recognition",
    "ocr": "text in the image",
    "know": "knowledge",
    "gen": "writing at length",
    "spat": "where things are",
    "math": "arithmetic",
}
SOURCE = "get mm-vet.zip from yuweihao/MM-Vet and unpack it: mm-vet.json, images/"

NUM_RUNS = 5
"""Times that a judge grades every question, as in the paper; recorded replies have their own."""
_TRIES = 5
_MAX_TOKENS = 3

# A number that is not part of another one or of a list: no percentage, no fraction but of 1, no
# range, no decimal comma.
_NUMBER = (
    r"(\d+(?:\.\d+)?|\.\d+)"
    r"(?![\w%)]|[.,]\d|\s*%|\s*/\s*(?!1(?:\.0*)?(?![\d.]))|\s*(?:-|–|to\b)\s*[\d.])"
)
_MARKS = " \n.*_`\"'"
_FIRST_NUMBER = re.compile(rf"[\s*_`#\"']*{_NUMBER}")
_NAMED_NUMBER = re.compile(
    r"(?:\b(?:score|grade|rating|correctness)\b(?:\s+of\s+the\s+\w+)?(?:\s*\(digit\))?[\s*_`\"']*"
    r"(?:is|of|would be|should be|[:=])?[\s*_`\"':=]*|\\boxed\{\s*)" + _NUMBER,
    re.IGNORECASE,
)

_MEME = (
    "This meme is poking fun at the fact that the names of the countries Iceland and Greenland "
    "are misleading. Despite its name, Iceland "
    "is known for its beautiful green landscapes, while Greenland is mostly covered in ice and "
    "snow. The meme is saying that the person "
    "has trust issues because the names of these countries do not accurately represent their "
    "landscapes."
)
_EXAMPLES = (
    ("Question", "Ground truth", "Prediction", "Correctness"),
    ("---", "---", "---", "---"),
    ("What is x in the equation?", "-1 <AND> -5", "x = 3", "0.0"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -1", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -5", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -5 or 5", "0.5"),
    ("What is x in the equation?", "-1 <AND> -5", "x = -1 or x = -5", "1.0"),
    (
        "Can you explain this meme?",
        _MEME,
        "The meme talks about Iceland and Greenland. It's pointing out that despite their names, "
        "Iceland is not very icy and Greenland "
        "isn't very green.",
        "0.4",
    ),
    (
        "Can you explain this meme?",
        _MEME,
        "The meme is using humor to point out the misleading nature of Iceland's and Greenland's "
        "names. Iceland, despite its name, has "
        "lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This "
        "is why I have trust issues' is a playful "
        "way to suggest that these contradictions can lead to distrust or confusion. The humor in "
        "this meme is derived from the unexpected "
        "contrast between the names of the countries and their actual physical characteristics.",
        "1.0",
    ),
)
_FEW_SHOT = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the "
    "prediction. <AND> in the ground truth "
    "means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally "
    "right when any one element in the ground truth is present in the prediction. The correctness "
    "score is 0.0 (totally wrong), 0.1, 0.2, "
    "0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the last space of "
    "the correctness score.\n\n"
) + "".join(" | ".join(row) + "\n" for row in _EXAMPLES)
_AGAIN = "\nPredict the correctness of the answer (digit): "


class _Record(OfficialRecord):
    imagename: str
    question: str
    answer: str
    capability: list[str]

    @field_validator("capability")
    @classmethod
    def _known(cls, capabilities: list[str]) -> list[str]:
        for name in capabilities:
            if name not in CAPABILITIES:
                raise ValueError(f"has {name!r}, but MM-Vet knows {', '.join(CAPABILITIES)}")
        return capabilities


def read(root: Path, split: str) -> list[Question]:
    """Return every question in the file's order.

    Args:
        root: Folder with mm-vet.json and images/, or mm-vet.json itself.
        split: `test`, the only one.
    """
    return _read_records(root, with_images=True)


def read_labels(path: Path) -> list[Question]:
    """Return the questions of mm-vet.json, or of a folder with it; the images need not be there."""
    return _read_records(path, with_images=False)


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Average the grades over the judge's runs.

    Args:
        questions: Questions with ground truth and capabilities.
        predictions: Question id to answer, verbatim.
        judge: The grader; it makes as many runs as it has recorded, else `NUM_RUNS`.

    Raises:
        ValueError: No judge, or it has no reply.
    """
    if judge is None:
        raise ValueError(
            "MM-Vet is graded by a judge: give one with --judge URL --judge-model NAME, "
            "or --judge-replies FILE"
        )

    # Grade every question in every run; one without a grade in a run has none at all.
    num_runs = judge.num_runs or NUM_RUNS
    grading = _Grading(judge, predictions)
    for run in range(num_runs):
        for question in questions:
            if question.id not in grading.failed:
                grading.grade(question, run)
    graded = [question for question in questions if question.id not in grading.failed]
    if not graded:
        raise ValueError(f"no answer has a grade: {next(iter(grading.failed.values()))}")

    # Average over the runs, and over the questions.
    ids = [question.id for question in graded]
    grades = np.array([grading.grades[question_id] for question_id in ids])  # (questions, runs)
    totals = 100 * grades.mean(axis=0)  # (runs,)
    means = dict(zip(ids, grades.mean(axis=1).tolist(), strict=True))
    return Judgement(
        per_question=means,
        contributions=[
            (question.facts["image"], dict.fromkeys(_groups(question), means[question.id]))
            for question in graded
        ],
        submission={question.id: predictions[question.id] for question in questions},
        extra={"std": float(totals.std())}
        | {f"runs.{run}": total for run, total in enumerate(totals.tolist())},
        failed=grading.failed,
        notes=tuple(grading.notes(num_runs)),
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return mean grade x 100 in all, by capability, and by set of capabilities."""
    sets = sorted(name for name in totals.names if name.startswith("capability_set."))
    return {
        name: 100 * totals.mean(name)
        for name in ("total", *CAPABILITIES, *sets)
        if name in totals.names
    }


def make_upload(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """Return the file of answers that the official evaluator and its web page grade."""
    answers = {question.id: predictions[question.id] for question in questions}
    return {"mmvet.json": (json.dumps(answers, indent=2) + "\n").encode()}


def find_doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Return a sentence if there are ids of another version."""
    strange = [question.id for question in questions if not question.id.startswith("v1_")]
    if not strange:
        return []
    return [
        f"{len(strange):,} ids, such as {strange[0]}, are not of MM-Vet version 1 (v1_0 to v1_217)"
    ]


def read_grade(reply: Reply) -> float | None:
    """Return the grade of a judge's reply; None where it has none between 0 and 1.

    The module says what counts. Where the official rule reads a grade, it is that one.
    """
    text = strip_reasoning(reply)
    official = _read_official_grade(text)
    if official is not None:
        return official

    first = _FIRST_NUMBER.match(text)
    found = [first] if first else list(_NAMED_NUMBER.finditer(text))
    # The last digits of a reply that was cut may be missing: "Score: 0" may stand for 0.5.
    if reply.is_cut and any(not text[number.end(1) :].strip(_MARKS) for number in found):
        return None
    grades = {float(number[1]) for number in found}
    return grades.pop() if len(grades) == 1 and max(grades) <= 1 else None


def _read_official_grade(reply: str) -> float | None:
    """Return the number up to the first space; a reply that begins with a space has none."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


def grading_prompt(question: str, truth: str, prediction: str) -> str:
    """Return the first prompt to the judge."""
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return _FEW_SHOT + "\n" + " | ".join((question, truth, prediction, ""))


class _Grading:
    """The grades of one score, question by question and run by run."""

    def __init__(self, judge: Judge, predictions: Mapping[str, str]) -> None:
        self.grades: dict[str, list[float]] = {}
        self.failed: dict[str, str] = {}
        self._judge, self._predictions = judge, predictions
        self._num_wider = 0  # grades that the official rule does not read
        self._num_unread_in_a_row = 0

    def grade(self, question: Question, run: int) -> None:
        """Ask for one grade, five times at most, and note it, or the reason that there is none.

        The official program then fetches a sixth reply, and does not read it.

        Raises:
            ValueError: The judge gives no grade to one answer after the other.
        """
        prompt = grading_prompt(
            question.text, question.facts["answer"], self._predictions[question.id]
        )
        replies = []
        for attempt in range(_TRIES):
            # The first repetition is at temperature 0 as well, only the prompt is longer.
            reply = self._judge.ask(
                question.id,
                prompt + (_AGAIN if attempt else ""),
                run=run,
                attempt=attempt,
                temperature=0.5 * max(0, attempt - 1),
                max_tokens=_MAX_TOKENS,
            )
            if (grade := read_grade(reply)) is not None:
                self.grades.setdefault(question.id, []).append(grade)
                self._num_wider += _read_official_grade(reply) != grade
                self._num_unread_in_a_row = 0
                return
            replies.append(reply)

        # Without a grade the question fails, and many of them in a row end the grading. The next
        # call asks again.
        self._judge.forget(question.id, run)
        self.failed[question.id] = explain_unread("grade", replies)
        self._num_unread_in_a_row += 1
        if self._num_unread_in_a_row == MOST_UNREAD_IN_A_ROW:
            raise ValueError(
                f"{MOST_UNREAD_IN_A_ROW} answers in a row have no grade, the last ({question.id}) "
                f"because {self.failed[question.id]}"
            )

    def notes(self, num_runs: int) -> Iterator[str]:
        """Yield what a reader of the score must know."""
        yield (
            f"graded by the judge in {num_runs} run{'s' if num_runs > 1 else ''}; "
            "the published numbers are grades of gpt-4-0613"
        )
        if self._num_wider:
            num_all = sum(map(len, self.grades.values()))
            yield (
                f"{self._num_wider:,} of {num_all:,} grades do not begin the judge's reply "
                "and were read all the same; the official program would have asked again"
            )


def _read_records(root: Path, with_images: bool) -> list[Question]:
    path = find(root, ("mm-vet.json", "mm-vet/mm-vet.json"), SOURCE)
    content = read_official(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{path} is not an object of questions by id: give the official mm-vet.json"
        )

    questions = []
    for question_id, row in content.items():
        record = read_record(_Record, row, f"{path}, question {question_id}")
        image = None
        if with_images:
            image = image_file(path.parent / "images" / record.imagename, SOURCE)
        facts: dict[str, Any] = {
            "answer": record.answer,
            "image": record.imagename,
            "capabilities": sorted(set(record.capability)),
        }
        questions.append(Question(question_id, record.question, image, facts))
    return questions


def _groups(question: Question) -> list[str]:
    """Return the metrics that the question counts for.

    A set is named in alphabetical order, where the official order is random.
    """
    capabilities = question.facts["capabilities"]
    return ["total", *capabilities, f"capability_set.{'_'.join(capabilities)}"]


BENCHMARK = Benchmark(
    name="mmvet",
    metrics=(
        Metric("total", "%", "mean grade of all questions"),
        *(
            Metric(name, "%", f"mean grade of the questions that need {words}")
            for name, words in CAPABILITIES.items()
        ),
        Metric(
            "capability_set",
            "%",
            "mean grade of the questions that need exactly these capabilities",
        ),
        Metric("std", "points", "standard deviation of the total over the judge's runs"),
        Metric("runs", "%", "total of each of the judge's runs, from 0"),
    ),
    splits={"test": Split(218)},
    protocol=(
        "MM-Vet, the question as the whole prompt, greedy; graded 0 to 1 by a judge with the "
        "official few-shot prompt at temperature 0; mean grade x 100 over questions and runs; "
        "95 % interval: cluster bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=1024,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    submission=make_upload,
    doubts=find_doubts,
    judge="required",
)
