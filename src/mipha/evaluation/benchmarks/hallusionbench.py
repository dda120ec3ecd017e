"""HallusionBench: yes-or-no questions about images that mislead, some of them edited.

The headline is the mean of three accuracies over the 951 questions with an image:

    aAcc    questions answered right
    fAcc    figures with all of their questions answered right
    qAcc    questions answered right on all of their figures

An answer is read by VLMEvalKit's rule: "yes" among its words and not "no", or the other way round.
A judge, where there is one, reads the others. `hallusionbench_gpt` is another number from the same
file: the repository's own script, where a judge compares every answer with a reference.

Source: open-compass/VLMEvalKit e8e78f05 `vlmeval/dataset/utils/yorn.py`;
    tianyi-lab/HallusionBench 744007c2 `HallusionBench.json`, README (prompt).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import NUM_PERIODS, replace_marks
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    OfficialRecord,
    TableImages,
    find_image,
    read_json_or_table,
    read_record,
    refuse_repeated,
)
from mipha.evaluation.judge import UnreadError, ask_each, explain_unread, strip_reasoning

FILE = "HallusionBench.json"
PARQUET = ("data/*image-*.parquet", "*image-*.parquet")
IMAGES = "hallusion_bench"
SOURCE = (
    f"get {FILE} and {IMAGES}.zip, unpacked beside it, from github.com/tianyi-lab/HallusionBench, "
    "or data/*.parquet from huggingface.co/datasets/lmms-lab/HallusionBench"
)

_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_TRIES = 5
_MAX_TOKENS = 1024
_PROMPT = (
    "You are an AI assistant who will help me to match an answer with two options of a question. "
    "The options are only Yes / No. You are provided with a question and an answer, and you need "
    "to find which option (Yes / No) is most similar to the answer. If the meaning of all options "
    "are significantly different from the answer, output Unknown. Your should output a single "
    "word among the following 3 choices: Yes, No, Unknown.\n"
    "Example 1: \nQuestion: Is the word in this image 'Hello'?\n"
    "Answer: The word in this image is 'Hello'.\nYour output: Yes\n"
    "Example 2: \nQuestion: Is the word in this image 'Hello'?\n"
    "Answer: The word in this image is not 'Hello'.\nYour output: No\n"
    "Example 3: \nQuestion: {question}?\nAnswer: {answer}\nYour output: "
)
_ACCURACIES = ("aAcc", "fAcc", "qAcc")


class _Record(OfficialRecord):
    category: Literal["VD", "VS"]
    subcategory: str
    visual_input: Literal["0", "1", "2"]
    set_id: str
    figure_id: str
    question_id: str
    question: str
    gt_answer: Literal["0", "1"]
    gt_answer_details: str
    filename: str | None = None


def read(root: Path, split: str) -> list[Question]:
    """Return every question with an image, in the order of the file.

    Args:
        root: Folder with HallusionBench.json and the images, or with .parquet files, or one file.
        split: `image`.

    Returns:
        Questions whose facts are `answer` (Yes or No), `reference` (a sentence), `kind` (VD or VS),
        `subcategory`, `visual_input`, `figure`, `pair` (what the question shares with those of
        other figures), `optional` (there is no image) and `image` (its name).
    """
    return [question for question in read_records(root, with_images=True) if question.images]


def read_labels(path: Path) -> list[Question]:
    """Return every labelled question; those without an image are marked `optional`."""
    return read_records(path, with_images=False)


def read_answer(text: str) -> str | None:
    """Return Yes or No, or None for an answer that names neither or both."""
    text = _PERIOD.sub("", replace_marks(text.lower()), count=NUM_PERIODS)
    words = text.split()
    if ("yes" in words) == ("no" in words):
        return None
    return "Yes" if "yes" in words else "No"


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge yes and no; answers to questions without an image count for nothing.

    Args:
        questions: Questions with their labels.
        predictions: Question id to answer, verbatim.
        judge: Reads what the rule cannot; None: such answers are wrong.

    Raises:
        ValueError: The judge has no recorded reply, or says nothing to one answer after the other.
    """
    asked = [question for question in questions if not question.facts["optional"]]
    if not asked:
        raise ValueError("no question has an image: predict those with one")
    parsed = {question.id: read_answer(predictions[question.id]) for question in asked}
    unread = [question for question in asked if parsed[question.id] is None]
    failed: dict[str, str] = {}
    if judge is not None:

        def ask(question: Question) -> str | None:
            return _ask_for_yes_or_no(question, predictions[question.id], judge)

        read, failed = ask_each(unread, ask, judge)
        parsed |= read
    if len(failed) == len(asked):
        raise ValueError(f"no answer was read: {next(iter(failed.values()))}")
    asked = [question for question in asked if question.id not in failed]
    right = {
        question.id: float(parsed[question.id] == question.facts["answer"]) for question in asked
    }

    num_unreadable = sum(parsed[question.id] is None for question in asked)
    note = f"by rules, without a judge: {num_unreadable:,} of {len(asked):,} answers say neither"
    if judge is not None:
        note = (
            f"the judge was asked about {len(unread):,} of {len(parsed):,} answers, and "
            f"{num_unreadable:,} stayed unreadable"
        )
    return Judgement(
        per_question=right,
        contributions=list(_contribute(asked, right, parsed)),
        parsed=parsed,
        failed=failed,
        notes=(f"{note}; unreadable is wrong",),
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return accuracies in percent, by category and subcategory too, and unreadable answers."""
    percent = {name: 100 * totals.mean(name) for name in totals.names if name != "unreadable"}
    splits = sorted(name for name in percent if "." in name)
    average = np.asarray(sum(percent[name] for name in _ACCURACIES) / len(_ACCURACIES))
    return {
        "average": average,
        **{name: percent[name] for name in (*_ACCURACIES, *splits)},
        "unreadable": totals.sum("unreadable"),
    }


def matching_prompt(question: str, answer: str) -> str:
    """Return the question to a judge."""
    return _PROMPT.format(question=question, answer=answer)


def _ask_for_yes_or_no(question: Question, text: str, judge: Judge) -> str | None:
    """Ask a judge, five times at most, as VLMEvalKit does; None where no reply can be read."""
    prompt = matching_prompt(question.text, text)
    replies = []
    for attempt in range(_TRIES):
        reply = judge.ask(
            question.id,
            prompt,
            attempt=attempt,
            temperature=0.5 * attempt,
            max_tokens=_MAX_TOKENS,
        )
        if answer := read_answer(strip_reasoning(reply)):
            return answer
        replies.append(reply)
    if not any(strip_reasoning(reply).strip() for reply in replies):
        raise UnreadError(explain_unread("answer", replies))
    return None


def _contribute(
    questions: Sequence[Question],
    right: Mapping[str, float],
    parsed: Mapping[str, str | None],
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what counts for the metrics: questions, figures and pairs.

    Questions about one set share their figures, so a set is a cluster.
    """
    figures: dict[Any, list[Question]] = defaultdict(list)
    pairs: dict[Any, list[Question]] = defaultdict(list)
    for question in questions:
        figures[question.facts["figure"]].append(question)
        pairs[question.facts["pair"]].append(question)
        unreadable = {"unreadable": float(parsed[question.id] is None)}
        yield _cluster(question), unreadable | _amounts("aAcc", question, right[question.id])

    for name, groups in (("fAcc", figures), ("qAcc", pairs)):
        for group in groups.values():
            all_right = float(all(right[question.id] for question in group))
            yield _cluster(group[0]), _amounts(name, group[0], all_right)


def _amounts(name: str, question: Question, right: float) -> dict[str, float]:
    kind, subcategory = question.facts["kind"], question.facts["subcategory"]
    splits = (f"{name}_split.{kind}", f"{name}_split.{kind}_{subcategory}")
    return dict.fromkeys((name, *splits), right)


def _cluster(question: Question) -> str:
    return "_".join(question.facts["pair"][:3])


def read_records(root: Path, with_images: bool) -> list[Question]:
    """Return every question of the file, with and without an image."""
    images = TableImages(with_images)
    place_of: dict[str, str] = {}
    questions = []
    for where, row, folder in read_json_or_table(root, (FILE,), PARQUET, SOURCE):
        record = read_record(_Record, row, where)
        place = (record.category, record.subcategory, record.set_id)
        question_id = "_".join((*place, record.figure_id, record.question_id))
        refuse_repeated(place_of, question_id, where, "id")

        # The image: a file under the folder of the .json file, or inside the table.
        name, image = record.filename, None
        if name is not None and with_images:
            if folder is None:
                _, image = images.read(row.get("image"), where, question_id)
            else:
                image = find_image(folder, (f"{IMAGES}/{name}", name), SOURCE)
        facts = {
            "answer": "Yes" if record.gt_answer == "1" else "No",
            "reference": record.gt_answer_details,
            "kind": record.category,
            "subcategory": record.subcategory,
            "visual_input": record.visual_input,
            "figure": (*place, record.figure_id),
            "pair": (*place, record.question_id),
            "optional": name is None,
            "image": name,
        }
        questions.append(Question(question_id, record.question, image, facts))
    return questions


BENCHMARK = Benchmark(
    name="hallusionbench",
    metrics=(
        Metric("average", "%", "mean of aAcc, fAcc and qAcc"),
        Metric("aAcc", "%", "questions answered right"),
        Metric("fAcc", "%", "figures with all of their questions answered right"),
        Metric("qAcc", "%", "questions answered right on all of their figures"),
        *(
            Metric(f"{name}_split", "%", f"{name} in a category or a subcategory")
            for name in _ACCURACIES
        ),
        Metric("unreadable", "questions", "answers that say neither yes nor no; they are wrong"),
    ),
    splits={"image": Split(951)},
    protocol=(
        "HallusionBench, questions with an image, the question as the whole prompt, greedy; yes or "
        "no read by the rule of VLMEvalKit e8e78f05, then by a judge where there is one, and an "
        "unreadable answer wrong; mean of aAcc, fAcc and qAcc; 95 % interval: cluster bootstrap "
        "over sets of figures"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    rules="VLMEvalKit",
    id_advice=(
        "HallusionBench's ids are <category>_<subcategory>_<set_id>_<figure_id>_<question_id>"
    ),
    judge="optional",
)
