"""Several turns about one image, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, StoppingCriteria, TextIteratorStreamer

from mipha.assistant.inputs import ImageLike, user_turn
from mipha.data.sample import Message
from mipha.models.modeling import attention_window

if TYPE_CHECKING:
    from mipha.assistant.assistant import Assistant


class Chat:
    """A conversation about one image; what was read before is kept, so a turn costs only its new tokens."""

    def __init__(self, assistant: Assistant, image: ImageLike | None) -> None:
        self.assistant, self.image = assistant, image
        self.messages: list[Message] = []
        self._forget()

    def ask(self, question: str, *, max_new_tokens: int = 256) -> Iterator[str]:
        """The answer to the next question, piece by piece; read to its end, it becomes part of the conversation."""
        assistant, tokenizer = self.assistant, self.assistant.processor.tokenizer
        messages = [
            *self.messages,
            user_turn(question, has_image=self.image is not None and not self.messages),
        ]
        ids = assistant.prompt_ids(messages)
        inputs = self._reuse(ids)
        streamer = TextIteratorStreamer(
            tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600
        )
        result: dict[str, Any] = {}
        stop = _Stop()
        options = {
            "streamer": streamer,
            "stopping_criteria": [stop],
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
        }

        def generate() -> None:
            try:
                with torch.inference_mode():
                    result["ids"] = assistant.model.generate(**inputs, **options)
            except (
                BaseException
            ) as error:  # handed to the reader below: a thread's exception is seen by nobody
                result["error"] = error
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        pieces = []
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:  # also for a reader who leaves: what was asked for nobody is not made, and the cache is known again
            stop.asked = True
            thread.join()
            if "ids" in result:
                self._cached = result["ids"][0].tolist()
            else:
                self._forget()
        if "error" in result:
            raise result["error"]
        self.messages = [*messages, Message("assistant", "".join(pieces).strip())]

    def _forget(self) -> None:
        self._cache = DynamicCache(config=self.assistant.model.config.get_text_config())
        self._cached: list[int] = []

    def _reuse(self, ids: list[int]) -> dict[str, Any]:
        """Inputs for `generate`, with the cache cut back to what the new prompt begins with."""
        limit = min(self._cache.get_seq_length(), len(ids) - 1)
        same = next(
            (i for i, (a, b) in enumerate(zip(self._cached[:limit], ids, strict=False)) if a != b),
            limit,
        )
        device, image_token = self.assistant.model.device, self.assistant.processor.image_token_id
        if image_token in ids[same:] or attention_window(self.assistant.model.config):
            same = 0  # an image is read whole, and a cache that slides cannot go back
        if not same:
            self._forget()
        elif same < self._cache.get_seq_length():
            self._cache.crop(same - self._cache.get_seq_length())  # negative: how many to remove
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([ids], device=device),
            "past_key_values": self._cache,
        }
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if image_token in ids[same:]:
            assert self.image is not None
            with torch.inference_mode():
                inputs["inputs_embeds"] = self.assistant.embeddings(
                    inputs["input_ids"], [self.assistant.pixels(self.image)]
                )
        return inputs


class _Stop(StoppingCriteria):
    """Ends `generate` at the next token once it is asked to."""

    asked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)
