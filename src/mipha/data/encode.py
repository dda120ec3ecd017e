"""Sample + processor -> token ids and labels.

The chat template decides which tokens are trained on, and the text is tokenised once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import LlavaProcessor

from mipha.answer_spans import NoMask, answer_spans, has_marks, renderer, supervise
from mipha.data.faults import RecordError
from mipha.data.images import ImageSource, size_or_grey
from mipha.data.region_text import write_sample
from mipha.data.sample import (
    BETWEEN_PLACES,
    IMAGE,
    Message,
    Sample,
    as_chat,
    content_parts,
    with_tiles,
)
from mipha.data.upstream_tokens import encode_conversation
from mipha.geometry import Span, geometry_of
from mipha.labels import IGNORE
from mipha.recipe import StageRecipe
from mipha.rendering import FAILURES, bounded, lost_words

__all__ = [
    "IGNORE",
    "Encoded",
    "as_chat",
    "blank",
    "encode",
    "encode_conversation",
    "encode_for",
    "expand_images",
    "image_spans",
    "with_tiles",
]


_FIX_TEMPLATE = "remove the sample, or choose another model.chat_template"


@dataclass(frozen=True)
class Encoded:
    """One sample as the model sees it.

    Args:
        id: The sample's.
        input_ids: `(tokens,)`, image placeholders already repeated.
        labels: `(tokens,)`: the same ids where trained on, else `IGNORE`; not shifted.
        images: One for each image span, in order.
        prefix: Leading tokens, through the only image, that another sample about the same image
            may share; 0 for none.
        truncated: Tokens cut off the end to fit.
        image_key: Equal for samples that show the same images by content; 0 where not known, so
            that only an image of the same place is the same.
        num_images: Images of the whole sample; 0: those that it has here.
        num_tiles: Images that the tower reads for it.
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImageSource, ...]
    prefix: int = 0
    truncated: int = 0
    image_key: int = 0
    num_images: int = 0
    num_tiles: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_for(sample: Sample, processor: LlavaProcessor, stage: StageRecipe) -> Encoded:
    """Tokenise a sample as a stage trains on it; errors as in `encode`."""
    text_limit = "text_limit" in stage.upstream
    return encode(sample, processor, stage.row_tokens, stage.prompt, text_limit)


def encode(
    sample: Sample,
    processor: LlavaProcessor,
    max_tokens: int,
    prompt: str = "chat",
    text_limit: bool = False,
) -> Encoded:
    """Tokenise a sample once, with its loss mask.

    Args:
        sample: Sample to encode.
        processor: Processor of the model; it holds the tokenizer and the chat template.
        max_tokens: Longest result, image tokens included. Text after the last image is cut to fit;
            an image is never cut. A document is cut between two of its paragraphs, and loses the
            images behind the cut.
        prompt: `chat` writes the conversation with the processor's template; `plain` writes images,
            then the assistant's words and a newline, as in LLaVA's first stage. A document is
            written without either.
        text_limit: Whether `max_tokens` counts an image as one token, as in upstream's training,
            which cuts the text before it puts the image's tokens in.

    Raises:
        RecordError: Nothing would be trained on, the images alone exceed `max_tokens`, images and
            their tokens do not match, or a text holds half of a character.
    """
    # Write and tokenise the conversation, then put in what stands for each image.
    check_text(sample)
    sample = write_sample(sample, getattr(processor, "boxes", None))
    if sample.is_document:
        return _encode_document(sample, processor, max_tokens)
    spans = image_spans(processor, sample.images)
    write = _plain if prompt == "plain" else _chat
    ids, supervised = write(sample, spans, processor)
    truncated = max(0, len(ids) - max_tokens) if text_limit else 0
    if text_limit:
        ids, supervised = ids[:max_tokens], supervised[:max_tokens]
    try:
        expanded = expand_images(ids, spans, processor)
    except ValueError as error:
        fix = f"is {IMAGE} in the wrong place?"
        if sum(turn.text.count(IMAGE) for turn in sample.messages) == len(sample.images):
            fix = "the chat template leaves images out, so choose another model.chat_template"
        raise RecordError(str(error), fix, f"sample {sample.id}", "image-count") from error
    supervised = np.repeat(supervised, expanded.repeats) & ~expanded.of_images
    max_tokens += len(expanded.ids) - len(ids) if text_limit else 0
    ids = expanded.ids
    labels = np.where(supervised, ids, IGNORE)  # (tokens,)

    # Check that the images fit.
    num_images, last_image = len(sample.images), expanded.end
    if last_image >= max_tokens:
        raise RecordError(
            f"through its {num_images} image(s) it takes {last_image} tokens of "
            f"row_tokens={max_tokens}",
            "raise row_tokens",
            f"sample {sample.id}",
            "too-many-images",
        )

    # Cut the end to fit; something to train on must be left.
    truncated += max(0, len(ids) - max_tokens)
    ids, labels = ids[:max_tokens], labels[:max_tokens]
    if (labels[1:] == IGNORE).all():
        marked = all(not m.learned for m in sample.messages if m.role == "assistant")
        cause = (
            "all its answers are marked as not to be learned"
            if marked
            else f"row_tokens={max_tokens} cuts its answer off"
            if truncated
            else "the assistant says nothing"
        )
        raise RecordError(
            f"no token is trained on, because {cause}",
            "fix or remove the sample",
            f"sample {sample.id}",
            "nothing-trained",
        )

    # Find the prefix that others may share. The token after it must not be supervised, because its
    # prediction is made at the last position of the prefix, which is shared.
    shared = (
        last_image
        if num_images == 1 and last_image < len(ids) and (labels[: last_image + 1] == IGNORE).all()
        else 0
    )
    num_tiles = sum(span.tiles for span in spans)
    return Encoded(
        id=sample.id,
        input_ids=ids,
        labels=labels,
        images=sample.images,
        prefix=shared,
        truncated=truncated,
        num_images=num_images,
        num_tiles=num_tiles,
    )


def _encode_document(sample: Sample, processor: LlavaProcessor, max_tokens: int) -> Encoded:
    """Tokenise a document: all its text is trained on, its images and what only joins them is not.

    The labels decode to the texts, a blank line between two. Where the document is too long, as
    many paragraphs and images as fit are kept, and the end-of-text token is not.
    """
    places = sample.messages[0].text.split(BETWEEN_PLACES)
    spans = image_spans(processor, sample.images)
    pieces = list(_document_pieces(places, spans, processor))
    lengths = np.cumsum([len(ids) for ids, _ in pieces])  # (places,)
    num_kept = int(np.searchsorted(lengths, max_tokens, side="right"))

    # Tokens of a first paragraph that is longer than a row are cut themselves.
    is_cut = num_kept < len(pieces)
    kept = pieces[: max(num_kept, 1)]
    if not num_kept and places[0] == IMAGE:
        raise RecordError(
            f"its first image takes {lengths[0]} tokens of row_tokens={max_tokens}",
            "raise row_tokens",
            f"sample {sample.id}",
            "too-many-images",
        )
    ids = np.concatenate([ids for ids, _ in kept])[:max_tokens]
    learned = np.concatenate([learned for _, learned in kept])[:max_tokens]
    labels = np.where(learned, ids, IGNORE)  # (tokens,)
    if (labels[1:] == IGNORE).all():
        cause = f"row_tokens={max_tokens} cuts its text off" if is_cut else "it has no text"
        raise RecordError(
            f"no token is trained on, because {cause}",
            "fix or remove the sample",
            f"sample {sample.id}",
            "nothing-trained",
        )
    num_images = sum(place == IMAGE for place in places[: max(num_kept, 1)])
    num_lost = int(lengths[-1]) - len(ids)
    shown = sample.images[:num_images]
    num_tiles = sum(span.tiles for span in spans[:num_images])
    return Encoded(
        id=sample.id,
        input_ids=ids,
        labels=labels,
        images=shown,
        truncated=num_lost,
        num_images=len(sample.images),
        num_tiles=num_tiles,
    )


def _document_pieces(
    places: Sequence[str], spans: Sequence[Span], processor: LlavaProcessor
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the tokens of each place of a document, and which of them are trained on.

    A blank line belongs to the text before it where another text comes later, so that the trained
    texts read as one; behind an image it is not trained on.
    """
    tokenizer, left = processor.tokenizer, iter(spans)
    last_text = max(number for number, place in enumerate(places) if place != IMAGE)
    begin, end = list(tokenizer("").input_ids), [tokenizer.eos_token_id]
    for number, place in enumerate(places):
        head = begin if number == 0 else []
        tail = end if number + 1 == len(places) else []
        joined = BETWEEN_PLACES if number + 1 < len(places) and number != last_text else ""
        if place == IMAGE:
            body = _span_ids(next(left), processor)
            body += tokenizer(joined, add_special_tokens=False).input_ids
        else:
            body = tokenizer(place + joined, add_special_tokens=False).input_ids

        ids = np.asarray([*head, *body, *tail])  # (tokens,)
        learned = np.full(len(ids), place != IMAGE)
        learned[: len(head)] = False
        learned[len(ids) - len(tail) :] = True
        yield ids, learned


def check_text(sample: Sample) -> None:
    """Check that no text holds half of a character: JSON can hold one, no tokenizer accepts it.

    Raises:
        RecordError: A text holds one.
    """
    for message in sample.messages:
        try:
            message.text.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                "a text holds half of a character (a lone surrogate)",
                "remove it",
                f"sample {sample.id}",
                "lone-surrogate",
            ) from error


class Expanded(NamedTuple):
    """Token ids with everything that stands for images.

    Args:
        ids: `(tokens,)`.
        repeats: How many tokens each id of the conversation became.
        of_images: `(tokens,)` booleans: image tokens, and the marks around them.
        end: Place behind the last of them; 0 without images.
    """

    ids: np.ndarray
    repeats: np.ndarray
    of_images: np.ndarray
    end: int


def image_spans(
    processor: LlavaProcessor,
    images: Sequence[Any],
    size_of: Callable[[Any], tuple[int, int]] = size_or_grey,
) -> list[Span]:
    """Return what stands for each image of one conversation.

    Args:
        processor: Processor of the model.
        images: Images of the conversation, in order.
        size_of: Function that gives the upright (width, height) of an image in pixels; not called
            where sizes do not matter.
    """
    if not images:
        return []
    geometry = geometry_of(processor)
    if not geometry.depends_on_size:
        return [geometry.span(1, 1)] * len(images)
    return [geometry.bounded_span(*size_of(image), len(images)) for image in images]


def expand_images(ids: np.ndarray, spans: Sequence[Span], processor: LlavaProcessor) -> Expanded:
    """Put what stands for each image in the place of its placeholder.

    Args:
        ids: `(tokens,)` of a conversation, one placeholder for each image (or each tile, where
            tiles are images of their own).
        spans: Result of `image_spans`.
        processor: Processor of the model.

    Raises:
        ValueError: Placeholders and images do not match.
    """
    image = processor.image_token_id
    places = np.flatnonzero(ids == image)
    pieces: list[list[int]] = []
    for span in spans:
        if span.in_conversation:
            pieces += [[image] * run for run in span.runs]
        else:
            pieces.append(_span_ids(span, processor))
    if len(places) != len(pieces):
        raise ValueError(f"its text holds {len(places)} images but {len(pieces)} are given")

    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[places] = [len(piece) for piece in pieces]
    of_images = np.repeat(ids == image, repeats)  # (tokens,)
    expanded = np.repeat(ids, repeats)
    if pieces:
        expanded[of_images] = np.concatenate(pieces)
    end = int(repeats[: places[-1] + 1].sum()) if len(places) else 0
    return Expanded(expanded, repeats, of_images, end)


def _span_ids(span: Span, processor: LlavaProcessor) -> list[int]:
    """Return the tokens of one image: its text tokenised as a whole, with the runs put in."""
    image = processor.image_token_id
    if span.text == IMAGE:
        return [image] * span.runs[0]
    text = span.text
    if span.in_conversation:  # a template would leave these newlines out
        text = text.replace(f"{IMAGE}\n", IMAGE)
    text = text.replace(IMAGE, processor.image_token)
    runs = iter(span.runs)
    return [
        token
        for piece in processor.tokenizer(text, add_special_tokens=False).input_ids
        for token in [piece] * (next(runs) if piece == image else 1)
    ]


def _chat(
    sample: Sample, spans: Sequence[Span], processor: LlavaProcessor
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask of the conversation in the processor's template.

    Raises:
        RecordError: The template refuses the conversation, leaves words of it out, or the answers
            that are learned cannot be told from the others.
    """
    messages = with_tiles(sample.messages, spans)
    if not has_marks(processor.chat_template):
        return _spanned(messages, sample, processor)

    chat = as_chat(messages)
    try:
        with bounded(processor.chat_template, "the chat template"):
            text = renderer(processor.tokenizer, processor.chat_template)(chat, False)
            encoded = processor.tokenizer.apply_chat_template(
                chat,
                chat_template=processor.chat_template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
    except FAILURES as error:
        raise RecordError(
            f"the chat template does not write such a conversation: {error}",
            _FIX_TEMPLATE,
            f"sample {sample.id}",
        ) from error
    _check_words(chat, text, sample)
    ids = np.asarray(encoded["input_ids"])
    supervised = np.asarray(encoded["assistant_masks"], dtype=bool)  # (tokens,)

    answers = [message for message in sample.messages if message.role == "assistant"]
    if all(message.learned for message in answers):
        return ids, supervised

    # The marks of the template are one stretch of tokens for each answer: leave some out.
    edges = np.flatnonzero(np.diff(supervised.astype(np.int8), prepend=0, append=0))
    stretches = edges.reshape(-1, 2)  # (answers, begin and end)
    if len(stretches) != len(answers):
        raise RecordError(
            f"the chat template marks {len(stretches)} stretches of tokens for {len(answers)} "
            "answers, so those that are not to be learned cannot be told",
            _FIX_TEMPLATE,
            f"sample {sample.id}",
            "loss-mark",
        )
    for (begin, end), message in zip(stretches, answers, strict=True):
        supervised[begin:end] &= message.learned
    return ids, supervised


def _spanned(
    messages: tuple[Message, ...], sample: Sample, processor: LlavaProcessor
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask of the conversation in a template without marks, as `answer_spans` does.

    Raises:
        RecordError: The template refuses the conversation, or its answers cannot be told exactly.
    """
    answers = [message for message in sample.messages if message.role == "assistant"]
    fix, chat = _FIX_TEMPLATE, as_chat(messages)
    render = renderer(processor.tokenizer, processor.chat_template)
    try:
        with bounded(processor.chat_template, "the chat template"):
            text, spans = answer_spans(render, chat, processor.turn_ends)
        learned = [span for span, message in zip(spans, answers, strict=True) if message.learned]
        encoded = supervise(processor.tokenizer, text, learned)
    except NoMask as error:
        problem = f"the chat template does not show what the assistant writes: {error}"
        if len(answers) > 1:
            fix = "make one sample of each answer, or choose another model.chat_template"
    except FAILURES as error:
        problem = f"the chat template does not write such a conversation: {error}"
    else:
        _check_words(chat, text, sample)
        return encoded
    raise RecordError(problem, fix, f"sample {sample.id}", "loss-mark")


def _check_words(chat: Sequence[dict[str, Any]], text: str, sample: Sample) -> None:
    """Check that a template has written all words of a conversation.

    Raises:
        RecordError: It has left some out, such as those of the system.
    """
    if lost := lost_words(chat, text):
        raise RecordError(f"the chat template {lost}", _FIX_TEMPLATE, f"sample {sample.id}")


def _plain(
    sample: Sample, spans: Sequence[Span], processor: LlavaProcessor
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask of images and caption: without the user's words and an end token.

    Source: the `plain` conversation of LLaVA and Mipha.
    """
    answers = [message for message in sample.messages if message.role == "assistant"]
    caption = "".join(message.text for message in answers if message.learned)
    tokenizer = processor.tokenizer
    head = list(tokenizer("").input_ids)  # the BOS, where there is one
    for message in with_tiles((Message("user", IMAGE),) * len(spans), spans):
        for part in content_parts(message.text):
            if part["type"] == "image":
                head.append(processor.image_token_id)
            else:
                head += tokenizer(part["text"], add_special_tokens=False).input_ids
    text = tokenizer(caption + "\n", add_special_tokens=False).input_ids
    learned = any(message.learned for message in answers)
    return np.asarray(head + text), (np.arange(len(head) + len(text)) >= len(head)) & learned


def blank(processor: LlavaProcessor, image: bytes) -> Encoded:
    """Return a sample with an image and nothing to learn.

    It keeps processes in step where one of them has no image of its own.
    """
    spans = image_spans(processor, [image])
    messages = with_tiles((Message("user", IMAGE),), spans)
    ids = [
        processor.image_token_id if part["type"] == "image" else processor.tokenizer.eos_token_id
        for part in content_parts(messages[0].text)
    ]
    ids = np.asarray([*ids, processor.tokenizer.eos_token_id])
    expanded = expand_images(ids, spans, processor).ids
    return Encoded("blank", expanded, np.full(len(expanded), IGNORE), (image,))
