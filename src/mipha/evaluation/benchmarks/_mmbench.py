"""What MMBench in English and in Chinese share: CircularEval.

A question stands in the file once for every rotation of its options, and counts as right only if every rotation is answered right.

Source: open-compass/VLMEvalKit e8e78f05 `vlmeval/dataset/utils/multiple_choice.py` (mcq_circular_eval, report_acc).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Judge, Judgement, Metric, Question
from mipha.evaluation.benchmarks._mmbench_files import cell_text
from mipha.evaluation.benchmarks._option_matching import ask_for_option, is_chinese, read_option

MAX_NEW_TOKENS = 1024
METRICS = (
    Metric(
        "accuracy",
        "%",
        "questions with every rotation of their options answered right (CircularEval)",
    ),
    Metric("vanilla", "%", "questions answered right as they stand, rotations left aside"),
    Metric("l2-category", "%", "CircularEval accuracy in one of the six abilities"),
    Metric("category", "%", "CircularEval accuracy in one of the twenty finer abilities"),
    Metric(
        "unreadable",
        "questions",
        "answers that name no option, each rotation counted by itself; they count as wrong",
    ),
)
SERVERS = {"test": "mmbench.opencompass.org.cn"}
SCORING = (
    "option read by the rules of VLMEvalKit e8e78f05, then by a judge where there is one, and an unreadable answer wrong "
    "(exact_matching); CircularEval accuracy over questions; 95 % interval: cluster bootstrap over images"
)
NUM_QUESTIONS = {"dev": 1164, "test": 1784}
"""Without rotations."""


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """CircularEval.

    A readable wrong rotation fails a question without a judge being asked; else the judge reads the unreadable rotations in order until
    one is wrong. A question whose unrotated row is missing is not counted, as officially.

    Args:
        questions: Rows; rotations of one question share `facts["group"]`.
        predictions: Row to answer, verbatim.
        judge: Reads what the rules cannot; None: such answers are wrong.

    Returns:
        Per question, under the index of its unrotated row, 1 if all of its rotations are right; what was read is told of every row.

    Raises:
        ValueError: The judge has no reply.
    """
    parsed = {
        question.id: read_option(predictions[question.id], question.facts["choices"])
        for question in questions
    }
    asked: list[str] = []
    contributions = []
    per_question = {}
    num_short = 0
    for group, rows in _groups(questions).items():
        original = rows[0]
        if int(original.id) != group:
            continue
        num_short += len(rows) < len(original.facts["choices"])
        if judge is not None and all(parsed[row.id] in (None, row.facts["answer"]) for row in rows):
            for row in (row for row in rows if parsed[row.id] is None):
                asked.append(row.id)
                parsed[row.id] = ask_for_option(
                    row.id, row.facts["question"], row.facts["choices"], predictions[row.id], judge
                )
                if parsed[row.id] != row.facts["answer"]:
                    break
        right = float(all(parsed[row.id] == row.facts["answer"] for row in rows))
        per_question[original.id] = right
        alone = float(parsed[original.id] == original.facts["answer"])
        unreadable = float(sum(parsed[row.id] is None for row in rows))
        abilities = {
            f"{kind}.{original.facts[kind]}": right
            for kind in ("l2-category", "category")
            if original.facts[kind]
        }
        contributions.append(
            (
                original.facts["image"],
                {"accuracy": right, "vanilla": alone, "unreadable": unreadable} | abilities,
            )
        )
    return Judgement(
        per_question=per_question,
        contributions=contributions,
        parsed=parsed,
        submission={
            question.id: cell_text(predictions[question.id], f"prediction of row {question.id}")
            for question in questions
        },
        notes=(*_judge_notes(judge, parsed, asked), *_rotation_notes(num_short)),
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Accuracies in %, by ability where the file names them, and the number of unreadable answers."""
    abilities = sorted(
        name for name in totals.names if name.startswith(("l2-category.", "category."))
    )
    accuracies = {name: 100 * totals.mean(name) for name in ("accuracy", "vanilla", *abilities)}
    return accuracies | {"unreadable": totals.sum("unreadable")}


def doubts(questions: Sequence[Question], split: str, chinese: bool) -> list[str]:
    """One sentence for each sign that this is not the protocol's file.

    Args:
        questions: Rows.
        split: Its name.
        chinese: The questions should be in Chinese.
    """
    groups = _groups(questions)
    found = []
    if len(groups) != NUM_QUESTIONS[split]:
        official = f"not the {NUM_QUESTIONS[split]:,} of version 1.0: version 1.1 is another set"
        found.append(f"{len(groups):,} questions without their rotations, {official}")
    if orphans := sum(int(rows[0].id) != group for group, rows in groups.items()):
        found.append(f"{orphans:,} questions lack their unrotated row, so they are not counted")
    found.extend(
        _rotation_notes(sum(len(rows) < len(rows[0].facts["choices"]) for rows in groups.values()))
    )
    num_chinese = sum(is_chinese(question.facts["question"]) for question in questions)
    if (2 * num_chinese > len(questions)) != chinese:
        found.append(
            f"{num_chinese:,} of {len(questions):,} rows ask in Chinese: this looks like the file of the other language"
        )
    if others := {question.facts["row"].get("split") or split for question in questions} - {split}:
        found.append(f"rows say that they are of split {', '.join(sorted(others))}, not {split}")
    return found


def _groups(questions: Sequence[Question]) -> dict[int, list[Question]]:
    """Index without rotation to the question's rows, the unrotated first."""
    groups: dict[int, list[Question]] = {}
    for question in sorted(questions, key=lambda question: int(question.id)):
        groups.setdefault(question.facts["group"], []).append(question)
    return groups


def _judge_notes(
    judge: Judge | None, parsed: Mapping[str, str | None], asked: Sequence[str]
) -> list[str]:
    unread = list(parsed.values()).count(None)
    if judge is None:
        return [
            f"scored by rules, without a judge (exact_matching): {unread:,} of {len(parsed):,} answers name no option and count as wrong"
        ]
    notes = [
        f"the judge was asked about {len(asked):,} of {len(parsed):,} answers: those that the rules cannot read, where they decide"
    ]
    if failed := sum(parsed[question_id] is None for question_id in asked):
        notes.append(
            f"{failed:,} of them the judge did not read either: they count as wrong, where the official program guesses"
        )
    return notes


def _rotation_notes(num_short: int) -> list[str]:
    return (
        [
            f"{num_short:,} questions have fewer rotations than options, which makes CircularEval easier"
        ]
        if num_short
        else []
    )
