"""HallusionBench as its repository scores it: a judge compares every answer with a reference.

All 1,129 questions count, those without an image too. The numbers of 2023 are of this kind (GPT-4V
65.28 aAcc); they do not compare with those of `hallusionbench`, which reads the same file.

A reply that contains "incorrect" is wrong, else one with "correct" right ("not correct" too), any
other unclear. Unclear is right where the chart or the map was left out on purpose.

Source: tianyi-lab/HallusionBench 744007c2 `evaluation.py`, `utils.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals, ratio
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.benchmarks.hallusionbench import SOURCE, read_records
from mipha.evaluation.judge import UnreadError, ask_each, explain_unread, strip_reasoning

RIGHT, WRONG, UNCLEAR = "1", "0", "2"
"""Verdicts, as the official files write them."""

_TRIES = 5
_MAX_TOKENS = 1024
_PROMPT = (
    "Imagine you are an intelligent teacher. Thoroughly read the question, reference answer and "
    "the prediction answer to ensure a clear understanding of the information provided. Assess "
    "the correctness of the predictions. If the prediction answer does not conflict with the "
    "reference answer, please generate “correct”. If the prediction answer conflict with the "
    "reference answer, please generate “incorrect”. If the prediction answer is unclear about the "
    'answer, please generate "unclear". \n\n Question:{question}\nReference answer: {reference}\n'
    "Prediction answer:{answer}\nOutput:"
)


def read(root: Path, split: str) -> list[Question]:
    """Return every question, with and without an image, in the order of the file.

    Args:
        root: See `hallusionbench.read`.
        split: `all`.
    """
    return read_records(root, with_images=True)


def read_labels(path: Path) -> list[Question]:
    """Return every labelled question; the images need not be there."""
    return [
        Question(question.id, question.text, None, {**question.facts, "optional": False})
        for question in read_records(path, with_images=False)
    ]


def grading_prompt(question: str, reference: str, answer: str) -> str:
    """Return the question to the judge."""
    return _PROMPT.format(question=question, reference=reference, answer=answer)


def read_verdict(reply: str) -> str:
    """Return what a judge's reply says."""
    reply = reply.lower()
    if "incorrect" in reply:
        return WRONG
    return RIGHT if "correct" in reply else UNCLEAR


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge every answer by a comparison with its reference.

    Raises:
        ValueError: No judge, or it has no reply.
    """
    if judge is None:
        raise ValueError(
            "hallusionbench_gpt is graded by a judge: give one with --judge URL --judge-model "
            "NAME, or --judge-replies FILE; hallusionbench needs none"
        )

    def ask(question: Question) -> str:
        return _ask_for_verdict(question, predictions[question.id], judge)

    verdicts, failed = ask_each(questions, ask, judge)
    graded = [question for question in questions if question.id in verdicts]
    if not graded:
        raise ValueError(f"no answer has a verdict: {next(iter(failed.values()))}")
    right = {
        question.id: float(
            verdicts[question.id] == RIGHT
            or (verdicts[question.id] == UNCLEAR and _is_left_out(question))
        )
        for question in graded
    }
    return Judgement(
        per_question=right,
        contributions=list(_contribute(graded, right)),
        parsed=verdicts,
        failed=failed,
        notes=("every answer is graded by the judge; the published numbers are grades of GPT-4",),
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return accuracies in percent, and how often the model says yes wrongly."""
    splits = sorted(name for name in totals.names if name.startswith("aAcc_split."))
    percent = {
        name: 100 * totals.mean(name)
        for name in ("qAcc", "aAcc", "fAcc", "easy_aAcc", "hard_aAcc", *splits)
        if name in totals.names
    }
    return percent | {
        "yes_bias_difference": totals.mean("says_yes") - totals.mean("is_yes"),
        "false_positive_ratio": ratio(totals.sum("wrong_yes"), totals.sum("wrong")),
    }


def _ask_for_verdict(question: Question, text: str, judge: Judge) -> str:
    """Ask a judge; an empty reply is no verdict, and is asked for again."""
    prompt = grading_prompt(question.text, question.facts["reference"], text)
    replies = []
    for attempt in range(_TRIES):
        reply = judge.ask(
            question.id, prompt, attempt=attempt, temperature=1.0, max_tokens=_MAX_TOKENS
        )
        said = strip_reasoning(reply)
        if said.strip():
            return read_verdict(said)
        replies.append(reply)
    raise UnreadError(explain_unread("verdict", replies))


def _is_left_out(question: Question) -> bool:
    """Return whether the question is about a figure that is not shown."""
    return question.facts["kind"] == "VS" and question.facts["figure"][-1] == "0"


def _contribute(
    questions: Sequence[Question], right: Mapping[str, float]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what counts for the metrics; questions about one set are a cluster."""
    groups: dict[str, dict[Any, list[Question]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        facts, is_right = question.facts, right[question.id]
        is_yes = facts["answer"] == "Yes"
        yield (
            "_".join(facts["pair"][:3]),
            {
                "aAcc": is_right,
                f"aAcc_split.{facts['kind']}": is_right,
                "says_yes": float(bool(is_right) == is_yes),
                "is_yes": float(is_yes),
                "wrong": 1 - is_right,
                "wrong_yes": float(not is_right and not is_yes),
            },
        )
        groups["qAcc"][facts["pair"]].append(question)
        is_hard = facts["visual_input"] == "2"
        groups["hard_aAcc" if is_hard else "easy_aAcc"][facts["pair"]].append(question)
        if not _is_left_out(question):
            groups["fAcc"][facts["figure"]].append(question)

    for name, members in groups.items():
        for group in members.values():
            all_right = float(all(right[question.id] for question in group))
            yield "_".join(group[0].facts["pair"][:3]), {name: all_right}


BENCHMARK = Benchmark(
    name="hallusionbench_gpt",
    metrics=(
        Metric("qAcc", "%", "questions answered right on all of their figures, and without one"),
        Metric("aAcc", "%", "questions answered right"),
        Metric("fAcc", "%", "figures with all of their questions answered right"),
        Metric("easy_aAcc", "%", "qAcc on original figures, and without one"),
        Metric("hard_aAcc", "%", "qAcc on edited figures"),
        Metric("aAcc_split", "%", "aAcc of visual-dependent (VD) and supplement (VS) questions"),
        Metric("yes_bias_difference", "points", "share of yes above that of the right answers"),
        Metric("false_positive_ratio", "points", "share of wrong answers that should say no"),
    ),
    splits={"all": Split(1129)},
    protocol=(
        "HallusionBench, all questions, the question as the whole prompt, greedy; every answer "
        "compared with a reference sentence by a judge with the official prompt; official qAcc, "
        "aAcc and fAcc; 95 % interval: cluster bootstrap over sets of figures"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    id_advice=(
        "HallusionBench's ids are <category>_<subcategory>_<set_id>_<figure_id>_<question_id>"
    ),
    judge="required",
)
