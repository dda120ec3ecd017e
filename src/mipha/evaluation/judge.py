"""Judges: a language model behind an OpenAI-compatible server, or recorded replies.

A file of replies has a JSON line per reply or per run. `responses` are the judge's replies to its
tries in order; `text` is its reply to every try. A line that an endpoint recorded also names its
try and its prompt, whether the server cut the reply at its limit, the fields that the user set in
the request, and the fields that the server refused, each with the name that took its place. Where
no reply to a question could be read, a line voids them, and the next call asks again:

    {"question_id": "v1_0", "run": 0, "responses": ["about half", "0.5"]}
    {"question_id": "1000003", "text": "B"}
    {"question_id": "v1_0", "run": 0, "attempt": 1, "responses": ["0.5"],
     "model": "gpt-4-0613", "prompt_sha256": "...", "cut": false,
     "request": {"reasoning_effort": "low"}, "refused": {"max_tokens": "max_completion_tokens"}}
    {"question_id": "v1_0", "run": 0, "model": "gpt-4-0613", "unread": true}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from mipha.evaluation.benchmark import Judge, Question, Reply
from mipha.evaluation.chat_completions import ChatServer, describe_refused
from mipha.evaluation.files import OfficialRecord, QuestionId, read_record
from mipha.files import append_line, read_json_lines, read_lines

MOST_UNREAD_IN_A_ROW = 20
"""So many answers that cannot be judged, one after the other, are a fault of the judge."""

REQUEST_OPTION = "--judge-request"
"""Option of the command line that sets fields of a judge's request."""

_LONGEST_QUOTED = 60
"""Characters of a reply that an error shows."""

_TAG = r"(?:think|thinking|thought|reasoning)"
_BEGINS = rf"<{_TAG}(?:\s[^>]*)?>|\[THINK\]|◁think▷|<\|channel\|>(?!final\b)"
_ENDS = rf"</{_TAG}>|\[/THINK\]|◁/think▷|<\|channel\|>final\b.*?<\|message\|>"
"""Marks around the part in which a model thinks: a tag, or those of Mistral, Kimi and gpt-oss."""

_REASONING = re.compile(rf"(?:{_BEGINS}).*?(?:{_ENDS})", re.DOTALL | re.IGNORECASE)
_REASONING_BEGINS = re.compile(_BEGINS, re.IGNORECASE)
_REASONING_ENDS = re.compile(_ENDS, re.IGNORECASE)

_FIX = "fix that line"

Read = TypeVar("Read")
"""What a reply says, as a benchmark reads it."""

_Place = tuple[str, int, int | None]
"""Question id, run, and try; None for a reply to every try."""


class _Line(OfficialRecord):
    """A line of a file of replies."""

    question_id: QuestionId
    run: int = 0
    attempt: int = 0
    responses: list[str | None] | None = None
    text: str | None = None
    model: str | None = None
    prompt_sha256: str | None = None
    request: dict[str, Any] = Field(default_factory=dict)
    refused: dict[str, str | None] = Field(default_factory=dict)
    cut: bool = False
    unread: bool = False


@dataclass(frozen=True)
class _Recorded:
    """One reply, and how it was asked for."""

    reply: Reply
    model: str | None
    request: Mapping[str, Any]
    refused: Mapping[str, str | None]


def strip_reasoning(reply: str) -> str:
    """Return a judge's reply without the part in which it thinks.

    A part that begins and does not end takes the whole rest with it. One that ends and does not
    begin was opened by the chat template, so it takes everything before its end.
    """
    text = _REASONING.sub("", reply)
    text = _REASONING_BEGINS.split(text)[0]
    return _REASONING_ENDS.split(text)[-1]


def explain_unread(wanted: str, replies: Sequence[Reply]) -> str:
    """Return the sentence for replies that a grade or an option could not be read out of.

    Args:
        wanted: Name of what was looked for.
        replies: The judge's replies to all tries, in order.
    """
    first = replies[0]
    advice = f"use a judge that follows the prompt, or change its request with {REQUEST_OPTION}"
    if first.is_cut or not strip_reasoning(first).strip():
        advice = (
            "the judge says nothing, or its tokens end too early: give it more with "
            f"{REQUEST_OPTION} max_tokens=4096, or turn its thinking off"
        )
    return (
        f"no {wanted} can be read in {len(replies)} replies of the judge, the first being "
        f"{first[:_LONGEST_QUOTED]!r}: {advice}"
    )


def ask_each(
    questions: Sequence[Question], ask: Callable[[Question], Read], judge: Judge
) -> tuple[dict[str, Read], dict[str, str]]:
    """Ask a judge about every answer; one that it cannot judge fails, and is asked about anew.

    Args:
        questions: Questions whose answers are judged.
        ask: Asks about one, and returns what the reply says. It raises UnreadError where no reply
            can be read.
        judge: The judge that `ask` asks.

    Returns:
        Question id to what was read, and question id to the reason of a failure.

    Raises:
        ValueError: The replies to one answer after the other cannot be read.
    """
    read: dict[str, Read] = {}
    failed: dict[str, str] = {}
    num_in_a_row = 0
    for question in questions:
        try:
            read[question.id] = ask(question)
            num_in_a_row = 0
        except UnreadError as error:
            judge.forget(question.id)
            failed[question.id] = str(error)
            num_in_a_row += 1
            if num_in_a_row == MOST_UNREAD_IN_A_ROW:
                raise ValueError(
                    f"{MOST_UNREAD_IN_A_ROW} answers in a row were not judged, the last "
                    f"({question.id}) because {error}"
                ) from error
    return read, failed


class UnreadError(ValueError):
    """A judge was asked about an answer, and no reply could be read."""


class Replay:
    """Recorded replies that stand in for a judge, so that a judged score can be made again."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Args:
            path: JSON lines, see the module.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A malformed line, or two replies for one place: names file and line. A later
                reply of the same judge replaces one that could not be read, and one to a request
                with other fields.
        """
        self.path = path
        self._used: list[_Recorded] = []
        self._replies: dict[_Place, dict[str | None, _Recorded]] = {}
        voided: set[tuple[str, int]] = set()
        for number, row in read_json_lines(path):
            line = read_record(_Line, row, f"{path} line {number}", fix=_FIX)
            if line.unread:
                voided.add((line.question_id, line.run))
                continue
            for place, prompt_sha256, found in _entries(line, f"{path} line {number}"):
                known = self._replies.setdefault(place, {})
                before = known.get(prompt_sha256)
                asked_again = place[:2] in voided or (before and before.request != found.request)
                if before and (before.model != found.model or not asked_again):
                    raise ValueError(
                        f"{path} line {number} is a second reply for question {place[0]}: "
                        "keep one judge's replies in a file"
                    )
                known[prompt_sha256] = found
        # Some files count runs from 1.
        self._runs = sorted({run for _, run, attempt in self._replies if attempt is not None})

    @property
    def num_runs(self) -> int | None:
        """Return how many runs were recorded; None where replies belong to no run."""
        return len(self._runs) or None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on requests that differ from those of the protocol."""
        return _describe_requests(self._used)

    def ask(
        self,
        question_id: str,
        prompt: str,
        *,
        run: int = 0,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 16,
    ) -> Reply:
        """Return the recorded reply.

        Raises:
            ValueError: There is none, or it is the reply to another prompt.
        """
        recorded = self._runs[run] if run < len(self._runs) else run
        known = self._replies.get((question_id, recorded, attempt))
        known = known or self._replies.get((question_id, 0, None), {})

        for prompt_sha256 in (_digest(prompt), None):
            if prompt_sha256 in known:
                self._used.append(known[prompt_sha256])
                return known[prompt_sha256].reply
        if known:
            raise ValueError(
                f"{self.path} has replies for question {question_id}, but to other prompts: "
                "give the replies to these answers"
            )
        raise ValueError(
            f"{self.path} has no reply for question {question_id} (run {recorded}, "
            f"try {attempt + 1}): add it, or ask a judge"
        )

    def forget(self, question_id: str, run: int = 0) -> None:
        """Do nothing: what is recorded stays."""


class Endpoint:
    """A model behind a server that speaks OpenAI's chat completions, asked one prompt at a time."""

    num_runs: int | None = None
    """The benchmark decides."""

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        record: Path | None = None,
        request: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        pause: float = 1.0,
    ) -> None:
        """Prepare the endpoint; recorded replies of this model to the same requests are used again.

        Args:
            base_url: URL before `/chat/completions`, such as `http://localhost:8000/v1`.
            model: Name of the model on the server.
            api_key: Key, sent as a bearer token.
            record: File that every reply is appended to at once; `Replay` reads it.
            request: Fields of every request, which replace those of the benchmark; a field that is
                None is left out.
            timeout: Seconds to wait for one reply.
            pause: Seconds before the second request of a reply; doubles with each further one.

        Raises:
            ValueError: The URL is not of the web, a field belongs to the benchmark, or the record
                is malformed.
        """
        self._server = ChatServer(
            base_url,
            model,
            role="judge",
            option=REQUEST_OPTION,
            api_key=api_key,
            request=request,
            timeout=timeout,
            pause=pause,
        )
        self.model, self.record, self.request = model, record, self._server.request

        # Replies that an earlier call recorded.
        self._used: list[_Recorded] = []
        self._known: dict[tuple[_Place, str | None], _Recorded] = {}
        for row in read_lines(record) if record else ():
            if row.get("model") != model or row.get("request", {}) != self.request:
                continue
            line = read_record(_Line, row, str(record), fix=_FIX)
            if line.unread:
                self._drop(line.question_id, line.run)
                continue
            self._known |= {
                (place, sha256): found for place, sha256, found in _entries(line, str(record))
            }

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on requests that differ from those of the protocol."""
        return _describe_requests(self._used)

    def ask(
        self,
        question_id: str,
        prompt: str,
        *,
        run: int = 0,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 16,
    ) -> Reply:
        """Return the recorded reply, or a new one, which is recorded before it is used.

        Raises:
            ConnectionError: No reply after several requests.
            ValueError: The server refuses the request, or answers in another format.
        """
        prompt_sha256 = _digest(prompt)
        key = ((question_id, run, attempt), prompt_sha256)
        if key not in self._known:
            completion = self._server.complete(
                [{"role": "user", "content": prompt}],
                {"temperature": temperature, "max_tokens": max_tokens},
            )
            reply, refused = Reply(completion.text, completion.is_cut), self._server.refused
            line = {
                "question_id": question_id,
                "run": run,
                "attempt": attempt,
                "responses": [reply],
                "prompt_sha256": prompt_sha256,
                "cut": reply.is_cut,
            }
            self._append(line | ({"refused": refused} if refused else {}))
            self._known[key] = _Recorded(reply, self.model, self.request, dict(refused))
        self._used.append(self._known[key])
        return self._known[key].reply

    def forget(self, question_id: str, run: int = 0) -> None:
        """Void the replies to a question in a run, so that the next call asks again."""
        self._append({"question_id": question_id, "run": run, "unread": True})
        self._drop(question_id, run)

    def _append(self, line: Mapping[str, Any]) -> None:
        """Record a line with the model and the fields that the user set, if there is a record."""
        if self.record is not None:
            request = {"request": self.request} if self.request else {}
            append_line(self.record, {**line, "model": self.model, **request})

    def _drop(self, question_id: str, run: int) -> None:
        self._known = {
            key: found for key, found in self._known.items() if key[0][:2] != (question_id, run)
        }


def _entries(line: _Line, where: str) -> Iterator[tuple[_Place, str | None, _Recorded]]:
    """Yield place, hash of the prompt or None, and reply, of one line."""

    def recorded(text: str | None) -> _Recorded:
        return _Recorded(Reply(text or "", line.cut), line.model, line.request, line.refused)

    if line.responses is not None:
        for attempt, text in enumerate(line.responses, start=line.attempt):
            yield (line.question_id, line.run, attempt), line.prompt_sha256, recorded(text)
    elif line.text is not None:
        yield (line.question_id, 0, None), line.prompt_sha256, recorded(line.text)
    else:
        raise ValueError(f'{where} has neither "responses", a list of texts, nor "text": {_FIX}')


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def _describe_requests(used: list[_Recorded]) -> tuple[str, ...]:
    """Return a sentence for each field that the user set, or that the server refused."""
    sentences: dict[str, None] = {}
    for recorded in used:
        for name, value in recorded.request.items():
            sentences[
                f"{REQUEST_OPTION} set {name} to {json.dumps(value)} in the judge's request"
            ] = None
        sentences |= dict.fromkeys(describe_refused("judge", recorded.refused))
    return tuple(sentences)
