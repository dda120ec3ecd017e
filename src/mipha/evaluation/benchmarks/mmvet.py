"""MM-Vet: open questions that mix six capabilities, graded 0 to 1 by a judge.

Source: yuweihao/MM-Vet acde843e `mm-vet_evaluator.ipynb` (few-shot prompt, reading of a grade,
    tries, averages; the judge there is gpt-4-0613); haotian-liu/LLaVA c121f043
    `scripts/v1_5/eval/mmvet.sh` (the question alone as the prompt).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import field_validator

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import OfficialRecord, find, image_file, read_official, read_record

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

    # One grade per run and question.  (runs, questions)
    num_runs = judge.num_runs or NUM_RUNS
    read = [
        [_grade(question, predictions[question.id], judge, run) for question in questions]
        for run in range(num_runs)
    ]
    grades = np.array([[0.0 if grade is None else grade for grade in run] for run in read])
    totals = 100 * grades.mean(axis=1)  # (runs,)
    ids = [question.id for question in questions]
    means = dict(zip(ids, grades.mean(axis=0).tolist(), strict=True))

    notes = [
        f"graded by the judge in {num_runs} run{'s' if num_runs > 1 else ''}; "
        "the published numbers are grades of gpt-4-0613"
    ]
    if num_unread := sum(grade is None for run in read for grade in run):
        notes.append(
            f"{num_unread:,} of {grades.size:,} gradings had no readable grade in {_TRIES} tries "
            "and count as 0, as officially"
        )

    return Judgement(
        per_question=means,
        contributions=[
            (question.facts["image"], dict.fromkeys(_groups(question), means[question.id]))
            for question in questions
        ],
        submission={question.id: predictions[question.id] for question in questions},
        extra={"std": float(totals.std())}
        | {f"runs.{run}": total for run, total in enumerate(totals.tolist())},
        notes=tuple(notes),
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


def read_grade(reply: str) -> float | None:
    """Return the grade that a judge's reply begins with; None if none is between 0 and 1.

    Whatever Python reads as a number counts, NaN too; a reply that begins with a space does not.
    """
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return None if grade > 1.0 or grade < 0.0 else grade


def grading_prompt(question: str, truth: str, prediction: str) -> str:
    """Return the first prompt to the judge."""
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return _FEW_SHOT + "\n" + " | ".join((question, truth, prediction, ""))


def _grade(question: Question, prediction: str, judge: Judge, run: int) -> float | None:
    """Return one run's grade of one answer; None after five replies without one.

    The official program then fetches a sixth reply, and does not read it.
    """
    prompt = grading_prompt(question.text, question.facts["answer"], prediction)

    for attempt in range(_TRIES):
        # The first repetition is at temperature 0 as well, only the prompt is longer.
        temperature = 0.5 * max(0, attempt - 1)
        words = prompt + (_AGAIN if attempt else "")
        reply = judge.ask(
            question.id,
            words,
            run=run,
            attempt=attempt,
            temperature=temperature,
            max_tokens=_MAX_TOKENS,
        )
        if (grade := read_grade(reply)) is not None:
            return grade
    return None


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
