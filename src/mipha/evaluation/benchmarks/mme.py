"""MME: two yes/no questions an image, 14 subtasks of 200 points each.

A subtask is worth accuracy plus the share of images with both answers right. Only the first four
characters decide, in lower case: "yes" among them is yes, else "no" among them is no, else the
answer is `other`, which is wrong. So "Eyes" is yes, "Not sure" and "Snow" are no, "The answer is
yes", "**Yes**" and "  Yes" are other.

Official scores are made from lines `image TAB question TAB label TAB answer`, so an answer with a
line break or a tab breaks them. The line break is undone as LLaVA's copy of the scorer does it:
text after the first line is dropped. The official script drops a line with a tab too many, and then
pairs all later questions of the subtask wrongly. Here answers are joined to questions by id: an
answer with a tab in its first line is `other`, the pairs stay as they are, and a note says so.

Source: BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation, dd295090,
    `tools/eval_tool.zip` (`calculation.py`); haotian-liu/LLaVA c121f043 `docs/Evaluation.md` and
    its `llava_mme.jsonl`; BAAI-DCAI/Bunny 08273acb `eval/mme/convert_answer_to_mme.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.answers import SHORT
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import AGAIN

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION

SOURCE = (
    "get MME_Benchmark_release_version (huggingface.co/datasets/darkyarding/MME) and, into the "
    "same folder, <subtask>.txt from Your_Results of eval_tool.zip "
    "(github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation)"
)
_ASK = "Please answer yes or no."
_COCO = ("existence", "count", "position", "color")
"""Subtasks whose images are COCO's, under COCO's names; some images are in several subtasks.

Elsewhere `0001.png` is another image in each subtask.
"""
_SUFFIXES = (".jpg", ".png", ".jpeg")


class _Line(NamedTuple):
    """One question; `number` counts from 0 in its subtask, `image` may lack its suffix."""

    subtask: str
    number: int
    image: str
    question: str
    answer: str


def read(root: Path, split: str) -> list[Question]:
    """Return every question of the subtasks that are there, in the official order of subtasks.

    Args:
        root: Folder with `<subtask>.txt` and the images, in `<subtask>/images/` or `<subtask>/`.
            Without any `<subtask>.txt` the release's own files are read: two questions in one
            `.txt` per image, in the order of their names; ids then number these.
        split: `test`.

    Returns:
        Questions whose facts are `answer` (yes or no), `subtask`, `pair` (of questions on one
        image) and `image` (the cluster).
    """
    return [
        _question(line, _bare(line.question) + SHORT, _image(root, line)) for line in _lines(root)
    ]


def read_labels(path: Path) -> list[Question]:
    """Return the labelled questions of a folder with `<subtask>.txt`, or of the release's."""
    return [_question(line, line.question, None) for line in _lines(path)]


def read_answer(text: str) -> str:
    """Return yes, no or other.

    Python's text files end a line at a carriage return too, so the official scorer's first line
    ends there.
    """
    line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    start = line.lower()[:4]
    if "\t" in line:
        return "other"
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def read_answer_folder(
    folder: Path, questions: Sequence[Question]
) -> Iterator[tuple[str, str, str]]:
    """Yield place, id and text of every answer in the files that the official scorer reads.

    They are `<subtask>.txt` with image, question, label and answer, in any order of the lines.

    Raises:
        FileNotFoundError: A subtask has no file.
        ValueError: A line has another form, or is about no question.
    """
    # Image and question name a line; equal ones count in their order.
    ids: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for question in questions:
        facts = question.facts
        ids[facts["subtask"], facts["image"], _bare(question.text)].append(question.id)

    for subtask in dict.fromkeys(question.facts["subtask"] for question in questions):
        path = folder / f"{subtask}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no answers in {path.name}: add that file")
        for number, row in enumerate(_read_text(path).split("\n"), start=1):
            if not row.strip():
                continue
            where = f"{path} line {number}"
            fields = row.split("\t")
            if len(fields) < 4:
                raise ValueError(
                    f"{where} has {len(fields)} fields, not image, question, label and answer with "
                    f"tabs between: {row[:80]!r}"
                )
            image, text, _, *answer = fields
            left = ids[subtask, _cluster(subtask, image), _bare(text)]
            if not left:
                raise ValueError(
                    f"{where} is about no question, or a second time: {row[:80]!r}; give the "
                    "images and questions as they stand in the official file"
                )
            yield where, left.pop(0), "\t".join(answer)


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Judge each question, and each image's two questions together."""
    parsed = {question.id: read_answer(predictions[question.id]) for question in questions}
    right = {
        question.id: float(parsed[question.id] == question.facts["answer"])
        for question in questions
    }

    # Each question counts for acc, each complete pair for acc_plus.
    pairs: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        pairs[question.facts["pair"]].append(question)
    contributions = [
        (question.facts["image"], {f"{question.facts['subtask']}.acc": right[question.id]})
        for question in questions
    ]
    for pair in pairs.values():
        if len(pair) == 2:
            both = float(all(right[question.id] for question in pair))
            contributions.append(
                (pair[0].facts["image"], {f"{pair[0].facts['subtask']}.acc_plus": both})
            )

    num_halves = sum(len(pair) == 1 for pair in pairs.values())
    return Judgement(
        per_question=right,
        contributions=contributions,
        parsed=parsed,
        notes=tuple(_notes(questions, predictions, num_halves)),
    )


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return perception, cognition, then score, acc and acc_plus of every subtask that is there."""
    parts: dict[str, np.ndarray] = {}
    for subtask in SUBTASKS:
        if f"{subtask}.acc" in totals.names:
            acc, acc_plus = (100 * totals.mean(f"{subtask}.{name}") for name in ("acc", "acc_plus"))
            parts |= {
                f"{subtask}.score": acc + acc_plus,
                f"{subtask}.acc": acc,
                f"{subtask}.acc_plus": acc_plus,
            }
    return {"perception": _sum(parts, PERCEPTION), "cognition": _sum(parts, COGNITION)} | parts


def find_doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Return a sentence if the two questions of a pair are about different images.

    Then the lines of a file are out of order.
    """
    images: dict[str, str] = {}
    for question in questions:
        pair, image = question.facts["pair"], question.facts["image"]
        if images.setdefault(pair, image) != image:
            return [
                f"{question.id} and the line before it are scored as a pair but are about two "
                f"images: get {pair.split('/')[0]}.txt again"
            ]
    return []


def _sum(parts: Mapping[str, np.ndarray], subtasks: Sequence[str]) -> np.ndarray:
    """Return the points of the subtasks that are there; undefined if none is."""
    points = [parts[f"{subtask}.score"] for subtask in subtasks if f"{subtask}.score" in parts]
    if not points:
        return np.full_like(next(iter(parts.values())), np.nan)
    return sum(points[1:], start=points[0])


def _notes(
    questions: Sequence[Question], predictions: Mapping[str, str], num_halves: int
) -> Iterator[str]:
    there = {question.facts["subtask"] for question in questions}
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if missing := [subtask for subtask in subtasks if subtask not in there]:
            count = f"{len(subtasks) - len(missing)} of {len(subtasks)}"
            yield (
                f"{name} is the sum of {count} subtasks, without {', '.join(missing)}: "
                "do not compare it with published sums"
            )

    if num_halves:
        yield (
            f"{num_halves} images have only one of their two questions answered and count for acc, "
            "not for acc_plus"
        )

    if tabs := sum(
        "\t" in re.split(r"[\r\n]", predictions[question.id], maxsplit=1)[0]
        for question in questions
    ):
        yield (
            f"{tabs} answers hold a tab and are wrong; the official script would lose their lines "
            "and pair later questions wrongly"
        )


def _question(line: _Line, text: str, image: Path | None) -> Question:
    return Question(
        f"{line.subtask}/{line.number}",
        text,
        image,
        {
            "answer": line.answer,
            "subtask": line.subtask,
            "pair": f"{line.subtask}/{line.number // 2}",
            "image": _cluster(line.subtask, line.image),
        },
    )


def _cluster(subtask: str, image: str) -> str:
    """Return the name of an image that is unique in all subtasks."""
    stem = Path(image).stem
    return stem if subtask in _COCO else f"{subtask}/{stem}"


def _bare(question: str) -> str:
    """Return a question without its last sentence and the white space before that.

    Some questions have two spaces there, and LLaVA's prompts have none.
    """
    return question.removesuffix(_ASK).rstrip()


def _lines(root: Path) -> Iterator[_Line]:
    """Yield every question of every subtask that is there."""
    if root.is_file():
        raise ValueError(f"{root} is one file: give the folder with the <subtask>.txt")
    texts = {subtask: root / f"{subtask}.txt" for subtask in SUBTASKS}
    folders = {subtask: root / subtask for subtask in SUBTASKS}

    if there := [subtask for subtask, path in texts.items() if path.is_file()]:
        for subtask in there:
            yield from _tool_lines(subtask, texts[subtask])
    elif there := [subtask for subtask, path in folders.items() if path.is_dir()]:
        for subtask in there:
            yield from _release_lines(subtask, folders[subtask])
    else:
        raise FileNotFoundError(
            f"{root} has neither {SUBTASKS[0]}.txt nor {SUBTASKS[0]}/, nor those of another "
            f"subtask: {SOURCE}"
        )


def _tool_lines(subtask: str, path: Path) -> Iterator[_Line]:
    """Yield the questions of a `<subtask>.txt` of eval_tool."""
    rows = _rows(path)
    if len(rows) % 2:
        raise ValueError(f"{path} has {len(rows)} lines, not two per image: {AGAIN}")
    for number, row in enumerate(rows):
        image, question, answer = _fields(
            row, ("image", "question", "Yes or No"), f"{path} line {number + 1}"
        )
        yield _Line(subtask, number, image, question, answer)


def _release_lines(subtask: str, folder: Path) -> Iterator[_Line]:
    """Yield the questions of a subtask's folder in the release.

    It has a `.txt` per image, beside the images or in `questions_answers_YN/`.
    """
    split_up = folder / "questions_answers_YN"
    number = 0
    for path in sorted((split_up if split_up.is_dir() else folder).glob("*.txt")):
        rows = _rows(path)
        if len(rows) != 2:
            raise ValueError(f"{path} has {len(rows)} lines, not two: {AGAIN}")
        for row_number, row in enumerate(rows, start=1):
            question, answer = _fields(row, ("question", "Yes or No"), f"{path} line {row_number}")
            yield _Line(subtask, number, path.stem, question, answer)
            number += 1


def _rows(path: Path) -> list[str]:
    return _read_text(path).rstrip().split("\n")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {AGAIN}") from error


def _fields(row: str, names: Sequence[str], where: str) -> list[str]:
    """Return the fields of a line, the last one as yes or no."""
    *fields, answer = row.strip().split("\t")
    if len(fields) + 1 != len(names):
        raise ValueError(
            f"{where} has {len(fields) + 1} fields, not {len(names)} ({', '.join(names)}) with "
            f"tabs between: {row[:80]!r}"
        )
    if answer.strip().lower() not in ("yes", "no"):
        raise ValueError(f"{where} has the answer {answer!r}, not Yes or No: fix that line")
    return [*fields, answer.strip().lower()]


def _image(root: Path, line: _Line) -> Path:
    """Return the image of a question, in one of the places where the release has it."""
    names = [line.image]
    if Path(line.image).suffix not in _SUFFIXES:
        names = [line.image + suffix for suffix in _SUFFIXES]
    for folder in (root / line.subtask / "images", root / line.subtask):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(
        f"no image {root / line.subtask / names[0]}, nor in images/ there: {SOURCE}"
    )


BENCHMARK = Benchmark(
    name="mme",
    metrics=(
        Metric("perception", "points", "sum of the ten perception subtasks, of 2000"),
        Metric(
            "cognition",
            "points",
            "sum of the four cognition subtasks, of 800",
            column="mme_cognition",
        ),
        *(
            Metric(f"{subtask}.score", "points", f"{subtask}: acc + acc_plus, of 200")
            for subtask in SUBTASKS
        ),
        *(
            Metric(
                subtask,
                "%",
                f"{subtask}: acc (questions right) and acc_plus (images with both questions right)",
            )
            for subtask in SUBTASKS
        ),
    ),
    splits={"test": Split(2374)},
    protocol=(
        "MME, LLaVA-1.5 prompt (question without ` Please answer yes or no.`, then `Answer the "
        "question using a single word or phrase.`), greedy; yes or no in the first four "
        "characters; a subtask's points are 100 x accuracy + 100 x share of images with both "
        "answers right; headline: sum over the perception subtasks; 95 % interval: cluster "
        "bootstrap over images"
    ),
    source=SOURCE,
    max_new_tokens=128,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    doubts=find_doubts,
    id_advice=(
        "MME's ids are <subtask>/<line number from 0>; or give the folder with the <subtask>.txt "
        "that the official scorer reads"
    ),
    read_answer_folder=read_answer_folder,
)
