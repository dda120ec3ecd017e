"""Judges: a language model behind an OpenAI-compatible server, or recorded replies.

A file of replies has a JSON line per reply or per run. `responses` are the judge's replies to its
tries in order; `text` is its reply to every try. A line that an endpoint recorded also names its
try and its prompt:

    {"question_id": "v1_0", "run": 0, "responses": ["about half", "0.5"]}
    {"question_id": "1000003", "text": "B"}
    {"question_id": "v1_0", "run": 0, "attempt": 1, "responses": ["0.5"],
     "model": "gpt-4-0613", "prompt_sha256": "..."}
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from mipha.evaluation.files import OfficialRecord, QuestionId, read_record
from mipha.files import append_line, read_json_lines, read_lines

TRIES = 6
"""Requests for one reply: with the pauses between them half a minute of trouble is waited out."""

_Place = tuple[str, int, int | None]
"""Question id, run, and try; None for a reply to every try."""


class _Line(OfficialRecord):
    """A line of a file of replies."""

    question_id: QuestionId
    run: int = 0
    attempt: int = 0
    responses: list[str | None] | None = None
    text: str | None = None
    prompt_sha256: str | None = None


class Replay:
    """Recorded replies that stand in for a judge, so that a judged score can be made again."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Args:
            path: JSON lines, see the module.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A malformed line, or two replies for one place: names file and line.
        """
        self.path = path
        self._replies: dict[_Place, dict[str | None, str]] = {}
        for number, row in read_json_lines(path):
            for place, prompt_sha256, reply in _entries(row, f"{path} line {number}"):
                known = self._replies.setdefault(place, {})
                if prompt_sha256 in known:
                    raise ValueError(
                        f"{path} line {number} is a second reply for question {place[0]}: "
                        "keep one judge's replies in a file"
                    )
                known[prompt_sha256] = reply
        # Some files count runs from 1.
        self._runs = sorted({run for _, run, attempt in self._replies if attempt is not None})

    @property
    def num_runs(self) -> int | None:
        """Return how many runs were recorded; None where replies belong to no run."""
        return len(self._runs) or None

    def ask(
        self,
        question_id: str,
        prompt: str,
        *,
        run: int = 0,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 16,
    ) -> str:
        """Return the recorded reply.

        Raises:
            ValueError: There is none, or it is the reply to another prompt.
        """
        recorded = self._runs[run] if run < len(self._runs) else run
        known = self._replies.get((question_id, recorded, attempt))
        known = known or self._replies.get((question_id, 0, None), {})

        for prompt_sha256 in (_digest(prompt), None):
            if prompt_sha256 in known:
                return known[prompt_sha256]
        if known:
            raise ValueError(
                f"{self.path} has replies for question {question_id}, but to other prompts: "
                "give the replies to these answers"
            )
        raise ValueError(
            f"{self.path} has no reply for question {question_id} (run {recorded}, "
            f"try {attempt + 1}): add it, or ask a judge"
        )


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
        timeout: float = 120.0,
        pause: float = 1.0,
    ) -> None:
        """Prepare the endpoint; recorded replies of this model to the same prompts are used again.

        Args:
            base_url: URL before `/chat/completions`, such as `http://localhost:8000/v1`.
            model: Name of the model on the server.
            api_key: Key, sent as a bearer token.
            record: File that every reply is appended to at once; `Replay` reads it.
            timeout: Seconds to wait for one reply.
            pause: Seconds before the second request of a reply; doubles with each further one.

        Raises:
            ValueError: The URL is not of the web, or the record is malformed.
        """
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"the judge's URL {base_url!r} does not start with http:// or https://: "
                "give one like http://localhost:8000/v1"
            )
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.record = model, record
        self._timeout, self._pause = timeout, pause
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )

        # Replies that an earlier call recorded.
        self._known: dict[tuple[_Place, str | None], str] = {}
        for row in read_lines(record) if record else ():
            if row.get("model") == model:
                self._known |= {
                    (place, sha256): reply for place, sha256, reply in _entries(row, str(record))
                }

    def ask(
        self,
        question_id: str,
        prompt: str,
        *,
        run: int = 0,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 16,
    ) -> str:
        """Return the recorded reply, or a new one, which is recorded before it is used.

        Raises:
            ConnectionError: No reply after several requests.
            ValueError: The server refuses the request, or answers in another format.
        """
        prompt_sha256 = _digest(prompt)
        key = ((question_id, run, attempt), prompt_sha256)
        if key not in self._known:
            body = {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": temperature,
                "max_tokens": max_tokens,
            }
            reply = self._request(body)

            if self.record is not None:
                line = {
                    "question_id": question_id,
                    "run": run,
                    "attempt": attempt,
                    "responses": [reply],
                    "model": self.model,
                    "prompt_sha256": prompt_sha256,
                }
                append_line(self.record, line)
            self._known[key] = reply
        return self._known[key]

    def _request(self, body: dict[str, Any]) -> str:
        request = Request(self.url, json.dumps(body).encode(), self._headers)
        trouble = ""

        for number in range(TRIES):
            time.sleep(self._pause * 2 ** (number - 1) if number else 0)
            try:
                with urlopen(request, timeout=self._timeout) as answer:
                    return self._content(answer.read())
            except HTTPError as error:
                said = error.read(200).decode(errors="replace") or error.reason
                trouble = f"HTTP {error.code}, {said}"
                # Only "too many requests" and a server's own failures may pass with time.
                if error.code != 429 and error.code < 500:
                    raise ValueError(
                        f"the judge at {self.url} refuses ({trouble}): "
                        f"check URL, model {self.model!r} and key"
                    ) from error
            except (OSError, HTTPException) as error:
                trouble = str(error) or type(error).__name__

        raise ConnectionError(
            f"no reply from the judge at {self.url} in {TRIES} tries ({trouble}): "
            "run the same command again to go on"
        )

    def _content(self, answer: bytes) -> str:
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.url} does not answer as chat completions do ({answer[:80]!r}): "
                "check the URL"
            ) from error
        # A model may say nothing (None): that is a reply, and the benchmark finds it unreadable.
        return "" if content is None else str(content)


def _entries(row: dict[str, Any], where: str) -> Iterator[tuple[_Place, str | None, str]]:
    """Yield place, hash of the prompt or None, and reply, of one line."""
    line = read_record(_Line, row, where, fix="fix that line")
    if line.responses is not None:
        for attempt, reply in enumerate(line.responses, start=line.attempt):
            yield (line.question_id, line.run, attempt), line.prompt_sha256, reply or ""
    elif line.text is not None:
        yield (line.question_id, 0, None), line.prompt_sha256, line.text
    else:
        raise ValueError(
            f'{where} has neither "responses", a list of texts, nor "text": fix that line'
        )


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
