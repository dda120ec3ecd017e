"""MMBench in English: multiple choice with rotated options (CircularEval), dev split of 2023-07-12.

A question stands in the file once for every rotation of its options. It counts as right only if
every rotation is answered right. `mmbench_cn` is the Chinese edition, made here as well.

Source: open-compass/VLMEvalKit e8e78f05 `vlmeval/dataset/utils/multiple_choice.py`
    (mcq_circular_eval, report_acc) and `vlmeval/dataset/image_base.py` (images that rows share);
    haotian-liu/LLaVA c121f043 `scripts/v1_5/eval/mmbench.sh`, `mmbench_cn.sh`,
    `llava/eval/model_vqa_mmbench.py` (prompt), `scripts/convert_mmbench_for_submission.py`
    (upload).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import (
    AGAIN,
    LONGEST_REFERENCE,
    cell_text,
    decode_image,
    find,
    read_table,
    refuse_repeated,
    write_spreadsheet,
)
from mipha.evaluation.judge import MOST_UNREAD_IN_A_ROW
from mipha.evaluation.multiple_choice import (
    LETTER,
    LETTERS,
    UnreadError,
    ask_for_option,
    is_chinese,
    list_options,
    read_option,
)

# The official programs read the file with pandas. For pandas an empty cell and these texts all mean
# "no value", so a prompt ends before an option "None" or "NA". The official scorer loses such
# options too, on their way through spreadsheets, and one that is the gold answer can then never be
# right. Here the scorer knows every option that has a text.
# Source: pandas 3.1 `pandas._libs.parsers.STR_NA_VALUES`; LLaVA c121f043
#     `model_vqa_mmbench.py:is_none`.
PANDAS_NO_VALUE = frozenset(
    (
        *("", "None", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A", "NULL", "null"),
        *("nan", "-nan", "NaN", "-NaN", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
    )
)
NO_VALUE = frozenset(("", "nan", "NaN"))
"""Cells without a text: empty, or what a program made of an empty one."""

ROTATION = 1_000_000
"""A rotation of a question stands at the question's index plus a multiple of this."""
NUM_QUESTIONS = {"dev": 1164, "test": 1784}
"""Questions of version 1.0, without rotations."""

_NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6
_ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


@dataclass(frozen=True)
class Edition:
    """MMBench in one language.

    Args:
        name: Name of the benchmark.
        language: English name of the language.
        instruction: End of the prompt.
        instruction_name: The instruction in the protocol's sentence.
        files: Split to names of its .tsv file, the usual one first.
        num_rows: Split to number of questions with their rotations.
    """

    name: str
    language: str
    instruction: str
    instruction_name: str
    files: Mapping[str, tuple[str, ...]]
    num_rows: Mapping[str, int]

    @property
    def source(self) -> str:
        """Where the files come from."""
        dev, test = (self.files[split][0] for split in ("dev", "test"))
        return f"get {dev} (or {test}) from open-compass/MMBench"


ENGLISH = Edition(
    name="mmbench",
    language="English",
    instruction=LETTER,
    instruction_name="LLaVA-1.5's instruction",
    files={
        "dev": ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv"),
        "test": ("mmbench_test_20230712.tsv", "MMBench_TEST_EN.tsv"),
    },
    num_rows={"dev": 4377, "test": 6718},
)
CHINESE = Edition(
    name="mmbench_cn",
    language="Chinese",
    instruction="\n请直接回答选项字母。",
    instruction_name="LLaVA-1.5's Chinese instruction",
    files={
        "dev": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"),
        "test": ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv"),
    },
    num_rows={"dev": 4329, "test": 6666},
)


def make_benchmark(edition: Edition) -> Benchmark:
    """Return the benchmark of one edition."""

    def read(root: Path, split: str) -> list[Question]:
        path = find(root, edition.files[split], edition.source)
        return read_rows(path, edition, with_labels=split == "dev", with_images=True)

    def read_labels(path: Path) -> list[Question]:
        path = find(path, edition.files["dev"], edition.source)
        return read_rows(path, edition, with_labels=True, with_images=False)

    def make_upload(
        questions: Sequence[Question], predictions: Mapping[str, str]
    ) -> dict[str, bytes]:
        return {f"{edition.name}.xlsx": _make_spreadsheet(questions, predictions)}

    def find_doubts(questions: Sequence[Question], split: str) -> list[str]:
        return list_doubts(questions, split, edition)

    server = {"dev": None, "test": "mmbench.opencompass.org.cn"}
    return Benchmark(
        name=edition.name,
        metrics=(
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
        ),
        splits={split: Split(size, server[split]) for split, size in edition.num_rows.items()},
        protocol=(
            f"MMBench {edition.language} 1.0, hint, question, lettered options and "
            f"{edition.instruction_name}, greedy; option read by the rules of VLMEvalKit e8e78f05, "
            "then by a judge where there is one, and an unreadable answer wrong (exact_matching); "
            "CircularEval accuracy over questions; 95 % interval: cluster bootstrap over images"
        ),
        source=edition.source,
        max_new_tokens=1024,
        read=read,
        read_labels=read_labels,
        score=score,
        measure=measure,
        submission=make_upload,
        doubts=find_doubts,
        id_advice="MMBench's ids are the indices of the rows, rotations included",
        judge="optional",
    )


def read_rows(path: Path, edition: Edition, with_labels: bool, with_images: bool) -> list[Question]:
    """Return every row of a file, in its order.

    Args:
        path: The .tsv file.
        edition: Its language.
        with_labels: Every row must have an answer; else an answer that is there is kept.
        with_images: Decode the images, each once however many rows show it.

    Returns:
        Questions whose facts are `group` (index without the rotation), `question`, `choices`
        (letter to text), `answer` (letter, where there is one), `image` (hash of the image, or the
        group where there is none), `l2-category`, `category`, and `row` (cells that an upload
        keeps, by column).

    Raises:
        ValueError: This is another kind of file; names the line.
    """
    rows: dict[int, tuple[str, dict[str, str]]] = {}
    own_image: dict[int, str] = {}  # index to hash
    shared_image: dict[int, int] = {}  # index to index of the row with the image
    decoded: dict[str, bytes] = {}
    place_of: dict[int, str] = {}

    # Files of 2023 repeat an image in every rotation, later ones refer to the unrotated row.
    for where, row in read_table(path, required=("index", "question", "A", "B")):
        index = _read_index(row, where)
        refuse_repeated(place_of, index, where, "index")
        cell = row.pop("image", "")
        if len(cell) > LONGEST_REFERENCE:
            own_image[index] = sha256 = hashlib.sha256(cell.encode()).hexdigest()
            if with_images and sha256 not in decoded:
                decoded[sha256] = decode_image(cell, where)
        elif cell.isdecimal():
            shared_image[index] = int(cell)
        rows[index] = where, row

    # A reference may point to a later row, so questions are made when all rows are read.
    questions = []
    for index, (where, row) in rows.items():
        sha256 = own_image.get(shared_image.get(index, index))
        if with_images and sha256 is None:
            raise ValueError(
                f"{where}: the image is neither an image in base64 nor the index of a row with "
                f"one: {AGAIN}"
            )
        facts = _read_facts(index, row, where, with_labels)
        image = sha256 or f"question {facts['group']}"
        prompt = _make_prompt(row, edition.instruction)
        questions.append(Question(str(index), prompt, decoded.get(image), facts | {"image": image}))
    return questions


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge by CircularEval.

    A readable wrong rotation fails a question without a judge. Else the judge reads the unreadable
    rotations in order until one is wrong. A question whose unrotated row is missing is not counted,
    as in the official program.

    Args:
        questions: Rows; rotations of one question share `facts["group"]`.
        predictions: Row to answer, verbatim.
        judge: Reads what the rules cannot; None: such answers are wrong. A question with an answer
            that it cannot read either fails.

    Returns:
        Per question, under the index of its unrotated row, 1 if all of its rotations are right;
        `parsed` is given for every row.

    Raises:
        ValueError: The judge has no recorded reply, or its replies cannot be read, one after the
            other.
    """
    parsed = {
        question.id: read_option(predictions[question.id], question.facts["choices"])
        for question in questions
    }
    asked: list[str] = []
    failed: dict[str, str] = {}
    contributions = []
    per_question = {}
    num_short = 0

    for group, rows in _group_rotations(questions).items():
        original = rows[0]
        if int(original.id) != group:
            continue
        num_short += len(rows) < len(original.facts["choices"])
        if judge is not None and all(parsed[row.id] in (None, row.facts["answer"]) for row in rows):
            try:
                _ask_judge(rows, predictions, parsed, judge, asked)
            except UnreadError as error:
                failed[asked[-1]] = str(error)
                if len(failed) == len(asked) == MOST_UNREAD_IN_A_ROW:
                    raise ValueError(f"the first {len(asked)} answers fail: {error}") from error
                continue

        # One contribution per question: right if every rotation is.
        right = float(all(parsed[row.id] == row.facts["answer"] for row in rows))
        per_question[original.id] = right
        amounts = {
            "accuracy": right,
            "vanilla": float(parsed[original.id] == original.facts["answer"]),
            "unreadable": float(sum(parsed[row.id] is None for row in rows)),
        }
        for kind in ("l2-category", "category"):
            if original.facts[kind]:
                amounts[f"{kind}.{original.facts[kind]}"] = right
        contributions.append((original.facts["image"], amounts))
    if failed and not contributions:
        raise ValueError(f"no question has a score: {next(iter(failed.values()))}")

    return Judgement(
        per_question=per_question,
        contributions=contributions,
        parsed=parsed,
        submission={
            question.id: cell_text(predictions[question.id], f"prediction of row {question.id}")
            for question in questions
        },
        failed=failed,
        notes=(*_judge_notes(judge, parsed, asked), *_rotation_notes(num_short)),
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return accuracies in %, by ability where the file names them, and the unreadable answers."""
    abilities = sorted(
        name for name in totals.names if name.startswith(("l2-category.", "category."))
    )
    accuracies = {name: 100 * totals.mean(name) for name in ("accuracy", "vanilla", *abilities)}
    return accuracies | {"unreadable": totals.sum("unreadable")}


def list_doubts(questions: Sequence[Question], split: str, edition: Edition) -> list[str]:
    """Return signs of version 1.1, of the other language, of missing rotations."""
    groups = _group_rotations(questions)
    found = []

    # Number of questions and of their rotations.
    if len(groups) != NUM_QUESTIONS[split]:
        official = f"not the {NUM_QUESTIONS[split]:,} of version 1.0: version 1.1 is another set"
        found.append(f"{len(groups):,} questions without their rotations, {official}")
    if orphans := sum(int(rows[0].id) != group for group, rows in groups.items()):
        found.append(f"{orphans:,} questions lack their unrotated row, so they are not counted")
    num_short = sum(len(rows) < len(rows[0].facts["choices"]) for rows in groups.values())
    found += _rotation_notes(num_short)

    # Language and split.
    num_chinese = sum(is_chinese(question.facts["question"]) for question in questions)
    if (2 * num_chinese > len(questions)) != (edition is CHINESE):
        found.append(
            f"{num_chinese:,} of {len(questions):,} rows ask in Chinese: "
            "this looks like the file of the other language"
        )
    if others := {question.facts["row"].get("split") or split for question in questions} - {split}:
        found.append(f"rows say that they are of split {', '.join(sorted(others))}, not {split}")
    return found


def _read_index(row: Mapping[str, str], where: str) -> int:
    if not row["index"].isdecimal():
        raise ValueError(f"{where}: index {row['index'][:20]!r} is not a whole number: {AGAIN}")
    return int(row["index"])


def _read_facts(index: int, row: Mapping[str, str], where: str, with_label: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "group": index % ROTATION,
        "question": row["question"],
        "choices": {
            letter: row[letter] for letter in LETTERS if row.get(letter, "") not in NO_VALUE
        },
        "row": {column: cell for column, cell in row.items() if column not in _NOT_UPLOADED},
    }
    for kind in ("l2-category", "category"):
        value = row.get(kind, "")
        facts[kind] = None if value in NO_VALUE else _ABBREVIATIONS.get(value, value)

    label = row.get("answer", "")
    if label in NO_VALUE:
        if with_label:
            raise ValueError(
                f"{where} has no answer: give a file whose labels are public, "
                "such as that of the dev split"
            )
        return facts
    if label not in list(LETTERS) or not row.get(label):
        raise ValueError(
            f"{where}: the answer {label!r} is the letter of none of its options: {AGAIN}"
        )
    return facts | {"answer": label}


def _make_prompt(row: Mapping[str, str], instruction: str) -> str:
    hint = row.get("hint", "")
    shown: list[str] = []
    for letter in "ABCD":
        if _is_none(row.get(letter, "")):
            break
        shown.append(row[letter])
    before = "" if _is_none(hint) else f"{hint}\n"
    return before + row["question"] + list_options(shown) + instruction


def _is_none(cell: str) -> bool:
    """Return whether the prompt leaves a cell out."""
    return cell in PANDAS_NO_VALUE or cell.lower() in ("nan", "none")


def _make_spreadsheet(questions: Sequence[Question], predictions: Mapping[str, str]) -> bytes:
    """Return the server's file: one line per row with the answer in the seventh column."""
    columns = list(questions[0].facts["row"])
    columns.insert(_PREDICTION_COLUMN, "prediction")

    def cells(question: Question) -> dict[str, str | int | None]:
        row = {
            column: None if cell in NO_VALUE else cell
            for column, cell in question.facts["row"].items()
        }
        return row | {"index": int(question.id), "prediction": predictions[question.id]}

    return write_spreadsheet(columns, map(cells, questions))


def _group_rotations(questions: Sequence[Question]) -> dict[int, list[Question]]:
    """Return index without rotation to the question's rows, the unrotated first."""
    groups: dict[int, list[Question]] = {}
    for question in sorted(questions, key=lambda question: int(question.id)):
        groups.setdefault(question.facts["group"], []).append(question)
    return groups


def _ask_judge(
    rows: Sequence[Question],
    predictions: Mapping[str, str],
    parsed: dict[str, str | None],
    judge: Judge,
    asked: list[str],
) -> None:
    """Let the judge read unreadable rows into `parsed` until one is wrong.

    The ids of rows that the judge is asked about are appended to `asked`.

    Raises:
        UnreadError: The judge could not read the answer of the last of them.
    """
    for row in [row for row in rows if parsed[row.id] is None]:
        asked.append(row.id)
        question, choices = row.facts["question"], row.facts["choices"]
        parsed[row.id] = ask_for_option(row.id, question, choices, predictions[row.id], judge)
        if parsed[row.id] != row.facts["answer"]:
            break


def _judge_notes(
    judge: Judge | None, parsed: Mapping[str, str | None], asked: Sequence[str]
) -> list[str]:
    if judge is None:
        num_unread = list(parsed.values()).count(None)
        return [
            f"scored by rules, without a judge (exact_matching): {num_unread:,} of {len(parsed):,} "
            "answers name no option and count as wrong"
        ]
    return [
        f"the judge was asked about {len(asked):,} of {len(parsed):,} answers: "
        "those that the rules cannot read, where they decide"
    ]


def _rotation_notes(num_short: int) -> list[str]:
    if not num_short:
        return []
    return [
        f"{num_short:,} questions have fewer rotations than options, "
        "which makes CircularEval easier"
    ]


BENCHMARK = make_benchmark(ENGLISH)
