"""Questions -> predictions.jsonl: asks once, never twice, and never takes an error for an answer.

predictions.meta.json   which checkpoint was asked, with which prompts; others are refused
predictions.jsonl       {"question_id", "text", "num_tokens", "finished"}, appended as answers arrive; in official order at the end
errors.jsonl            {"question_id", "error"} of the last call's failures; a failed question is asked again by the next

Several processes (torchrun) share the images; the first writes the files above, each other one `*.rank<n>.jsonl` until `merge`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from mipha.evaluation.benchmark import Question
from mipha.files import append_line, read_lines, write_whole

MOST_FAILURES_IN_A_ROW = 20
"""So many pictures that fail with no answer between them are one fault of the set-up, not of the pictures."""


class Asker(Protocol):
    """What `predict` needs of an assistant."""

    def answer_many(
        self,
        pairs: Sequence[tuple[Any, str]],
        *,
        max_new_tokens: int,
        batch_size: int,
        on_answers: Any,
    ) -> list[Any]: ...


def predict(
    assistant: Asker,
    benchmark_name: str,
    questions: Sequence[Question],
    folder: Path,
    batch_size: int,
    max_new_tokens: int,
    limit: int | None = None,
    progress: bool = True,
    checkpoint_sha256: str = "",
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Answer the questions that have no prediction in the folder yet.

    Args:
        assistant: Asked through `answer_many`.
        benchmark_name: Goes into the header and the progress bar.
        questions: All of the split, ids unique; the header's hash is over all of them, so a limited run can be extended.
        folder: Gets the three files; made if missing.
        batch_size: Questions a forward pass.
        max_new_tokens: Longest answer, in tokens.
        limit: Ask the first N only.
        progress: Show a bar with questions/s and the time left.
        checkpoint_sha256: `fingerprint` of the model that the assistant runs.
        rank: This process; it asks about every `num_ranks`-th image.
        num_ranks: Processes that ask. When all are done, one of them calls `merge`.

    Raises:
        ValueError: The folder's predictions are by another checkpoint or with other prompts; ids repeat; or everything fails.
    """
    if len({question.id for question in questions}) != len(questions):
        raise ValueError(
            f"benchmark {benchmark_name} gives some question id twice: make them unique"
        )
    _claim(
        folder,
        {
            "benchmark": benchmark_name,
            "checkpoint_sha256": checkpoint_sha256,
            "prompts_sha256": prompts_hash(questions),
            "max_new_tokens": max_new_tokens,
        },
    )
    predictions = read_predictions(folder)
    asked = _share(questions[:limit], rank, num_ranks)
    open_questions = [question for question in asked if question.id not in predictions]
    answers_file, errors_file = (_file(folder, name, rank) for name in ("predictions", "errors"))
    errors_file.unlink(missing_ok=True)
    with _bar(
        benchmark_name, len(asked), len(asked) - len(open_questions), progress and not rank
    ) as advance:
        _ask(
            assistant,
            open_questions,
            answers_file,
            errors_file,
            set(predictions),
            batch_size,
            max_new_tokens,
            advance,
        )


def merge(folder: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Bring the files of all processes together, in the order of the questions.

    Returns:
        Question id to text of every prediction in the folder.
    """
    place = {question.id: number for number, question in enumerate(questions)}
    answered = read_predictions(folder)
    for name in ("predictions", "errors"):
        files = sorted(folder.glob(f"{name}*.jsonl"))
        # A process of an earlier call may have left an error that another has mended since.
        rows = {
            row["question_id"]: row
            for file in files
            for row in read_lines(file)
            if name == "predictions" or row["question_id"] not in answered
        }
        if rows:
            ordered = sorted(rows.values(), key=lambda row: place[row["question_id"]])
            write_whole(
                folder / f"{name}.jsonl",
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered),
            )
        for file in files:
            if file.name != f"{name}.jsonl":
                file.unlink()
    return answered


def read_predictions(folder: Path) -> dict[str, str]:
    """Question id to text of every prediction in the folder, whichever process made it."""
    return {
        row["question_id"]: row["text"]
        for file in sorted(folder.glob("predictions*.jsonl"))
        for row in read_lines(file)
    }


def prompts_hash(questions: Sequence[Question]) -> str:
    """SHA-256 over ids, prompts and images in order; a path counts by its name, so data may move."""
    digest = hashlib.sha256()
    for question in questions:
        image = question.image
        shown = (
            hashlib.sha256(image).hexdigest()
            if isinstance(image, bytes)
            else image.name
            if image
            else None
        )
        digest.update(json.dumps([question.id, question.text, shown]).encode() + b"\n")
    return digest.hexdigest()


def fingerprint(model: Path) -> str:
    """SHA-256 over the content of a model folder: weights, configuration, tokenizer, template; not its README or results.

    Raises:
        FileNotFoundError: The folder has no .safetensors file.
    """
    files = sorted(
        path
        for path in model.iterdir()
        if path.suffix in {".safetensors", ".json", ".jinja", ".model", ".txt"}
    )
    if not any(path.suffix == ".safetensors" for path in files):
        raise FileNotFoundError(
            f"{model} has no .safetensors file: give the folder of an exported model"
        )
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(f"{path.name} {_file_hash(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, changed: int) -> str:
    """Size and time of change are there for the cache only: a file that was written anew is read anew."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _claim(folder: Path, header: dict[str, Any]) -> None:
    """Write the folder's header, or check that it says the same."""
    path = folder / "predictions.meta.json"
    if not path.is_file():
        if (folder / "predictions.jsonl").is_file():
            raise ValueError(
                f"{folder} has predictions but no {path.name}, so nobody knows whose they are: delete that folder"
            )
        write_whole(path, json.dumps(header, indent=2) + "\n")
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    if differing := [key for key in header if old.get(key) != header[key]]:
        key = differing[0]
        whose = {"checkpoint_sha256": "another checkpoint", "prompts_sha256": "other prompts"}
        what = whose.get(key, f"{key}={old.get(key)} (now {header[key]})")
        raise ValueError(
            f"the predictions in {folder} were made with {what}: delete that folder to ask again, or write to another one"
        )


def _file(folder: Path, name: str, rank: int) -> Path:
    """Where one process writes."""
    return folder / (f"{name}.rank{rank}.jsonl" if rank else f"{name}.jsonl")


def _share(questions: Sequence[Question], rank: int, num_ranks: int) -> list[Question]:
    """The questions about every `num_ranks`-th image: those of one image stay together, so that it is encoded once."""
    numbers: dict[Any, int] = {}
    keys = [question.id if question.image is None else question.image for question in questions]
    return [
        question
        for question, key in zip(questions, keys, strict=True)
        if numbers.setdefault(key, len(numbers)) % num_ranks == rank
    ]


def _ask(
    assistant: Asker,
    questions: list[Question],
    answers_file: Path,
    errors_file: Path,
    answered: set[str],
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> None:
    """Answer the questions; where a call fails, halve what is left until the questions at fault stand alone."""
    failed_since_answer: set[Any] = set()
    todo = [questions] if questions else []
    while todo:
        part = todo.pop()

        def on_answers(
            indices: Sequence[int], answers: Sequence[Any], part: list[Question] = part
        ) -> None:
            for index, answer in zip(indices, answers, strict=True):
                row = {
                    "question_id": part[index].id,
                    "text": answer.text,
                    "num_tokens": answer.num_tokens,
                    "finished": answer.finished,
                }
                append_line(answers_file, row)
                answered.add(part[index].id)
            advance(len(indices))

        try:
            pairs = [(question.image, question.text) for question in part]
            assistant.answer_many(
                pairs, max_new_tokens=max_new_tokens, batch_size=batch_size, on_answers=on_answers
            )
        except Exception as error:  # of any kind: a broken picture, full memory, a crash; it is written down, never answered for
            # Pillow's OSError for a broken picture has no number; that of a full disk has one.
            if (
                isinstance(error, OSError)
                and not isinstance(error, FileNotFoundError)
                and error.errno is not None
            ):
                raise
            left = [question for question in part if question.id not in answered]
            if len(left) < len(part):
                failed_since_answer.clear()
            if len(left) > 1:
                todo += [left[len(left) // 2 :], left[: len(left) // 2]]
            elif left:
                append_line(
                    errors_file,
                    {"question_id": left[0].id, "error": f"{type(error).__name__}: {error}"},
                )
                advance(1)
                failed_since_answer.add(left[0].image or left[0].id)
                if len(failed_since_answer) == MOST_FAILURES_IN_A_ROW:
                    many = f"questions on {MOST_FAILURES_IN_A_ROW} pictures in a row failed"
                    raise ValueError(f"{many}, the last ({left[0].id}) with: {error}") from error
            else:
                raise
        else:
            failed_since_answer.clear()


@contextmanager
def _bar(name: str, total: int, done: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields a function that moves it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(name, total=total, completed=done, speed="")

        def advance(count: int) -> None:
            bar.advance(task, count)
            speed = bar.tasks[0].speed
            bar.update(task, speed=f"{speed:.1f} questions/s" if speed else "")

        yield advance
