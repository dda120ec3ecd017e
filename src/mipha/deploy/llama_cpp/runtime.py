"""Run a GGUF model in this process, through llama.cpp's own server.

Chat template, image preprocessing and sampling are the server's, so every user of the files gets
the same answers; for a model of tiles, or of images in their own shape, if they prepare images
as the files say (`deploy/front.py`).
"""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from mipha.data.images import ImageLike, image_list, upright_rgb
from mipha.data.sample import Message, as_requested, turns_of
from mipha.deploy.front import front_of_gguf
from mipha.deploy.llama_cpp.library import (
    LOG_LOCK,
    Vision,
    Vocabulary,
    import_xllamacpp,
    load_library,
    unreadable,
)

Shown = ImageLike | Sequence[ImageLike] | None
"""The image of a question, several of them, or none."""


@dataclass(frozen=True)
class Reply:
    """An answer, with the margin of each of its tokens.

    Args:
        text: Text of the answer, stripped.
        pieces: Bytes of every token; the one that ends the turn has none, and may be missing.
        margins: Difference of each token's log-probability to that of the runner-up; 0 is a tie.
        num_prompt_tokens: Tokens of the prompt, the image's included.
        num_tokens: Tokens generated, the end of the turn included.
        finished: Whether it ended its turn; False when the length cut it off.
    """

    text: str
    pieces: tuple[bytes, ...]
    margins: tuple[float, ...]
    num_prompt_tokens: int
    num_tokens: int
    finished: bool


class LlamaCpp:
    """A GGUF model in llama.cpp; a context manager, because it holds much memory.

    Its server also listens on a local port that the system picks, but its key is secret, so no
    other program can use it.

    Args:
        model: GGUF of the language model.
        mmproj: GGUF of tower and projector; None for no images.
        threads: Number of threads; None for as many as there are cores.
        context: Longest conversation in tokens, an image's included.

    Raises:
        FileNotFoundError: No such file.
        ValueError: llama.cpp cannot read a file.
        MissingPackage: llama.cpp is not installed.
    """

    def __init__(
        self,
        model: Path,
        mmproj: Path | None = None,
        *,
        threads: int | None = None,
        context: int = 4096,
    ) -> None:
        for path in (model, mmproj):
            if path is not None and not path.is_file():
                raise FileNotFoundError(
                    f"no GGUF file {path}: make one with `mipha export --to gguf`"
                )

        load_library()
        self.model, self.mmproj, self._threads = model, mmproj, threads
        self._front = front_of_gguf(mmproj)
        params = _params(model, mmproj, threads, context)
        self._vocabulary = Vocabulary(model)

        # Open the server; where it fails, find out why.
        try:
            with LOG_LOCK:
                self._server = import_xllamacpp().Server(params)
        except RuntimeError as error:
            self._server = None
            try:
                raise ValueError(self._why_not(context)) from error
            finally:
                self._vocabulary.close()

    def answer(self, image: Shown, question: str, max_new_tokens: int = 128) -> str:
        """Answer one question, greedily.

        Args:
            image: Image that it is about, or a list of several; None for no image.
            question: The question; an image marker in it says where each of several images stands.
            max_new_tokens: Longest answer in tokens.

        Raises:
            ValueError: The question is longer than the context, or there is an image and no mmproj.
        """
        return self.reply(image, question, max_new_tokens).text

    def reply(
        self, image: Shown, question: str | Sequence[Message], max_new_tokens: int = 128
    ) -> Reply:
        """Answer one question, greedily, and return the margin of each token."""
        found = self._ask(image, question, max_tokens=max_new_tokens, logprobs=True, top_logprobs=2)
        choice = found["choices"][0]
        numbers = choice.get("logprobs")  # none where the answer ends within a character
        tokens = numbers["content"] if numbers else []
        return Reply(
            text=(choice["message"]["content"] or "").strip(),
            pieces=tuple(bytes(token["bytes"]) for token in tokens),
            margins=tuple(_margin(token) for token in tokens),
            num_prompt_tokens=found["usage"]["prompt_tokens"],
            num_tokens=found["usage"]["completion_tokens"],
            finished=choice["finish_reason"] == "stop",
        )

    def answer_many(
        self,
        pairs: Sequence[tuple[Shown, str | Sequence[Message]]],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 1,
        on_answers: Callable[[list[int], list[Reply]], None] | None = None,
    ) -> list[Reply]:
        """Answer many questions, one after the other, as `Assistant.answer_many` does.

        Args:
            pairs: (image or images, question); a conversation has a marker for each image.
            max_new_tokens: Longest answer in tokens.
            batch_size: Without meaning here.
            on_answers: Callback of every answer; takes its position in `pairs` and the reply.
        """
        replies = []
        for index, (image, question) in enumerate(pairs):
            replies.append(self.reply(image, question, max_new_tokens))
            if on_answers:
                on_answers([index], replies[-1:])
        return replies

    def stream(self, image: Shown, question: str, max_new_tokens: int = 128) -> Iterator[str]:
        """Yield the answer to one question piece by piece; a reader who leaves stops it."""
        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        request = self._request(image, question) | {"max_tokens": max_new_tokens, "stream": True}
        left = False

        def told(event: dict[str, Any]) -> bool:
            if "error" in event:
                pieces.put(ValueError(self._sentence(event["error"])))
            elif event.get("choices") and (text := event["choices"][0]["delta"].get("content")):
                pieces.put(text)
            return left

        def run() -> None:
            try:
                self._server.handle_chat_completions(request, told)
                pieces.put(None)
            except RuntimeError as error:  # the reader below raises it: nobody sees a thread's
                pieces.put(ValueError(f"llama.cpp refuses the question: {error}"))

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            left = True
            thread.join()

    def first_token_logits(self, image: Shown, question: str) -> np.ndarray:
        """Return the log-probabilities of the answer's first token, `(vocabulary,)` float32.

        They are its logits less one number for all of them.
        """
        # The server gives no numbers for a token that ends the turn, or is a part of a character.
        # With a bias on a letter it takes that one; the numbers stay those of the model.
        found = self._ask(
            image,
            question,
            max_tokens=1,
            logprobs=True,
            top_logprobs=len(self._vocabulary),
            logit_bias=[[self.tokenize("a")[-1], 1000.0]],
        )
        first = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        logits = np.full(len(self._vocabulary), -np.inf, np.float32)
        logits[[token["id"] for token in first]] = [token["logprob"] for token in first]
        return logits

    def image_embeddings(self, image: ImageLike) -> np.ndarray:
        """Return the projector's output, `(tokens, width of the language model)` float32.

        Args:
            image: The image; llama.cpp neither resizes nor pads one of the tower's own size.

        Raises:
            ValueError: There is no mmproj.
        """
        upright = upright_rgb(image)
        sent = self._front.cut(upright) if self._front else [upright]
        return np.concatenate([self._vision.embeddings(one) for one in sent])

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text; special tokens are read as such, none is put in front."""
        return self._vocabulary.tokenize(text)

    @property
    def quantization(self) -> str:
        """Kind of its weights as the file says it, such as q8_0."""
        return self._vocabulary.quantization

    def close(self) -> None:
        """Free its memory and end its threads."""
        with LOG_LOCK:
            self._server = None
        if "_vision" in self.__dict__:
            self._vision.close()
        self._vocabulary.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @cached_property
    def _vision(self) -> Vision:
        if self.mmproj is None:
            raise self._blind()
        return Vision(self.mmproj, self._vocabulary, self._threads)

    def _blind(self) -> ValueError:
        return ValueError(
            f"{self.model.name} was opened without an mmproj, so it sees no images: "
            "give mmproj-*.gguf of the same export"
        )

    def _ask(
        self, image: Shown, question: str | Sequence[Message], **options: Any
    ) -> dict[str, Any]:
        try:
            found = self._server.handle_chat_completions(self._request(image, question) | options)
        except RuntimeError as error:
            raise ValueError(f"llama.cpp refuses the question: {error}") from error
        if "error" in found:
            raise ValueError(self._sentence(found["error"]))
        return found

    def _request(self, image: Shown, question: str | Sequence[Message]) -> dict[str, Any]:
        images = [upright_rgb(one) for one in image_list(image)]
        if images and self.mmproj is None:
            raise self._blind()
        turns: Sequence[Message] = turns_of(question, len(images))
        if self._front:
            turns, images = self._front.prepare(turns, images)
        messages = as_requested(turns, [_data_uri(one) for one in images])
        # Penalties and the like are off by default; a temperature of 0 takes the likeliest token.
        return {"messages": messages, "temperature": 0}

    def _sentence(self, error: dict[str, Any]) -> str:
        if error.get("type") == "exceed_context_size_error":
            return (
                f"the question is {error['n_prompt_tokens']} tokens long with its image, "
                f"and the context {error['n_ctx']}: open the model with a larger context"
            )
        return f"llama.cpp refuses the question: {error.get('message', error)}"

    def _why_not(self, context: int) -> str:
        """Return the reason why a model does not open, which the server does not give.

        Tower and projector are opened once more on their own.
        """
        if self.mmproj:
            Vision(self.mmproj, self._vocabulary, self._threads).close()
        both = f" with {self.mmproj.name}" if self.mmproj else ""
        reason = (
            "weights are missing, the two files are not of one model, "
            f"or there is too little memory for {context} tokens"
        )
        return unreadable(self.model, [f"it does not load{both}: {reason}"])


def _params(model: Path, mmproj: Path | None, threads: int | None, context: int) -> Any:
    params = import_xllamacpp().CommonParams()
    params.model.path = str(model)
    if mmproj:
        params.mmproj.path = str(mmproj)

    params.n_ctx, params.n_parallel = context, 1
    params.fit_params = False  # a context that does not fit is an error, not a smaller context
    params.warmup = False
    params.cache_ram_mib = 0  # no copies of earlier conversations: the default keeps 8 GiB
    params.force_pure_content_parser = True  # the answer is the model's own text

    params.verbosity = -1
    params.ui = False
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [secrets.token_hex(16)]
    if threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return params


def _margin(token: dict[str, Any]) -> float:
    first, *others = sorted((other["logprob"] for other in token["top_logprobs"]), reverse=True)
    return first - others[0] if others else float("inf")


def _data_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(_png(image)).decode()}"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
