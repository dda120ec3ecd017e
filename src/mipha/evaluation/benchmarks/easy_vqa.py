"""easy-VQA: which shape, which colour; 13 possible answers, official splits.

One shape of one colour on a 64 x 64 image, about ten questions each.

A total hides the failure that matters here: a model that has learned only the usual answer to each
question string gets two thirds right without looking. So yes/no, shape and colour are reported
apart, and the yes/no questions once more by whether the gold answer is the rarer one of its
question string.

Source: PyPI `easy-vqa` 1.0 (MIT), github.com/vzhou842/easy-VQA.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.data.datasets.easy_vqa import COLOURS, SHAPES, image_path, questions_of
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import image_file

ANSWERS = ("yes", "no", *SHAPES, *COLOURS)

SOURCE = (
    'get it with pip install "mipha-vlm[quickstart]", or give a folder with train/ and test/, '
    "each with questions.json and images/"
)
METRICS = (
    Metric("accuracy", "%", "all questions"),
    Metric("yes_no", "%", "questions whose gold answer is yes or no"),
    Metric("shape", "%", "questions for the shape"),
    Metric("colour", "%", "questions for the colour"),
    Metric("open", "%", "questions for the shape or the colour: no text gives their answer away"),
    Metric(
        "yes_no_usual",
        "%",
        "yes/no questions whose gold answer is the usual one of this question string in the "
        "training split",
    ),
    Metric(
        "yes_no_minority",
        "%",
        "yes/no questions whose gold answer is the rarer one of this question string in the "
        "training split",
    ),
    *(
        Metric(f"answer_{answer}", "%", f"questions whose gold answer is {answer}")
        for answer in ANSWERS
    ),
    Metric("unreadable", "questions", "the last word is none of the 13 answers; counts as wrong"),
)


def read(root: Path | None, split: str) -> list[Question]:
    """Return every question of a split, image by image in the official order.

    Args:
        root: Folder with `train` and `test`, each holding `questions.json` and `images`; None: the
            installed package's.
        split: `test` (official) or `validation` (400 official training images that our training
            leaves out).

    Returns:
        Questions whose facts are `answer` (gold), `kind` (yes_no, shape, colour), `image` (id),
        and from the whole official training split `usual` (most frequent answer to this question
        string, None for a string it lacks) and `most_frequent` (most frequent answer to anything).
    """
    asked = _read(root, split)
    for image in dict.fromkeys(question.image for question in asked):
        image_file(image, SOURCE)
    return asked


def read_answer(text: str) -> str | None:
    """Return the answer that a text ends with; None if its last word is none of the 13."""
    words = re.findall(r"\w+", text.lower())
    return words[-1] if words and words[-1] in ANSWERS else None


def read_labels(path: Path | None) -> list[Question]:
    """Return the labelled test questions of a folder, or of the package; images are not needed."""
    return _read(path, "test")


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge whether each answer is the published one; a group without questions is left out.

    Raises:
        KeyError: A question has no prediction.
    """
    parsed = {question.id: read_answer(predictions[question.id]) for question in questions}
    right = {
        question.id: float(parsed[question.id] == question.facts["answer"])
        for question in questions
    }
    contributions = [
        (
            question.facts["image"],
            dict.fromkeys(_groups(question), right[question.id])
            | {"unreadable": float(parsed[question.id] is None)},
        )
        for question in questions
    ]
    return Judgement(per_question=right, contributions=contributions, parsed=parsed)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return percent right of each group, and the number of unreadable answers."""
    names = [metric.name for metric in METRICS[:-1] if metric.name in totals.names]
    return {name: 100 * totals.mean(name) for name in names} | {
        "unreadable": totals.sum("unreadable")
    }


def majority_baseline(questions: Iterable[Question]) -> dict[str, str]:
    """Give one answer to everything: the most frequent of the training split. 37.3 % on test."""
    return {question.id: question.facts["most_frequent"] for question in questions}


def question_only_baseline(questions: Iterable[Question]) -> dict[str, str]:
    """Give the most frequent training answer to each question string, without looking.

    67.0 % on the test split.
    """
    return {
        question.id: question.facts["usual"] or question.facts["most_frequent"]
        for question in questions
    }


def _read(root: Path | None, split: str) -> list[Question]:
    """Return the questions, without a look at their images."""
    # Answers to each question string in the whole official training split.
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for part in ("train", "validation"):
        for text, answer in (
            pair for pairs in questions_of(root, part)[1].values() for pair in pairs
        ):
            by_text[text][answer] += 1
    usual = {text: _most_frequent(counts) for text, counts in by_text.items()}
    most_frequent = _most_frequent(sum(by_text.values(), Counter()))

    folder, by_image = questions_of(root, split)
    return [
        Question(
            id=f"{folder}/{image}/{number}",
            text=text,
            image=image_path(root, folder, image),
            facts={
                "answer": answer,
                "kind": _kind(answer),
                "image": image,
                "usual": usual.get(text),
                "most_frequent": most_frequent,
            },
        )
        for image, pairs in by_image.items()
        for number, (text, answer) in enumerate(pairs)
    ]


def _groups(question: Question) -> list[str]:
    """Return the metrics that the question counts for, always in the same order."""
    answer, kind, usual = (question.facts[key] for key in ("answer", "kind", "usual"))
    groups = ["accuracy", kind, f"answer_{answer}"]
    if kind != "yes_no":
        groups.append("open")
    elif usual is not None:
        groups.append("yes_no_usual" if answer == usual else "yes_no_minority")
    return groups


def _kind(answer: str) -> str:
    if answer in SHAPES:
        return "shape"
    return "colour" if answer in COLOURS else "yes_no"


def _most_frequent(counts: Mapping[str, int]) -> str:
    """Return the most frequent answer; of equals the last in the alphabet, whatever the order."""
    return max(counts, key=lambda answer: (counts[answer], answer))


BENCHMARK = Benchmark(
    name="easy_vqa",
    metrics=METRICS,
    splits={"test": Split(9673), "validation": Split(3848)},
    protocol=(
        "easy-VQA 1.0, official split, the question as the whole prompt, greedy; the last word of "
        "the text, lower case without punctuation, must equal the published answer; 95 % interval: "
        "cluster bootstrap over images, 2000 resamples"
    ),
    source=SOURCE,
    max_new_tokens=32,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    baselines={"majority": majority_baseline, "question_only": question_only_baseline},
    packaged=True,
)
