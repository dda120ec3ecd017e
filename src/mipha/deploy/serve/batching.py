"""The transformers engine: one thread owns the model and answers waiting requests in batches."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import replace
from threading import Condition, Thread

from mipha.assistant import Assistant, Prompt
from mipha.data.sample import Message, user_turn
from mipha.deploy.serve.engine import End, Piece, ServiceError
from mipha.deploy.serve.metrics import Metrics
from mipha.deploy.serve.requests import ChatRequest, RequestError
from mipha.models.decoding import AnswerText, Sampling
from mipha.rendering import ConversationRefused

_GATHER_SECONDS = 0.01
"""Time after the first request in which others join its batch; an answer takes far longer."""

_log = logging.getLogger(__name__)


class _Row:
    """One request on its way.

    Args:
        assistant: Assistant that answers it.
        prompt: What the model reads.
        make_text: Function that begins the text of the answer.
    """

    def __init__(
        self, assistant: Assistant, prompt: Prompt, make_text: Callable[[], AnswerText]
    ) -> None:
        self.assistant, self.prompt, self._make_text = assistant, prompt, make_text
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.left = False  # whether its reader has left
        self.ended = False  # whether its last piece was made
        self._made = ""
        self.restart()

    def restart(self) -> None:
        """Begin the answer again; text that was made already is not made twice."""
        self._text = self._make_text()
        self._repeated = self._made

    def add(self, token: int) -> Piece | None:
        """Return the next piece of the answer, if this token makes one.

        Raises:
            ValueError: An answer that was begun again became another one.
        """
        text = self._text.add(token)

        # Leave out what was made before the answer was begun again.
        again = min(len(text), len(self._repeated))
        if text[:again] != self._repeated[:again]:
            raise ValueError("an answer that was begun again became another one")
        text, self._repeated = text[again:], self._repeated[again:]
        self._made += text

        if self._text.reason:
            self.ended = True
            end = End(self._text.reason, len(self.prompt.ids), self._text.num_tokens)
            return Piece(text, end)
        return Piece(text) if text else None


class TransformersEngine:
    """Dynamic batching over an `Assistant`.

    A batch is answered to its end before the next one begins; each answer ends by itself, whether
    its neighbours are done or not. Where a batch fails, each of its requests is answered again
    alone, so that one request cannot fail its neighbours.

    Args:
        assistant: Assistant that answers.
        metrics: Counts of batches and tokens.
        batch_size: Most requests in a batch.
        batch_tokens: Most tokens in a batch, padding and the longest answers included: the size
            that its KV cache can reach. A single request may be longer.
        adapters: Assistants over the same weights by the names that requests give; a batch is for
            one of them. A request by any other name is for the first assistant.
    """

    name = "transformers"

    def __init__(
        self,
        assistant: Assistant,
        metrics: Metrics,
        batch_size: int = 16,
        batch_tokens: int = 16_384,
        adapters: Mapping[str, Assistant] | None = None,
    ) -> None:
        self.assistant, self._metrics = assistant, metrics
        self._adapters = dict(adapters or {})
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._context = assistant.model.config.get_text_config().max_position_embeddings
        self._waiting: deque[_Row] = deque()
        self._batch: list[_Row] = []  # taken from those that wait
        self._running: list[_Row] = []  # in the model now: the batch, or one of it
        self._changed = Condition()
        self._closing = False
        self._thread = Thread(target=self._work, name="mipha-model", daemon=True)
        metrics.gauge("requests_waiting", lambda: len(self._waiting))
        metrics.gauge("batch_size", lambda: len(self._running))
        caches = [one.features for one in (assistant, *self._adapters.values())]
        metrics.gauge("images_encoded_total", lambda: sum(one.num_encoded for one in caches))
        metrics.gauge("images_found_total", lambda: sum(one.num_found for one in caches))

    async def start(self) -> None:
        """Let the thread wait for requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def prepare(self, request: ChatRequest) -> _Row:
        """Return the tokens and pixels of a request.

        Raises:
            RequestError: The chat template refuses the conversation, or it does not fit the model's
                context.
        """
        messages = [
            user_turn(turn.text, len(turn.images)) if turn.images else Message(turn.role, turn.text)
            for turn in request.turns
        ]
        # A seed of our own: the same answer must come if the request is answered again.
        seed = secrets.randbits(32) if request.seed is None else request.seed
        sampling = (
            Sampling(request.temperature, request.top_p, seed) if request.temperature else None
        )
        images = [image for turn in request.turns for image in turn.images]
        assistant = self._adapters.get(request.model, self.assistant)
        try:
            prompt = assistant.prompt(messages, images, sampling=sampling)
        except ConversationRefused as error:
            raise RequestError(
                f"the model's chat template does not take this conversation ({error.reason}): "
                "leave the system's message out, or change the turns",
                param="messages",
            ) from error

        # The answer gets the rest of the context.
        room = self._context - len(prompt.ids)
        if room < 1:
            raise RequestError(
                f"the conversation has {len(prompt.ids)} tokens, those of images included, "
                f"and the model reads {self._context}: shorten it",
                code="context_length_exceeded",
                param="messages",
            )
        limit = min(request.max_new_tokens, room)

        def make_text() -> AnswerText:
            return AnswerText(assistant.decode, assistant.end_tokens, limit, request.stop)

        return _Row(assistant, replace(prompt, max_new_tokens=limit), make_text)

    async def submit(self, row: _Row) -> AsyncIterator[Piece]:
        """Yield the answer to a prepared request.

        Raises:
            ServiceError: The model failed, or the server stops.
        """
        with self._changed:
            if self._closing:
                raise ServiceError(
                    "the server is stopping: ask again later", status=503, code="stopping"
                )
            self._waiting.append(row)
            self._changed.notify()

        try:
            while True:
                piece = await row.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.end:
                    return
        finally:
            row.left = True
            with self._changed:
                if row in self._waiting:
                    self._waiting.remove(row)

    def is_alive(self) -> bool:
        """Return whether the thread lives."""
        return self._thread.is_alive()

    def abort(self) -> None:
        """Fail all requests that wait or run."""
        with self._changed:
            self._closing = True
            rows = [*self._waiting, *self._batch]
            self._waiting.clear()
            self._changed.notify()

        stopped = "the server stopped before the answer was made"
        self._tell([(row, ServiceError(stopped, status=503, code="stopping")) for row in rows])
        for row in rows:
            row.left = True

    async def close(self) -> None:
        """End the thread, after the step that it may be in."""
        self.abort()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, 60)

    def _work(self) -> None:
        while batch := self._next_batch():
            self._metrics.add("batches_total")
            self._metrics.add("batch_rows_total", len(batch))
            whole = self._generate(batch)

            # Where the batch failed, one of its requests may be the reason: answer each alone.
            for row in batch:
                if whole or row.left or row.ended:
                    continue
                row.restart()
                if len(batch) == 1 or not self._generate([row]):
                    failed = ServiceError("the model failed on this request: see the server's log")
                    self._loop.call_soon_threadsafe(self._tell, [(row, failed)])
            self._batch = []

    def _generate(self, rows: list[_Row]) -> bool:
        """Answer requests in one batch; return whether that went well."""
        self._running = rows
        try:
            rows[0].assistant.generate([row.prompt for row in rows], self._on_tokens)
        except Exception:
            _log.exception("a batch of %d requests failed", len(rows))
            return False
        finally:
            self._running = []
        return True

    def _next_batch(self) -> list[_Row]:
        """Take the next requests in order, as many as fit together; none when the server stops."""
        with self._changed:
            batch: list[_Row] = []
            while not batch and not self._closing:
                # Wait for a first request, and a moment for others.
                self._changed.wait_for(lambda: self._waiting or self._closing)
                self._changed.wait_for(
                    lambda: len(self._waiting) >= self._batch_size or self._closing, _GATHER_SECONDS
                )

                # Fill the batch, with requests to one assistant: the cache grows to
                # rows x (longest prompt + longest answer).
                prompt = answer = 0
                while self._waiting and len(batch) < self._batch_size:
                    row = self._waiting[0]
                    if batch and row.assistant is not batch[0].assistant:
                        break
                    prompt = max(prompt, len(row.prompt.ids))
                    answer = max(answer, row.prompt.max_new_tokens)
                    if batch and (len(batch) + 1) * (prompt + answer) > self._batch_tokens:
                        break
                    batch.append(self._waiting.popleft())
            self._batch = batch
            return batch

    def _on_tokens(self, tokens: list[int | None]) -> Collection[int]:
        """Pass a step's tokens on as text; `generate` calls it, in the model's thread."""
        pieces: list[tuple[_Row, Piece | Exception]] = []
        leaving = []
        try:
            for number, (row, token) in enumerate(zip(self._running, tokens, strict=True)):
                if token is None or row.left:
                    leaving.append(number)
                    continue
                if piece := row.add(token):
                    pieces.append((row, piece))
                if row.ended:
                    leaving.append(number)
        finally:  # text of other rows must not be lost where one fails
            if pieces:
                self._loop.call_soon_threadsafe(self._tell, pieces)
        return leaving

    def _tell(self, pieces: list[tuple[_Row, Piece | Exception]]) -> None:
        for row, piece in pieces:
            row.pieces.put_nowait(piece)
