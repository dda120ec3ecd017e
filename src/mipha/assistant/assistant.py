"""Image + question -> Answer. The only caller of `generate`: evaluation, chat and servers ask here.

answer_many:  questions --sorted by image-->  batches;  each image: [prompt through the image] prefilled once
              --repeated in the KV cache-->   [its questions], left-padded  --greedy-->  answers
reply_many:   whole conversations, each with its own images, length and way to draw, left-padded  -->  tokens as they come, answers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlavaProcessor

from mipha.assistant.chat import Chat
from mipha.assistant.inputs import ImageLike, image_key, opened, templated, user_turn
from mipha.data.encode import tokens_per_image
from mipha.data.sample import IMAGE, Message
from mipha.models.attention import use_segments
from mipha.models.decoding import OnTokens, RowSampler, RowWatch, Sampling
from mipha.models.features import ImageFeatures
from mipha.models.modeling import LlavaForConditionalGeneration, attention_window, load_model
from mipha.models.processing import load_processor
from mipha.run import Run, model_folder

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What a model may be loaded in."""


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Args:
        text: Without special tokens, stripped.
        num_tokens: Generated, the end of the turn included.
        finished: It ended its turn; false when `max_new_tokens` cut it off.
    """

    text: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True)
class Prompt:
    """A conversation made ready for the model, which is not needed for it.

    Args:
        ids: Tokens, image placeholders repeated.
        images: One for each image, in order: `(1, 3, height, width)`.
        max_new_tokens: Longest answer, tokens.
        sampling: Null: the likeliest answer.
    """

    ids: list[int]
    images: tuple[torch.Tensor, ...]
    max_new_tokens: int = 256
    sampling: Sampling | None = None


class Assistant:
    """A model that answers questions about images, greedily: the same question gets the same answer, alone or in a batch."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        self.model, self.processor = model.eval(), processor
        use_segments(model)
        self.features = ImageFeatures(model)
        self.end_tokens = set(np.atleast_1d(model.generation_config.eos_token_id).tolist())

    def answer(
        self, image: ImageLike | None, question: str, *, max_new_tokens: int = 256
    ) -> Answer:
        """Answer one question.

        Args:
            image: What the question is about; null for a question without an image.
            max_new_tokens: Longest answer, tokens.
        """
        return self.answer_many([(image, question)], max_new_tokens=max_new_tokens)[0]

    def answer_many(
        self,
        pairs: Sequence[tuple[ImageLike | None, str]],
        *,
        max_new_tokens: int = 256,
        batch_size: int = 32,
        on_answers: Callable[[list[int], list[Answer]], None] | None = None,
    ) -> list[Answer]:
        """Answer many questions; an image is encoded and prefilled once in a batch, however many questions it has.

        Args:
            pairs: (image, question), in any order.
            batch_size: Questions answered at a time.
            on_answers: Told (positions in `pairs`, their answers) after every batch.

        Returns:
            Answers in the order of `pairs`.
        """
        prompts = [self._prompt(question, image is not None) for image, question in pairs]
        window = attention_window(self.model.config)
        if window and max(map(len, prompts), default=0) + max_new_tokens > window:
            batch_size = (
                1  # padding would stand inside the window, and push out what it should show
            )
        keys = [image_key(image) for image, _ in pairs]
        same: dict[object, list[int]] = {}
        for index, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
            same.setdefault((key, tuple(prompt)), []).append(index)  # asked twice, answered once
        order = sorted(
            (indices[0] for indices in same.values()), key=lambda i: (keys[i], len(prompts[i]))
        )
        answers: dict[int, Answer] = {}
        for batch in _batches(order, keys, batch_size):
            found = self._answer_batch(
                [(pairs[i][0], keys[i], prompts[i]) for i in batch], max_new_tokens
            )
            told = {
                i: answer
                for first, answer in zip(batch, found, strict=True)
                for i in same[keys[first], tuple(prompts[first])]
            }
            answers |= told
            if on_answers:
                on_answers(list(told), list(told.values()))
        return [answers[i] for i in range(len(pairs))]

    def stream(
        self, image: ImageLike | None, question: str, *, max_new_tokens: int = 256
    ) -> Iterator[str]:
        """Answer one question piece by piece."""
        return self.chat(image).ask(question, max_new_tokens=max_new_tokens)

    def prompt(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageLike] = (),
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
    ) -> Prompt:
        """Make a conversation ready, away from the model and in any thread.

        Args:
            messages: The last one is the user's; each `IMAGE` marker in them stands for the next of `images`.

        Raises:
            ValueError: Markers and images do not match.
        """
        markers = sum(message.text.count(IMAGE) for message in messages)
        if markers != len(images):
            raise ValueError(
                f"the conversation holds {markers} {IMAGE} markers for {len(images)} images: give one marker for each image"
            )
        return Prompt(
            self.prompt_ids(messages),
            tuple(self.pixels(image) for image in images),
            max_new_tokens,
            sampling,
        )

    @torch.inference_mode()
    def reply_many(
        self, prompts: Sequence[Prompt], on_tokens: OnTokens | None = None
    ) -> list[Answer]:
        """Answer conversations in one batch; each gets the answer that it gets alone.

        Args:
            on_tokens: Told every row's new token after every step; see `OnTokens`.

        Returns:
            Answers in the order of `prompts`; not finished where `max_new_tokens` or `on_tokens` cut them off.
        """
        longest, most = (
            max(len(prompt.ids) for prompt in prompts),
            max(prompt.max_new_tokens for prompt in prompts),
        )
        window = attention_window(self.model.config)
        if (
            window and longest + most > window and len(prompts) > 1
        ):  # padding would stand inside the window
            return [self._reply_alone(prompts, row, on_tokens) for row in range(len(prompts))]
        device, pad = self.model.device, self.processor.tokenizer.pad_token_id
        padding = [longest - len(prompt.ids) for prompt in prompts]
        ids = torch.tensor(
            [[pad] * n + prompt.ids for prompt, n in zip(prompts, padding, strict=True)],
            device=device,
        )
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        watch = RowWatch([prompt.max_new_tokens for prompt in prompts], self.end_tokens, on_tokens)
        self.model.generate(
            input_ids=ids,
            inputs_embeds=self.embeddings(
                ids, [image for prompt in prompts for image in prompt.images]
            ),
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=False,
            stopping_criteria=[watch],
            logits_processor=[RowSampler([prompt.sampling for prompt in prompts])],
        )
        return [self._read(tokens) for tokens in watch.tokens]

    def _reply_alone(
        self, prompts: Sequence[Prompt], row: int, on_tokens: OnTokens | None
    ) -> Answer:
        """The answer to one of several, told as one of them."""

        def told(tokens: list[int | None]) -> list[int]:
            assert on_tokens is not None
            return (
                [0]
                if row
                in on_tokens([tokens[0] if other == row else None for other in range(len(prompts))])
                else []
            )

        return self.reply_many([prompts[row]], told if on_tokens else None)[0]

    def chat(self, image: ImageLike | None = None) -> Chat:
        """A conversation of several turns about one image."""
        return Chat(self, image)

    def pixels(self, image: ImageLike) -> torch.Tensor:
        """One image as the tower reads it, `(1, 3, height, width)`."""
        pixels = self.processor.image_processor(opened(image), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that waits for the assistant, image placeholders repeated."""
        ids = templated(self.processor, messages, tokenize=True)
        image, repeats = self.processor.image_token_id, tokens_per_image(self.processor)
        return [token for token in ids for _ in range(repeats if token == image else 1)]

    def _prompt(self, question: str, has_image: bool) -> list[int]:
        return self.prompt_ids([user_turn(question, has_image)])

    def embeddings(self, ids: torch.Tensor, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the language model reads, `(rows, tokens, width)`: words, and image features in the place of their markers."""
        embeddings = self.model.get_input_embeddings()(ids)
        if not pixels:
            return embeddings
        places = (ids == self.processor.image_token_id).unsqueeze(-1)
        return embeddings.masked_scatter(
            places, torch.cat(self.features.of(pixels)).to(embeddings.dtype)
        )

    @torch.inference_mode()
    def _answer_batch(
        self, batch: Sequence[tuple[ImageLike | None, str, list[int]]], max_new_tokens: int
    ) -> list[Answer]:
        device = self.model.device
        cache, shared = None, 0
        if batch[0][0] is not None:
            rows = {key: row for row, key in enumerate(dict.fromkeys(key for _, key, _ in batch))}
            images = {key: image for image, key, _ in batch}
            prompt = batch[0][2]
            # Everything through the image is the same in every prompt of one template.
            shared = len(prompt) - prompt[::-1].index(self.processor.image_token_id)
            prefix = torch.tensor([prompt[:shared]] * len(rows), device=device)
            cache = DynamicCache(config=self.model.config.get_text_config())
            pixels = torch.cat([self.pixels(images[key]) for key in rows])
            self.model(
                input_ids=prefix,
                pixel_values=pixels,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_select_indices(
                torch.tensor([rows[key] for _, key, _ in batch], device=device)
            )
        longest = max(len(prompt) for _, _, prompt in batch)
        padding = [longest - len(prompt) for _, _, prompt in batch]
        pad = self.processor.tokenizer.pad_token_id
        # Padding stands behind the shared prefix and before the question: on its left, where generation needs it.
        ids = torch.tensor(
            [
                p[:shared] + [pad] * n + p[shared:]
                for (_, _, p), n in zip(batch, padding, strict=True)
            ],
            device=device,
        )
        mask = torch.tensor(
            [[1] * shared + [0] * n + [1] * (longest - shared - n) for n in padding], device=device
        )
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        return [self._read(row[longest:].tolist()) for row in out]

    def _read(self, ids: list[int]) -> Answer:
        end = next(
            (position for position, token in enumerate(ids) if token in self.end_tokens), None
        )
        kept = ids if end is None else ids[:end]
        return Answer(self.decode(kept).strip(), len(kept) + (end is not None), end is not None)

    def decode(self, ids: list[int]) -> str:
        """Text of what was generated, without special tokens."""
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)


def load(
    path: str | Path | Run,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> Assistant:
    """An assistant from a run, a run's folder or a checkpoint folder.

    Args:
        device: Null: the GPU where there is one.
        dtype: Of the weights and of what is computed, such as "bfloat16"; null or "auto": bfloat16 on a GPU, float32 on a CPU.

    Raises:
        FileNotFoundError: The run is not finished, or the folder is no checkpoint.
        ValueError: Another dtype than float32, bfloat16 and float16.
    """
    folder = path.final_checkpoint() if isinstance(path, Run) else model_folder(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = str(dtype or "auto").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"no dtype {name!r} to answer in: use one of {', '.join(DTYPES)}")
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return Assistant(load_model(str(folder), device, getattr(torch, name)), load_processor(folder))


def _batches(order: Sequence[int], keys: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    """Batches in order; those without an image stand apart, for they share no prefix with the others."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == batch_size or (keys[index] == "") != (keys[batch[0]] == "")):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
