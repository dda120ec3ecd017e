"""The transformers engine: one thread owns the model and answers waiting requests in batches."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from threading import Condition, Thread

from mipha.assistant import Assistant, Prompt
from mipha.data.sample import IMAGE, Message
from mipha.deploy.serve.engine import End, Piece, ServiceError
from mipha.deploy.serve.metrics import Metrics
from mipha.deploy.serve.requests import ChatRequest, RequestError
from mipha.models.decoding import AnswerText, Sampling

_GATHER_SECONDS = 0.01
"""Time after the first request in which others join its batch; an answer takes far longer."""

_log = logging.getLogger(__name__)


class _Row:
    """One request on its way."""

    def __init__(self, prompt: Prompt, text: AnswerText) -> None:
        self.prompt, self.text = prompt, text
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.left = False  # whether its reader has left


class TransformersEngine:
    """Dynamic batching over an `Assistant`.

    A batch is answered to its end before the next one begins; each answer ends by itself, whether
    its neighbours are done or not.

    Args:
        assistant: Assistant that answers.
        metrics: Counts of batches and tokens.
        batch_size: Most requests in a batch.
        batch_tokens: Most tokens in a batch, padding and the longest answers included: the size
            that its KV cache can reach. A single request may be longer.
    """

    name = "transformers"

    def __init__(
        self,
        assistant: Assistant,
        metrics: Metrics,
        batch_size: int = 16,
        batch_tokens: int = 16_384,
    ) -> None:
        self.assistant, self._metrics = assistant, metrics
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._context = assistant.model.config.get_text_config().max_position_embeddings
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._changed = Condition()
        self._closing = False
        self._thread = Thread(target=self._work, name="mipha-model", daemon=True)
        metrics.gauge("requests_waiting", lambda: len(self._waiting))
        metrics.gauge("batch_size", lambda: len(self._running))
        metrics.gauge("images_encoded_total", lambda: assistant.features.num_encoded)
        metrics.gauge("images_found_total", lambda: assistant.features.num_found)

    async def start(self) -> None:
        """Let the thread wait for requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def prepare(self, request: ChatRequest) -> _Row:
        """Return the tokens and pixels of a request.

        Raises:
            RequestError: The request does not fit the model's context.
        """
        # Images stand in front of the text of their turn, as in training.
        messages = [
            Message(turn.role, f"{IMAGE}\n" * len(turn.images) + turn.text)
            for turn in request.turns
        ]
        sampling = (
            Sampling(request.temperature, request.top_p, request.seed)
            if request.temperature
            else None
        )
        images = [image for turn in request.turns for image in turn.images]
        prompt = self.assistant.prompt(messages, images, sampling=sampling)

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
        text = AnswerText(self.assistant.decode, self.assistant.end_tokens, limit, request.stop)
        return _Row(replace(prompt, max_new_tokens=limit), text)

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
            rows = [*self._waiting, *self._running]
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
            try:
                self.assistant.generate([row.prompt for row in batch], self._on_tokens)
            except Exception:
                _log.exception("a batch of %d requests failed", len(batch))
                failed = "the model failed on this request: see the server's log"
                self._loop.call_soon_threadsafe(
                    self._tell, [(row, ServiceError(failed)) for row in batch]
                )
            finally:
                self._running = []

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

                # Fill the batch: its cache grows to rows x (longest prompt + longest answer).
                prompt = answer = 0
                while self._waiting and len(batch) < self._batch_size:
                    row = self._waiting[0]
                    prompt = max(prompt, len(row.prompt.ids))
                    answer = max(answer, row.prompt.max_new_tokens)
                    if batch and (len(batch) + 1) * (prompt + answer) > self._batch_tokens:
                        break
                    batch.append(self._waiting.popleft())
            self._running = batch
            return batch

    def _on_tokens(self, tokens: list[int | None]) -> Collection[int]:
        """Pass a step's tokens on as text; `generate` calls it, in the model's thread."""
        pieces: list[tuple[_Row, Piece | Exception]] = []
        leaving = []
        for number, (row, token) in enumerate(zip(self._running, tokens, strict=True)):
            if token is None or row.left:
                leaving.append(number)
                continue
            text = row.text.add(token)
            end = row.text.reason and End(row.text.reason, len(row.prompt.ids), row.text.num_tokens)
            if text or end:
                pieces.append((row, Piece(text, end or None)))
            if end:
                leaving.append(number)

        if pieces:
            self._loop.call_soon_threadsafe(self._tell, pieces)
        return leaving

    def _tell(self, pieces: list[tuple[_Row, Piece | Exception]]) -> None:
        for row, piece in pieces:
            row.pieces.put_nowait(piece)
