"""A server that speaks OpenAI's chat completions: one request, until it is answered or cannot be.

messages --ChatServer.complete--> Completion

judge.py       asks a judge, one prompt at a time
endpoint.py    asks a model, many questions at once

What is no answer is an error, of one of three kinds:

    RequestRefused     this request fails, others may be answered
    WrongServer        no request will be answered: URL, key or model are wrong
    ConnectionError    the server is down, or limits requests for too long

Redirects are not followed, because they would carry the key to another host.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage
from socket import gaierror
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

TRIES = 6
"""Requests for one reply: with the pauses between them half a minute of trouble is waited out."""

TIMEOUTS = 2
"""Requests for one reply that may go without an answer for the whole of the time limit."""

LONGEST_WAIT = 600.0
"""Seconds that a rate limit is waited out; a longer one ends the command."""

_LONGEST_REFUSAL = 10_000
_LONGEST_SHOWN = 200
"""Bytes of a refusal that are read, and characters of it that an error shows."""

_LIMITS = ("max_tokens", "max_completion_tokens")
"""Names of the longest reply in requests, in the order in which they are tried."""

_NOT_FREE = ("model", "messages", "stream", "n")
_VERSION = re.compile(r"[-:@](latest|v?\d[\d.\-]*)")
"""What a server adds to a name that has versions, as in gpt-4o-2024-08-06 or llava:latest."""


class RequestRefused(ValueError):
    """A request that is not answered, while others may be."""


class WrongServer(ValueError):
    """A server that cannot answer any request as it is asked: its URL, key or model is wrong."""


class _MalformedError(Exception):
    """A server finds a request malformed; `said` is its whole message."""

    def __init__(self, trouble: str, said: str) -> None:
        super().__init__(trouble)
        self.said = said


@dataclass(frozen=True)
class Completion:
    """A reply.

    Args:
        text: Text, verbatim; empty where the model says nothing.
        is_cut: The server ended it at the limit of its tokens.
        num_tokens: Tokens of the reply; None where the server does not say.
        model: Name of the model as the server gives it; None where it gives none.
    """

    text: str
    is_cut: bool
    num_tokens: int | None
    model: str | None


class ChatServer:
    """One model of a server; several threads may ask at a time.

    Servers differ in what a request may hold. Where one refuses a request and names the limit or
    the temperature, the request is repeated with the limit's other name, or without the field, and
    so are all later ones. `request` sets fields beforehand.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        role: str,
        option: str,
        api_key: str | None = None,
        request: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        pause: float = 1.0,
        checks_name: bool = False,
    ) -> None:
        """Prepare the server; nothing is sent.

        Args:
            base_url: URL before `/chat/completions`, such as `http://localhost:8000/v1`.
            model: Name of the model on the server.
            role: What messages call the server, such as `judge`.
            option: Option of the command line that sets fields of its requests.
            api_key: Key, sent as a bearer token.
            request: Fields of every request, which replace those of `complete`; a field that is
                None is left out.
            timeout: Seconds to wait for one reply.
            pause: Seconds before the second request for a reply; doubles with each further one.
            checks_name: Refuse replies that name another model.

        Raises:
            ValueError: The URL is not of the web, a field belongs to `complete`, or the key cannot
                be sent.
        """
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"the {role}'s URL {base_url!r} does not start with http:// or https://: "
                "give one like http://localhost:8000/v1"
            )
        self.request = dict(request or {})
        for name in _NOT_FREE:
            if name in self.request:
                raise ValueError(
                    f"the field {name} of the {role}'s request is not free: leave it out of "
                    f"{option}"
                )
        api_key = (api_key or "").strip()  # a file of a key ends in a newline
        if not (api_key.isascii() and api_key.isprintable()):
            raise ValueError(
                f"the {role}'s key holds a character that no header can hold, such as a line break "
                "or a letter beyond ASCII: copy the key again"
            )
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model = model
        self.refused: dict[str, str | None] = {}
        """Fields that the server refused, each with the name that took its place."""
        self._role, self._option, self._checks_name = role, option, checks_name
        self._timeout, self._pause, self._key = timeout, pause, api_key
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._opener = build_opener(_NoRedirects)

        # Shared by the threads: how many replies there were, and until when all of them wait.
        self._lock = threading.Lock()
        self._num_replies = 0
        self._hold_until = 0.0

    def complete(
        self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Completion:
        """Return the server's reply, to a request that the server takes.

        Args:
            messages: The conversation, as the interface has it.
            settings: Further fields, `max_tokens` and `temperature` among them.

        Raises:
            RequestRefused: The server refuses this request, has no choice in its reply, or answers
                others but not this one.
            WrongServer: The server redirects, refuses the key, has no such model, or answers in
                another format or as another model.
            ConnectionError: No reply after several requests, or a rate limit that lasts too long.
        """
        while True:
            body = {"model": self.model, "messages": messages, **self._adapt(settings)}
            try:
                return self._send(body)
            except _MalformedError as error:
                if not self._give_up_field(error.said, body):
                    raise RequestRefused(
                        f"the {self._role} at {self.url} refuses ({error}): check URL, model "
                        f"{self.model!r}, key and {self._option}"
                    ) from error

    def _adapt(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings under the names that the server takes, then the user's."""
        fields: dict[str, Any] = {}
        for name, value in settings.items():
            # A refused name leads to the next one, which may have been refused as well.
            taken: str | None = name
            while taken in self.refused:
                taken = self.refused[taken]
            if taken is not None:
                fields[taken] = value

        # The user's limit replaces the other one, whatever the two are called.
        if any(name in self.request for name in _LIMITS):
            fields = {name: value for name, value in fields.items() if name not in _LIMITS}
        fields |= self.request
        return {name: value for name, value in fields.items() if value is not None}

    def _give_up_field(self, said: str, body: Mapping[str, Any]) -> bool:
        """Remember the field that a refusal names; return whether there is one."""
        for name in (*_LIMITS, "temperature"):
            if name in body and name not in self.request and re.search(rf"\b{name}\b", said):
                self.refused[name] = _LIMITS[1] if name == _LIMITS[0] else None
                return True
        return False

    def _send(self, body: Mapping[str, Any]) -> Completion:
        """Send a request until it is answered, or there is no sense in sending it again."""
        request = Request(self.url, json.dumps(body).encode(), self._headers)
        num_tries = num_timeouts = 0
        replies, is_there = self._num_replies, True

        while True:
            time.sleep(max(0.0, self._hold_until - time.monotonic()))
            wait = None
            try:
                with self._opener.open(request, timeout=self._timeout) as answer:
                    reply = self._read(answer.read())
                with self._lock:
                    self._num_replies += 1
                return reply
            except HTTPError as error:
                said = error.read(_LONGEST_REFUSAL).decode(errors="replace") or str(error.reason)
                shown = _message(said)[:_LONGEST_SHOWN]
                trouble = self._without_key(f"HTTP {error.code}, {shown}")
                self._raise_if_final(error, trouble, said)
                wait, is_there = _seconds_to_wait(error.headers), True
                # As long as others are answered, a rate limit only means that it is not our turn.
                if error.code == 429 and self._num_replies > replies:
                    num_tries, replies = 0, self._num_replies
            except (OSError, HTTPException) as error:
                cause = getattr(error, "reason", error)  # of an error that urllib wraps
                trouble = str(cause) or type(cause).__name__
                num_timeouts += isinstance(cause, TimeoutError)
                is_there = not isinstance(cause, (ConnectionRefusedError, gaierror))

            num_tries += 1
            if num_tries == TRIES or num_timeouts == TIMEOUTS:
                sentence = (
                    f"no reply from the {self._role} at {self.url} in {num_tries} tries ({trouble})"
                )
                if is_there and self._num_replies:
                    raise RequestRefused(f"{sentence}, though it answers others")
                raise ConnectionError(f"{sentence}: run the same command again to go on")
            self._hold(num_tries, wait, trouble)

    def _raise_if_final(self, error: HTTPError, trouble: str, said: str) -> None:
        """Raise where a request that is sent again would be refused again.

        Only "too many requests" and a server's own failures may pass with time.
        """
        if error.code in (400, 422):
            raise _MalformedError(trouble, said) from error
        if 300 <= error.code < 400:
            to = error.headers.get("Location", "nowhere")
            raise WrongServer(
                f"the {self._role} at {self.url} redirects to {to}: give that URL, "
                "because a redirect would carry the key to another host"
            ) from error
        if error.code == 413:
            raise RequestRefused(
                f"the {self._role} at {self.url} refuses ({trouble}): make the image smaller"
            ) from error
        if error.code not in (408, 409, 425, 429) and error.code < 500:
            raise WrongServer(
                f"the {self._role} at {self.url} refuses ({trouble}): "
                f"check URL, model {self.model!r} and key"
            ) from error

    def _hold(self, num_tries: int, wait: float | None, trouble: str) -> None:
        """Pause before the next try; where the server says how long, all threads do."""
        if wait is None:
            time.sleep(self._pause * 2 ** (num_tries - 1))
            return
        if wait > LONGEST_WAIT:
            raise ConnectionError(
                f"the {self._role} at {self.url} takes no request for {wait:,.0f} seconds "
                f"({trouble}): run the same command again then, to go on"
            )
        with self._lock:
            self._hold_until = max(self._hold_until, time.monotonic() + wait)

    def _read(self, answer: bytes) -> Completion:
        """Return what a body of status 200 says, if it is a reply of this model."""
        try:
            content = json.loads(answer)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise WrongServer(
                f"{self.url} does not answer as chat completions do ({answer[:80]!r}): "
                "check the URL"
            )
        if content.get("error"):
            said = self._without_key(_message(answer)[:_LONGEST_SHOWN])
            raise RequestRefused(f"the {self._role} at {self.url} answers with an error ({said})")

        try:
            choice = content["choices"][0]
            text = _text_of(choice["message"]["content"])
            reason = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError) as error:
            raise RequestRefused(
                f"{self.url} does not answer as chat completions do ({answer[:80]!r}): "
                "check the URL"
            ) from error
        if reason == "content_filter":
            raise RequestRefused(f"a filter of the {self._role} at {self.url} kept its answer back")

        model = content.get("model")
        if self._checks_name and model and not is_same_model(self.model, str(model)):
            raise WrongServer(
                f"the {self._role} at {self.url} answers as {str(model)!r}, not {self.model!r}: "
                "name the model that is meant with --model"
            )
        usage = content.get("usage")
        num_tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return Completion(text, reason == "length", num_tokens, model and str(model))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _NoRedirects(HTTPRedirectHandler):
    """Makes a redirect the error of its status."""

    def redirect_request(self, *_: object) -> None:
        return None


def is_same_model(asked: str, answered: str) -> bool:
    """Return whether a reply's name is that of the model that was asked.

    It may have a folder, an owner or a suffix less or more, and a version behind it.
    """
    names = [name.casefold().removesuffix(".gguf") for name in (asked, answered)]
    if names[0] == names[1]:
        return True
    wanted, given = (name.rpartition("/")[2] for name in names)
    return given == wanted or (
        given.startswith(wanted) and _VERSION.fullmatch(given[len(wanted) :]) is not None
    )


def describe_refused(role: str, refused: Mapping[str, str | None]) -> list[str]:
    """Return a sentence for each field that a server refused; see `ChatServer.refused`."""
    return [
        f"the {role}'s server refused {name}: "
        + (f"{other} was sent instead" if other else "it was left out")
        for name, other in refused.items()
    ]


def _text_of(content: Any) -> str:
    """Return what a message says. A model may say nothing (None): who asked judges that.

    Some servers send parts of several types. Those that are not of text, such as the part in which
    a model thinks, are no part of its reply.

    Raises:
        KeyError: A part has no type, or a text none.
        TypeError: The content is no text and no list of parts.

    Source: Mistral's chat completions, chunks of types `text` and `thinking`.
    """
    if content is None:
        return ""
    if isinstance(content, list):
        content = "".join([part["text"] for part in content if part["type"] == "text"])
    if not isinstance(content, str):
        raise TypeError(f"a content of type {type(content).__name__}")
    return content


def _message(said: str | bytes) -> str:
    """Return the message of an error in the interface's form; any other text as it is."""
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return said if isinstance(said, str) else said.decode(errors="replace")


def _seconds_to_wait(headers: HTTPMessage) -> float | None:
    """Return the seconds of a Retry-After, which is a number or a date; None without one."""
    value = (headers.get("Retry-After") or "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (until.astimezone(UTC) - datetime.now(UTC)).total_seconds())
