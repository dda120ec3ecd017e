"""Questions -> predictions.jsonl: ask once, never twice, and never take an error for an answer.

predictions.meta.json   checkpoint and prompts; a folder with others is refused
predictions.jsonl       {"question_id", "text", "num_tokens", "finished"}, appended as answers
                        arrive; in official order at the end. A model behind an endpoint adds
                        "asked_sha256", the hash of the request
errors.jsonl            {"question_id", "error"} of the last call's failures; the next call asks
                        these questions again

Several processes (torchrun) share the images. The first writes the files above, each other one
writes `*.rank<n>.jsonl` until `merge`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mipha.data.sample import Message
from mipha.evaluation.benchmark import Plan, Question
from mipha.evaluation.chat_completions import WrongServer
from mipha.evaluation.likelihoods import MeasuredTexts
from mipha.files import append_line, read_json_object, read_lines, write_whole

MOST_FAILURES_IN_A_ROW = 20
"""So many images that fail with no answer between them are a fault of the setup."""


class Asker(Protocol):
    """A model that answers questions about images; `Assistant` and `EndpointModel` are two."""

    def answer_many(
        self,
        pairs: Sequence[tuple[Any, str | Sequence[Message]]],
        *,
        max_new_tokens: int,
        batch_size: int,
        on_answers: Any,
    ) -> list[Any]: ...


@runtime_checkable
class LikelihoodModel(Protocol):
    """A model that says how likely texts are; `mipha.Assistant` is one."""

    def log_likelihoods(self, texts: Sequence[tuple[str, str]]) -> Sequence[tuple[float, int]]: ...


class FailedQuestions(Exception):
    """Questions that failed, by a model that knows which; it asked others all the same.

    Args:
        errors: Position of the question to its error.
    """

    def __init__(self, errors: Mapping[int, Exception]) -> None:
        super().__init__(f"{len(errors)} questions failed")
        self.errors = errors


def predict(
    assistant: Asker,
    plan: Plan,
    folder: Path,
    *,
    checkpoint_sha256: str,
    batch_size: int = 16,
    progress: bool = True,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Answer the questions that have no prediction in the folder yet.

    Args:
        assistant: The model, asked through `answer_many`.
        plan: The questions. The header's hash is over all of the split, so a limited run can be
            extended.
        folder: Place of the three files; made if missing.
        checkpoint_sha256: `fingerprint` of the model that the assistant runs.
        batch_size: Questions per forward pass.
        progress: Show a bar with questions/s and the time left.
        rank: Number of this process; it asks about every `num_ranks`-th image.
        num_ranks: Processes that ask. When all are done, one of them calls `merge`.

    Raises:
        ValueError: The folder's predictions are by another model or with other prompts; ids
            repeat; or everything fails.
    """
    if len({question.id for question in plan.questions}) != len(plan.questions):
        raise ValueError(f"benchmark {plan.name} gives some question id twice: make them unique")
    header = {
        "benchmark": plan.name,
        "checkpoint_sha256": checkpoint_sha256,
        "prompts_sha256": prompts_hash(plan.questions),
        "max_new_tokens": plan.benchmark.max_new_tokens,
    }
    _claim(folder, header)

    # This process's share, less what is answered.
    predictions = read_predictions(folder)
    share = _share(plan.asked, rank, num_ranks)
    left = [question for question in share if question.id not in predictions]
    errors_file = _file(folder, "errors", rank)
    errors_file.unlink(missing_ok=True)

    with _bar(plan.name, len(share), len(share) - len(left), progress and not rank) as advance:
        answering = _Answering(
            assistant=assistant,
            answers_file=_file(folder, "predictions", rank),
            errors_file=errors_file,
            max_new_tokens=plan.benchmark.max_new_tokens,
            batch_size=batch_size,
            advance=advance,
            by_likelihood=plan.benchmark.by_likelihood,
        )
        answering.answer(left)


def merge(folder: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Bring the files of all processes together, in the order of the questions.

    Returns:
        Question id to text of every prediction in the folder.
    """
    place = {question.id: number for number, question in enumerate(questions)}
    answered = read_predictions(folder)
    for name in ("predictions", "errors"):
        # A process of an earlier call may have left an error of a question answered since.
        files = sorted(folder.glob(f"{name}*.jsonl"))
        rows = {
            row["question_id"]: row
            for file in files
            for row in read_lines(file)
            if name == "predictions" or row["question_id"] not in answered
        }

        if rows:
            ordered = sorted(rows.values(), key=lambda row: place[row["question_id"]])
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
            write_whole(folder / f"{name}.jsonl", "".join(lines))
        for file in files:
            if file.name != f"{name}.jsonl":
                file.unlink()
    return answered


def read_predictions(folder: Path) -> dict[str, str]:
    """Return question id to text of every prediction in the folder, of all processes."""
    return {
        row["question_id"]: row["text"]
        for file in sorted(folder.glob("predictions*.jsonl"))
        for row in read_lines(file)
    }


def prompts_hash(questions: Sequence[Question]) -> str:
    """Return SHA-256 over ids, prompts and images; a path counts by its name, so data may move."""
    digest = hashlib.sha256()
    for question in questions:
        names = [
            hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else Path(str(image)).name
            for image in question.images
        ]
        shown = names if isinstance(question.image, tuple) else names[0] if names else None
        told: list[Any] = [question.id, question.text, shown]
        told += question.facts.get("continuations", ())
        if question.before:
            told.append([[turn.role, turn.text] for turn in question.before])
        digest.update(json.dumps(told).encode() + b"\n")
    return digest.hexdigest()


def fingerprint(model: Path) -> str:
    """Return SHA-256 over a model folder: weights, configuration, tokenizer, template.

    README and results do not count.

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

    return files_hash(files)


def files_hash(files: Sequence[Path]) -> str:
    """Return SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(f"{path.name} {_file_hash(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def asked_hash(folder: Path) -> str | None:
    """Return SHA-256 over the requests of all predictions; None where there were no requests."""
    asked = {
        row["question_id"]: row["asked_sha256"]
        for row in read_lines(folder / "predictions.jsonl")
        if "asked_sha256" in row
    }
    content = json.dumps(sorted(asked.items()), ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest() if asked else None


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, changed: int) -> str:
    """Return a file's SHA-256; size and time are for the cache: a new version is read anew."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _claim(folder: Path, header: dict[str, Any]) -> None:
    """Write the folder's header, or check that it says the same."""
    path = folder / "predictions.meta.json"
    has_predictions = any(folder.glob("predictions*.jsonl"))
    if not path.is_file() or not has_predictions:
        if has_predictions:
            raise ValueError(
                f"{folder} has predictions but no {path.name}, so nobody knows whose they are: "
                "delete that folder"
            )
        write_whole(path, json.dumps(header, indent=2) + "\n")
        return

    old = read_json_object(path, fix="delete that folder")
    if differing := [key for key in header if old.get(key) != header[key]]:
        key = differing[0]
        whose = {"checkpoint_sha256": "another model", "prompts_sha256": "other prompts"}
        what = whose.get(key, f"{key}={old.get(key)} (now {header[key]})")
        raise ValueError(
            f"the predictions in {folder} were made with {what}: "
            "delete that folder to ask again, or write to another one"
        )


def _file(folder: Path, name: str, rank: int) -> Path:
    """Return the file of one process."""
    return folder / (f"{name}.rank{rank}.jsonl" if rank else f"{name}.jsonl")


def _share(questions: Sequence[Question], rank: int, num_ranks: int) -> list[Question]:
    """Return the questions about every `num_ranks`-th image.

    Those of one image stay together, so that it is encoded once.
    """
    numbers: dict[Any, int] = {}
    keys = [question.id if question.image is None else question.image for question in questions]
    return [
        question
        for question, key in zip(questions, keys, strict=True)
        if numbers.setdefault(key, len(numbers)) % num_ranks == rank
    ]


@dataclass
class _Answering:
    """One process at work on its share.

    Args:
        assistant: The model.
        answers_file: File that answers are appended to.
        errors_file: File that failures are appended to.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Questions per forward pass.
        advance: Moves the bar by a number of questions.
        by_likelihood: The model gives likelihoods of texts instead of answers.
        answered: Ids with an answer by this call.
        failed_since_answer: Images (or ids without one) that failed since the last answer.
    """

    assistant: Asker
    answers_file: Path
    errors_file: Path
    max_new_tokens: int
    batch_size: int
    advance: Callable[[int], None]
    by_likelihood: bool = False
    answered: set[str] = field(default_factory=set)
    failed_since_answer: set[Any] = field(default_factory=set)

    def answer(self, questions: list[Question]) -> None:
        """Answer the questions; halve what is left where a call fails, until faults stand alone."""
        todo = [questions] if questions else []
        while todo:
            part = todo.pop()
            try:
                self._answer_part(part)
                self.failed_since_answer.clear()
            except FailedQuestions as found:
                if any(question.id in self.answered for question in part):
                    self.failed_since_answer.clear()
                for index, error in found.errors.items():
                    self._note_failure(part[index], error)
                failed = {part[index].id for index in found.errors}
                left = [one for one in part if one.id not in self.answered | failed]
                todo += [left] if left else []
            # An error of any kind: a broken image, full memory, a crash. It becomes a line of
            # errors.jsonl, never an answer.
            except Exception as error:
                if _is_system_error(error):
                    raise

                left = [question for question in part if question.id not in self.answered]
                if len(left) < len(part):
                    self.failed_since_answer.clear()

                # Halve, or blame the one that is left.
                if len(left) > 1:
                    todo += [left[len(left) // 2 :], left[: len(left) // 2]]
                elif left:
                    self._note_failure(left[0], error)
                else:
                    raise

    def _answer_part(self, part: list[Question]) -> None:
        """Ask about some questions, and write each answer as it arrives."""

        def write(indices: Sequence[int], answers: Sequence[Any]) -> None:
            for index, answer in zip(indices, answers, strict=True):
                row = {
                    "question_id": part[index].id,
                    "text": answer.text,
                    "num_tokens": answer.num_tokens,
                    "finished": answer.finished,
                }
                if asked := getattr(answer, "asked_sha256", None):
                    row["asked_sha256"] = asked
                append_line(self.answers_file, row)
                self.answered.add(part[index].id)
            self.advance(len(indices))

        if self.by_likelihood:
            for index, question in enumerate(part):
                write([index], [self._measure(question)])
            return
        self.assistant.answer_many(
            [(question.image, question.asked) for question in part],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            on_answers=write,
        )

    def _measure(self, question: Question) -> MeasuredTexts:
        """Return the likelihoods of a question's continuations."""
        assert isinstance(self.assistant, LikelihoodModel), "evaluate() refuses other subjects"
        texts = [(question.text, text) for text in question.facts["continuations"]]
        return MeasuredTexts(self.assistant.log_likelihoods(texts))

    def _note_failure(self, question: Question, error: Exception) -> None:
        """Write down the error of one question; raise where nothing works any more."""
        row = {"question_id": question.id, "error": f"{type(error).__name__}: {error}"}
        append_line(self.errors_file, row)
        self.advance(1)
        self.failed_since_answer.add(question.image or question.id)
        if len(self.failed_since_answer) == MOST_FAILURES_IN_A_ROW:
            many = f"questions on {MOST_FAILURES_IN_A_ROW} images in a row failed"
            raise ValueError(f"{many}, the last ({question.id}) with: {error}") from error


def _is_system_error(error: Exception) -> bool:
    """Return whether an error is the machine's or the server's, and not the image's.

    Pillow's OSError for a broken image has no number; that of a full disk has one.
    """
    if isinstance(error, (WrongServer, ConnectionError)):
        return True
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
        return False
    return error.errno is not None


@contextmanager
def _bar(name: str, total: int, done: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr; yield a function that moves it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from mipha.terminal import Console

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
