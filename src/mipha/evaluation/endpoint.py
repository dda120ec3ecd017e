"""A model behind a server that speaks OpenAI's chat completions: it answers as `Assistant` does.

questions --threads--> ChatServer.complete --as they come--> on_answers

The prompt is the benchmark's, and the image is the file's own bytes. Servers commonly read JPEG,
PNG, WebP and GIF; an image in another format is sent as PNG.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from PIL import Image

from mipha.data.images import ImageSource, upright_rgb
from mipha.data.sample import Message, as_requested
from mipha.evaluation.chat_completions import ChatServer, WrongServer
from mipha.evaluation.predict import MOST_FAILURES_IN_A_ROW, FailedQuestions

REQUEST_OPTION = "--request"
"""Option of the command line that sets fields of the requests."""

_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
"""Formats that are sent as they are."""


@dataclass(frozen=True)
class EndpointAnswer:
    """The answer of a server's model.

    Args:
        text: Text, stripped.
        num_tokens: Tokens generated; None where the server does not say.
        finished: Whether the model ended its turn; False where a limit cut it off.
        asked_sha256: Hash of what was asked: messages with the bytes of the image, and settings.
    """

    text: str
    num_tokens: int | None
    finished: bool
    asked_sha256: str


class EndpointModel:
    """A model behind a server, asked many questions at a time, greedily."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        request: Mapping[str, Any] | None = None,
        parallel: int = 8,
        timeout: float = 600.0,
        pause: float = 1.0,
    ) -> None:
        """Prepare the endpoint; nothing is sent.

        Args:
            base_url: URL before `/chat/completions`, such as `http://localhost:8000/v1`.
            model: Name of the model on the server.
            api_key: Key, sent as a bearer token.
            request: Fields of every request, which replace ours; a field that is None is left out.
            parallel: Requests at a time.
            timeout: Seconds to wait for one answer.
            pause: Seconds before the second request for an answer; doubles with each further one.

        Raises:
            ValueError: The URL is not of the web, a field is not free, or `parallel` is below 1.
        """
        if parallel < 1:
            raise ValueError(f"--parallel is {parallel}: give 1 or more")
        self._server = ChatServer(
            base_url,
            model,
            role="endpoint",
            option=REQUEST_OPTION,
            api_key=api_key,
            request=request,
            timeout=timeout,
            pause=pause,
            checks_name=True,
        )
        self._parallel = parallel

    @property
    def sha256(self) -> str:
        """Hash of what decides the answers: name and fields of the request.

        The address does not count, because a server may move while it is asked.
        """
        told = {"model": self._server.model, "request": self._server.request}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def about(self) -> dict[str, Any]:
        """What scores.json says about the model."""
        return {
            "endpoint": self._server.url.removesuffix("/chat/completions"),
            "model": self._server.model,
            "request": self._server.request,
            "refused": self._server.refused,
        }

    def answer_many(
        self,
        pairs: Sequence[tuple[ImageSource | Sequence[ImageSource] | None, str | Sequence[Message]]],
        *,
        max_new_tokens: int = 256,
        batch_size: int = 0,
        on_answers: Callable[[list[int], list[EndpointAnswer]], None] | None = None,
    ) -> list[EndpointAnswer]:
        """Answer many questions, several at a time.

        Args:
            pairs: (image, question), in any order. A tuple of images shows all of them, in front of
                the question; a conversation has a marker for each of its images.
            max_new_tokens: Longest answer, in tokens.
            batch_size: Without meaning here: every question is a request.
            on_answers: Callback of every answer, in the caller's thread; takes its position in
                `pairs` and the answer.

        Returns:
            Answers in the order of `pairs`.

        Raises:
            FailedQuestions: Questions were refused, or their images cannot be read; all others
                were asked, unless so many failed in a row that it is no fault of theirs.
            WrongServer, ConnectionError: See `ChatServer`; raised at once.
        """
        todo: SimpleQueue[int] = SimpleQueue()
        for index in range(len(pairs)):
            todo.put(index)
        done: SimpleQueue[tuple[int, EndpointAnswer | Exception]] = SimpleQueue()
        stopped = Event()

        def work() -> None:
            while not stopped.is_set():
                try:
                    index = todo.get_nowait()
                except Empty:
                    return
                try:
                    done.put((index, self._ask(*pairs[index], max_new_tokens)))
                except Exception as error:  # told below: nobody sees a thread's
                    if isinstance(error, (WrongServer, ConnectionError)):
                        stopped.set()
                    done.put((index, error))

        # Threads that end with the program: who presses Ctrl-C does not wait for a slow server.
        for _ in range(min(self._parallel, len(pairs))):
            Thread(target=work, daemon=True).start()

        answers: dict[int, EndpointAnswer] = {}
        failures: dict[int, Exception] = {}
        num_in_a_row = 0
        try:
            while len(answers) + len(failures) < len(pairs):
                index, found = done.get()
                if isinstance(found, EndpointAnswer):
                    answers[index], num_in_a_row = found, 0
                    if on_answers:
                        on_answers([index], [found])
                elif isinstance(found, (WrongServer, ConnectionError)):
                    raise found
                else:
                    failures[index], num_in_a_row = found, num_in_a_row + 1
                    if num_in_a_row == MOST_FAILURES_IN_A_ROW:
                        break
        finally:
            stopped.set()
        if failures:
            raise FailedQuestions(failures)
        return [answers[index] for index in range(len(pairs))]

    def _ask(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        question: str | Sequence[Message],
        max_new_tokens: int,
    ) -> EndpointAnswer:
        messages = as_requested(question, [data_uri(one) for one in as_images(image)])
        settings = {"temperature": 0, "max_tokens": max_new_tokens}

        reply = self._server.complete(messages, settings)
        asked = json.dumps([messages, settings, self._server.request], sort_keys=True)
        return EndpointAnswer(
            text=reply.text.strip(),
            num_tokens=reply.num_tokens,
            finished=not reply.is_cut,
            asked_sha256=hashlib.sha256(asked.encode()).hexdigest(),
        )


def as_images(image: ImageSource | Sequence[ImageSource] | None) -> Sequence[ImageSource]:
    """Return the images of a question, which may be one, several or none."""
    if image is None:
        return ()
    return image if type(image) in (tuple, list) else (image,)  # type: ignore[return-value]


def data_uri(image: ImageSource) -> str:
    """Return an image as a data URI: the bytes of its file, or PNG where few servers read them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image.
    """
    if isinstance(image, Path) and not image.is_file():
        raise FileNotFoundError(f"no image file {image}: check the data's root")
    content = (
        image.read_bytes()
        if isinstance(image, Path)
        else image
        if isinstance(image, bytes)
        else image.read()
    )
    try:
        with Image.open(io.BytesIO(content)) as opened:
            kind = _FORMATS.get(opened.format or "")
    except (OSError, ValueError):
        kind = None
    if kind is None:
        # Also what is no image at all, which is then named.
        buffer = io.BytesIO()
        upright_rgb(image).save(buffer, format="PNG")
        kind, content = _FORMATS["PNG"], buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
