"""Image + question -> Answer. The only caller of `generate`: evaluation, chat and servers ask here.

prompt:       messages, images  ->  Prompt: token ids, and each image's pixels or features
generate:     Prompts in one batch, after the tokens of a cache  ->  tokens as they come, Answers
answer_many:  questions sorted by image  ->  batches; the prompt through the image (or the last of
              several) is read once for each image, its cache repeated for each of the image's
              questions  ->  generate
Chat:         turns about one image; the cache goes on from turn to turn  ->  generate, streamed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaProcessor

from mipha.checkpoint_files import read_checkpoint
from mipha.data.encode import expand_images, image_spans, with_tiles
from mipha.data.images import (
    ImageLike,
    StoredImage,
    grey_image,
    image_list,
    upright_rgb,
    upright_size,
)
from mipha.data.pixels import read_pixels
from mipha.data.sample import IMAGE, Message, as_chat, turns_of, user_turn
from mipha.geometry import geometry_of
from mipha.models.adapters import adapter_template, attach_adapter, check_base
from mipha.models.attention import use_segments
from mipha.models.decoding import AnswerText, OnTokens, RowSampler, RowWatch, Sampling
from mipha.models.features import ImageFeatures, ImageInputs, image_features
from mipha.models.modeling import (
    LlavaForConditionalGeneration,
    attention_window,
    is_recurrent,
    load_saved_model,
)
from mipha.models.processing import load_processor
from mipha.preflight import check_device, check_dtype
from mipha.rendering import token_ids, write_chat
from mipha.run import Run, adapter_folder, model_folder


@dataclass(frozen=True)
class Answer:
    """The answer of the model.

    Args:
        text: Text without special tokens, stripped.
        num_tokens: Tokens generated, the end of the turn included.
        finished: Whether the model ended its turn; False where a limit cut it off.
    """

    text: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image that has passed the vision tower and the projector, see `Assistant.encode_image`.

    Args:
        features: The image as the language model reads it, `(tokens, width)`.
        size: Upright (width, height) in pixels.
    """

    features: Tensor
    size: tuple[int, int]


AnyImage = ImageLike | EncodedImage
"""An image in any form, encoded or not."""

Shown = AnyImage | Sequence[AnyImage] | None
"""The image that a question is about, several of them, or none."""


@dataclass(frozen=True)
class Prompt:
    """A conversation made ready for the model, which is not needed to make it.

    Args:
        ids: Token ids, image placeholders repeated.
        images: Images in the order of their placeholders, as pixels or encoded.
        max_new_tokens: Longest answer, in tokens.
        sampling: How the answer is drawn; None: the likeliest answer.
    """

    ids: list[int]
    images: tuple[ImageInputs | EncodedImage, ...] = ()
    max_new_tokens: int = 256
    sampling: Sampling | None = None


class Assistant:
    """A model that answers questions about images.

    It answers greedily: the same question gets the same answer, alone or in a batch.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        self.model, self.processor = model.eval(), processor
        use_segments(model)
        self.features = ImageFeatures(model)
        ends = set(np.atleast_1d(model.generation_config.eos_token_id).tolist()) - {None}
        self.end_tokens = ends or {processor.tokenizer.eos_token_id}

    # ---- Asking ----------------------------------------------------------------------------------

    def answer(self, image: Shown, question: str, *, max_new_tokens: int = 256) -> Answer:
        """Answer one question.

        Args:
            image: Image that the question is about, or a list of several; None for a question
                without an image.
            question: Text. Images stand in front of it, or where it has an image marker for each.
            max_new_tokens: Longest answer, in tokens.
        """
        return self.answer_many([(image, question)], max_new_tokens=max_new_tokens)[0]

    def answer_many(
        self,
        pairs: Sequence[tuple[Shown, str | Sequence[Message]]],
        *,
        max_new_tokens: int = 256,
        batch_size: int = 32,
        on_answers: Callable[[list[int], list[Answer]], None] | None = None,
    ) -> list[Answer]:
        """Answer many questions.

        An image is encoded and read once in a batch, however many questions it has there.

        Args:
            pairs: (image or images, question), in any order; see `answer`. A conversation in place
                of the question has a marker for each of its images.
            max_new_tokens: Longest answer, in tokens.
            batch_size: Questions answered at a time.
            on_answers: Callback of every batch; takes positions in `pairs` and their answers.

        Returns:
            Answers in the order of `pairs`.

        Raises:
            ValueError: Several images make a prompt that is longer than what the language model
                reads, or image markers and images do not match.
        """
        images = [image_list(shown) for shown, _ in pairs]
        prompts = [
            Prompt(
                self.prompt_ids(turns_of(question, len(shown)), shown),
                max_new_tokens=max_new_tokens,
            )
            for shown, (_, question) in zip(images, pairs, strict=True)
        ]
        for shown, prompt in zip(images, prompts, strict=True):
            self._check_length(prompt, len(shown))
        if not self._may_pad(prompts):
            batch_size = 1

        # A question that is asked twice is answered once.
        keys = [tuple(map(_image_key, shown)) for shown in images]
        same: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
        for index, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
            same.setdefault((key, tuple(prompt.ids)), []).append(index)

        # Questions whose images end at the same place share a batch; those about one image stand
        # together, those of a similar length side by side.
        ends = [self._end_of_images(prompt.ids) for prompt in prompts]
        order = sorted(
            (indices[0] for indices in same.values()),
            key=lambda i: (ends[i], keys[i], len(prompts[i].ids)),
        )

        answers: dict[int, Answer] = {}
        for batch in _batches(order, ends, batch_size):
            asked = [prompts[i] for i in batch]
            cache = self._read_images(
                [(images[i], keys[i], prompts[i].ids[: ends[i]]) for i in batch]
            )
            if cache is None:
                asked = [self._with_images(prompts[i], images[i]) for i in batch]
            found = {
                i: answer
                for first, answer in zip(batch, self.generate(asked, cache=cache), strict=True)
                for i in same[keys[first], tuple(prompts[first].ids)]
            }
            answers |= found
            if on_answers:
                on_answers(list(found), list(found.values()))
        return [answers[i] for i in range(len(pairs))]

    @torch.inference_mode()
    def log_likelihoods(
        self, texts: Sequence[tuple[str, str]], window: int = 1024
    ) -> list[tuple[float, int]]:
        """Return how likely texts are to the language model, which sees no chat template.

        Args:
            texts: (context, continuation); an empty context is the tokenizer's first token.
            window: Tokens of a forward pass. A longer continuation is read in windows, one after
                the other, and each sees nothing of the one before.

        Returns:
            Log-likelihood (natural logarithm) and number of tokens of every continuation.
        """
        return [self._log_likelihood(*text, window) for text in texts]

    def _log_likelihood(self, context: str, text: str, window: int) -> tuple[float, int]:
        tokenizer = self.processor.tokenizer
        before = tokenizer(context)["input_ids"] if context else []
        ids = tokenizer(context + text)["input_ids"]
        if not before:
            first = tokenizer.bos_token_id
            first = tokenizer.eos_token_id if first is None else first
            ids = ids if ids[:1] == [first] else [first, *ids]
            before = ids[:1]

        # Tokens from `start` on are predicted; the first window takes what fits of the context.
        start, total = len(before), 0.0
        places = range(start, len(ids), window)
        for place in places:
            end = min(place + window, len(ids))
            begin = max(0, end - 1 - window) if place == start else place - 1
            seen = torch.tensor([ids[begin : end - 1]], device=self.model.device)  # (1, tokens)
            wanted = torch.tensor(ids[place:end], device=self.model.device)  # (predicted,)
            logits = self.model(input_ids=seen, use_cache=False).logits[0, -len(wanted) :]
            scores = logits.float().log_softmax(-1)  # (predicted, words)
            total += scores.gather(1, wanted.unsqueeze(1)).double().sum().item()
        return total, len(ids) - start

    def stream(self, image: Shown, question: str, *, max_new_tokens: int = 256) -> Iterator[str]:
        """Answer one question piece by piece."""
        return self.chat(image).ask(question, max_new_tokens=max_new_tokens)

    def chat(self, image: Shown = None) -> Chat:
        """Begin a conversation of several turns about one image, or a list of several."""
        return Chat(self, image)

    # ---- Making a prompt -------------------------------------------------------------------------

    def prompt(
        self,
        messages: Sequence[Message],
        images: Sequence[AnyImage] = (),
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
    ) -> Prompt:
        """Make a conversation ready, away from the model and in any thread.

        Args:
            messages: Turns, the last one the user's; each `IMAGE` marker in them stands for the
                next of `images`.
            images: Images in the order of their markers.
            max_new_tokens: Longest answer, in tokens.
            sampling: How the answer is drawn; None: the likeliest answer.

        Raises:
            ValueError: Markers and images do not match.
        """
        markers = sum(message.text.count(IMAGE) for message in messages)
        if markers != len(images):
            raise ValueError(
                f"the conversation holds {markers} {IMAGE} markers for {len(images)} images: "
                "give one marker for each image"
            )
        # Images that are not encoded are decoded once, for their sizes and for their pixels.
        images = [
            image if isinstance(image, EncodedImage) else upright_rgb(image) for image in images
        ]
        ready = tuple(self._ready(image, len(images)) for image in images)
        return Prompt(self.prompt_ids(messages, images), ready, max_new_tokens, sampling)

    def prompt_ids(
        self, messages: Sequence[Message], images: Sequence[AnyImage] | None = None
    ) -> list[int]:
        """Return the token ids of a conversation that waits for the assistant.

        What stands for an image is put in the place of its marker.

        Args:
            messages: Turns, as in `prompt`.
            images: Images in the order of their markers; they may be left out where every image
                takes the same tokens.
        """
        if images is None:
            markers = sum(message.text.count(IMAGE) for message in messages)
            if markers and geometry_of(self.processor).depends_on_size:
                raise ValueError("the tokens of an image depend on its size: give the images too")
            images = [grey_image()] * markers
        spans = image_spans(self.processor, images, _size_of)
        messages = with_tiles(messages, spans)
        text = _write_prompt(self.processor, messages)
        ids = np.asarray(token_ids(self.processor.tokenizer, text), dtype=np.int64)
        if not len(ids):
            raise ValueError(
                "the chat template and the tokenizer make no tokens of a conversation: "
                "put those there that the model was trained with"
            )
        words = len(self.model.get_input_embeddings().weight)
        if ids.max() >= words:
            raise ValueError(
                f"the tokenizer makes token {ids.max()}, and the model has {words}: "
                "put the tokenizer there that the model was trained with"
            )
        try:
            return expand_images(ids, spans, self.processor).ids.tolist()
        except ValueError as error:
            raise ValueError(
                f"the chat template and the tokenizer lose or add image markers ({error}): "
                "give a template that writes each image once"
            ) from error

    def pixels(self, image: ImageLike) -> Tensor:
        """Return one image as the tower reads it: of a square model `(1, 3, height, width)`."""
        return self.image_inputs(image).inputs["pixel_values"]

    def image_inputs(self, image: ImageLike, num_images: int = 1) -> ImageInputs:
        """Return one image as the model reads it.

        Args:
            image: Image in any form.
            num_images: Images of the conversation that it belongs to.
        """
        upright = upright_rgb(image)
        (span, *_) = image_spans(self.processor, [upright] * num_images, _size_of)
        inputs = read_pixels([upright], self.processor, [num_images])
        made = ImageInputs(inputs, span.num_image_tokens)
        return made.to(self.model.device, self.model.dtype)

    def encode_image(self, image: AnyImage) -> EncodedImage:
        """Encode an image once, to ask about it many times.

        Every method that asks about an image takes the result in place of the image.
        """
        if isinstance(image, EncodedImage):
            return image
        upright = upright_rgb(image)
        return EncodedImage(self.features.of([self.image_inputs(upright)])[0], upright.size)

    def _ready(self, image: AnyImage, num_images: int) -> ImageInputs | EncodedImage:
        """Return an image as pixels or features.

        Raises:
            ValueError: It was encoded alone, and this model reads several images otherwise.
        """
        if not isinstance(image, EncodedImage):
            return self.image_inputs(image, num_images)
        (span, *_) = image_spans(self.processor, [image] * num_images, _size_of)
        if span.num_image_tokens != len(image.features):
            raise ValueError(
                f"an image that was encoded alone has {len(image.features)} tokens, and one of "
                f"{num_images} has {span.num_image_tokens} here: give the images themselves"
            )
        return image

    # ---- Generating ------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        on_tokens: OnTokens | None = None,
        cache: DynamicCache | None = None,
    ) -> list[Answer]:
        """Answer prompts in one batch; each gets the answer that it gets alone.

        Args:
            prompts: Prompts, of any lengths.
            on_tokens: Callback of every step with every row's new token; see `OnTokens`.
            cache: Keys and values of the first tokens of each prompt, as many in every row and at
                most all but one. A cache that holds any holds all images. Generation adds to it.

        Returns:
            Answers in the order of `prompts`; not finished where `max_new_tokens` or `on_tokens`
            cut them off.
        """
        if cache is None and not self._may_pad(prompts):
            return [self._generate_alone(prompts, row, on_tokens) for row in range(len(prompts))]

        # Pad between the tokens in the cache and the new ones: on the left of what is generated.
        cached = cache.get_seq_length() if cache is not None else 0
        longest = max(len(prompt.ids) for prompt in prompts)
        device, pad = self.model.device, self.processor.tokenizer.pad_token_id
        rows, masks = [], []
        for prompt in prompts:
            padding = longest - len(prompt.ids)
            rows.append(prompt.ids[:cached] + [pad] * padding + prompt.ids[cached:])
            masks.append([1] * cached + [0] * padding + [1] * (longest - cached - padding))
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(rows, device=device),  # (rows, tokens)
            "attention_mask": torch.tensor(masks, device=device),  # (rows, tokens)
            "past_key_values": cache,
        }
        if not cached:
            images = [image for prompt in prompts for image in prompt.images]
            inputs["inputs_embeds"] = self.embeddings(inputs["input_ids"], images)

        # Each row draws its tokens, and ends, by rules of its own.
        watch = RowWatch([prompt.max_new_tokens for prompt in prompts], self.end_tokens, on_tokens)
        self.model.generate(
            **inputs,
            max_new_tokens=max(prompt.max_new_tokens for prompt in prompts),
            do_sample=False,
            stopping_criteria=[watch],
            logits_processor=[RowSampler([prompt.sampling for prompt in prompts])],
        )
        return [self._read_answer(tokens) for tokens in watch.tokens]

    def embeddings(self, ids: Tensor, images: Sequence[ImageInputs | EncodedImage]) -> Tensor:
        """Return the input of the language model, `(rows, tokens, width)`.

        Args:
            ids: Token ids, `(rows, tokens)`; image features take the place of the placeholders.
            images: Images of all rows in reading order, as in `Prompt`.
        """
        unread = [image for image in images if isinstance(image, ImageInputs)]
        encoded = iter(self.features.of(unread) if unread else ())
        return self._embeddings_with(
            ids,
            [
                image.features if isinstance(image, EncodedImage) else next(encoded)
                for image in images
            ],
        )

    def decode(self, ids: list[int]) -> str:
        """Return the text of generated tokens, without special tokens."""
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def _embeddings_with(self, ids: Tensor, features: Sequence[Tensor]) -> Tensor:
        embeddings = self.model.get_input_embeddings()(ids)  # (rows, tokens, width)
        if not features:
            return embeddings
        places = (ids == self.processor.image_token_id).unsqueeze(-1)  # (rows, tokens, 1)
        return embeddings.masked_scatter(places, torch.cat(list(features)).to(embeddings.dtype))

    def _end_of_images(self, ids: list[int]) -> int:
        """Return the place behind the last image token of a prompt; 0 without images."""
        image = self.processor.image_token_id
        return len(ids) - ids[::-1].index(image) if image in ids else 0

    @torch.inference_mode()
    def _read_images(
        self, shown: Sequence[tuple[Sequence[AnyImage], Any, list[int]]]
    ) -> DynamicCache | None:
        """Return the cache of the prompts of one batch through their images; None without images.

        Args:
            shown: For each row its images, their key, and the token ids of its prompt through the
                last of them, as many in every row. Rows with the same key and ids are read once.

        Returns:
            None also for a recurrent language model, whose state cannot be padded behind images.
        """
        if not shown[0][0] or is_recurrent(self.model.config):
            return None
        distinct = {(key, tuple(ids)): images for images, key, ids in shown}

        # Encode the images that are not encoded yet, together. `self.features` does not keep them,
        # because a benchmark asks about thousands of images, each in one batch.
        ready: dict[Any, ImageInputs | EncodedImage] = {}
        for (keys, _), images in distinct.items():
            for key, image in zip(keys, images, strict=True):
                if (key, len(images)) not in ready:
                    ready[key, len(images)] = self._ready(image, len(images))
        unread = [image for image in ready.values() if isinstance(image, ImageInputs)]
        made = iter(image_features(self.model, unread) if unread else ())
        features = {
            name: image.features if isinstance(image, EncodedImage) else next(made)
            for name, image in ready.items()
        }

        # Read each prompt through its images once.
        rows = torch.tensor([ids for _, ids in distinct], device=self.model.device)
        cache = DynamicCache(config=self.model.config.get_text_config())
        self.model(
            inputs_embeds=self._embeddings_with(
                rows, [features[key, len(keys)] for keys, _ in distinct for key in keys]
            ),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

        # Repeat it for each question.
        number = {name: position for position, name in enumerate(distinct)}
        cache.batch_select_indices(
            torch.tensor(
                [number[key, tuple(ids)] for _, key, ids in shown], device=self.model.device
            )
        )
        return cache

    def _with_images(self, prompt: Prompt, shown: Sequence[AnyImage]) -> Prompt:
        return replace(prompt, images=tuple(self._ready(image, len(shown)) for image in shown))

    def _check_length(self, prompt: Prompt, num_images: int) -> None:
        """Refuse several images whose prompt the language model cannot read.

        One image and a long question are asked all the same, as LLaVA-1.5 asks them.
        """
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if num_images > 1 and longest and len(prompt.ids) >= longest:
            most = geometry_of(self.processor).longest
            raise ValueError(
                f"the prompt has {len(prompt.ids):,} tokens with its {num_images} images of up to "
                f"{most:,} tokens each, but the language model reads {longest:,}: show fewer "
                "images, or use a model that reads more"
            )

    def _may_pad(self, prompts: Sequence[Prompt]) -> bool:
        """Return whether rows of different lengths may share a batch.

        In a longer one, padding would stand inside a sliding window and push text out of it.
        """
        window = attention_window(self.model.config)
        if not window or len(prompts) < 2:
            return True
        longest = max(len(prompt.ids) for prompt in prompts)
        return longest + max(prompt.max_new_tokens for prompt in prompts) <= window

    def _generate_alone(
        self, prompts: Sequence[Prompt], row: int, on_tokens: OnTokens | None
    ) -> Answer:
        """Answer one of several prompts, and report its tokens as one row of them."""

        def report(tokens: list[int | None]) -> list[int]:
            assert on_tokens is not None
            told = [tokens[0] if other == row else None for other in range(len(prompts))]
            return [0] if row in on_tokens(told) else []

        return self.generate([prompts[row]], report if on_tokens else None)[0]

    def _read_answer(self, ids: list[int]) -> Answer:
        end = next(
            (position for position, token in enumerate(ids) if token in self.end_tokens), None
        )
        kept = ids if end is None else ids[:end]
        return Answer(self.decode(kept).strip(), len(kept) + (end is not None), end is not None)


class Chat:
    """A conversation about images; the cache is kept, so that a turn costs only its new tokens.

    Args:
        assistant: Assistant that answers.
        image: Image that the first question shows, or a list of several; None for a conversation
            without an image.
    """

    def __init__(self, assistant: Assistant, image: Shown) -> None:
        self.assistant, self.images = assistant, list(image_list(image))
        self.messages: list[Message] = []
        self._cached: list[int] = []
        self._forget()

    def ask(self, question: str, *, max_new_tokens: int = 256) -> Iterator[str]:
        """Answer the next question piece by piece.

        An answer that is read to its end becomes part of the conversation. The model stops at the
        next token when the reader leaves.

        Raises:
            ValueError: The conversation is longer than the model reads.
        """
        # Make the prompt, and cut the cache back to what the prompt begins with.
        assistant = self.assistant
        messages = [*self.messages, user_turn(question, 0 if self.messages else len(self.images))]
        if len(self.images) == 1:
            self.images = [assistant.encode_image(self.images[0])]
        prompt = assistant.prompt(messages, self.images, max_new_tokens=max_new_tokens)
        longest = getattr(assistant.model.config.get_text_config(), "max_position_embeddings", None)
        if longest and len(prompt.ids) >= longest:
            raise ValueError(
                f"the conversation has {len(prompt.ids):,} tokens, those of images included, and "
                f"the model reads {longest:,}: shorten it, or begin a new one"
            )
        self._keep_common_prefix(prompt.ids)

        # Generate in a thread; its callback puts the pieces into a queue, and None at the end.
        queue: SimpleQueue[str | None] = SimpleQueue()
        text = AnswerText(assistant.decode, assistant.end_tokens, max_new_tokens)
        tokens: list[int] = []
        errors: list[BaseException] = []
        left = Event()

        def on_tokens(new: list[int | None]) -> list[int]:
            (token,) = new
            assert token is not None  # the only row has not ended
            tokens.append(token)
            queue.put(text.add(token))
            return [0] if left.is_set() else []

        def work() -> None:
            try:
                assistant.generate([prompt], on_tokens, self._cache)
            except BaseException as error:  # nobody sees an exception of a thread
                errors.append(error)
            finally:
                queue.put(None)

        thread = Thread(target=work, daemon=True)
        thread.start()

        # Hand the pieces on. The reader may leave at any `yield`; the cache must be right then too.
        pieces: list[str] = []
        try:
            while (piece := queue.get()) is not None:
                if piece:
                    pieces.append(piece)
                    yield piece
        finally:
            left.set()
            thread.join()
            self._cached = [*prompt.ids, *tokens]
            if errors:
                self._forget()
        if errors:
            raise errors[0]
        self.messages = [*messages, Message("assistant", "".join(pieces))]

    def _forget(self) -> None:
        self._cache = DynamicCache(config=self.assistant.model.config.get_text_config())
        self._cached = []

    def _keep_common_prefix(self, ids: list[int]) -> None:
        """Cut the cache back to the tokens that a prompt begins with, all but its last one."""
        limit = min(self._cache.get_seq_length(), len(ids) - 1)
        same = next(
            (i for i, (a, b) in enumerate(zip(self._cached[:limit], ids, strict=False)) if a != b),
            limit,
        )
        # An image is read whole, and a cache that slides, or is a state, cannot go back.
        image_token, config = self.assistant.processor.image_token_id, self.assistant.model.config
        if image_token in ids[same:] or attention_window(config) or is_recurrent(config):
            same = 0

        if not same:
            self._forget()
        elif same < self._cache.get_seq_length():
            self._cache.crop(same - self._cache.get_seq_length())  # negative: tokens to remove


def load(
    path: str | Path | Run,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    adapter: str | Path | None = None,
) -> Assistant:
    """Load an assistant from a run, a run's folder or a checkpoint folder.

    Args:
        path: Run, run folder or checkpoint folder.
        device: Device of the model; None: the GPU where there is one.
        dtype: Dtype of weights and computation, such as "bfloat16"; None or "auto": bfloat16 on a
            GPU, float32 on a CPU.
        adapter: Adapter of this model in PEFT's format, which is used unmerged.

    Raises:
        FileNotFoundError: The run is not finished, or the folder is no checkpoint or no adapter.
        ValueError: The adapter is of another base, the dtype is none of float32, bfloat16 and
            float16, or there is no such device.
    """
    folder = path.final_checkpoint() if isinstance(path, Run) else model_folder(path)
    if isinstance(device, str):
        check_device(device)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    name = str(dtype or "auto").removeprefix("torch.")
    check_dtype(name)
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if adapter is not None:
        adapter = adapter_folder(adapter)
        check_base(adapter, folder)  # before the weights are loaded
    read_checkpoint(folder)  # refuses a folder before its processor is read
    processor = load_processor(folder)  # tries the chat template, before a GPU is in use
    base = Assistant(load_saved_model(str(folder), device, getattr(torch, name)), processor)
    return base if adapter is None else with_adapter(base, Path(adapter), folder)


def with_adapter(assistant: Assistant, adapter: Path, base: Path) -> Assistant:
    """Return an assistant with an adapter, that shares the weights of another.

    Args:
        assistant: Assistant of the base.
        adapter: Folder in PEFT's format, that `check_base` has passed.
        base: Checkpoint of the base.

    Raises:
        ValueError: The adapter does not fit the model.
    """
    model = attach_adapter(assistant.model, adapter, base)
    return Assistant(model, load_processor(base, *adapter_template(adapter)))


def render_prompt(processor: LlavaProcessor, question: str, num_images: int) -> str:
    """Return the whole text that the model reads for one question, each image as a placeholder."""
    return _write_prompt(processor, [user_turn(question, num_images)])


def _write_prompt(processor: LlavaProcessor, messages: Sequence[Message]) -> str:
    """Return a conversation that waits for the assistant."""
    return write_chat(
        processor.tokenizer,
        as_chat(tuple(messages)),
        str(processor.chat_template),
        "the chat template",
        prompt=True,
    )


def _size_of(image: AnyImage) -> tuple[int, int]:
    """Return the upright (width, height) of an image in pixels."""
    if isinstance(image, EncodedImage):
        return image.size
    if isinstance(image, (Path, bytes, StoredImage)):
        return upright_size(image)
    return upright_size(Path(image)) if isinstance(image, str) else upright_rgb(image).size


def _image_key(image: AnyImage) -> str:
    """Return a key that is the same for the same image."""
    if isinstance(image, (Path, str)):
        return str(image)
    return f"{hash(image)}" if isinstance(image, bytes) else f"object {id(image)}"


def _batches(order: Sequence[int], ends: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Cut batches in order; all images of a batch end at the same place."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == batch_size or ends[index] != ends[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
