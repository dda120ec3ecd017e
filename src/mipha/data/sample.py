"""The waist of the training data: every data set makes `Sample`s, all after it reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from mipha.data.faults import RecordError
from mipha.data.images import ImageSource
from mipha.data.regions import Region
from mipha.geometry import IMAGE, Span

__all__ = [
    *("IMAGE", "Message", "Remark", "Role", "Sample"),
    *("content_parts", "user_turn", "with_tiles"),
]

REGION = "<region>"
"""Stands in a message's text where a region's numbers go, if the sample has regions."""

BETWEEN_PLACES = "\n\n"
"""Stands between the texts and images of a document."""

Role = Literal["system", "user", "assistant", "document"]


@dataclass(frozen=True)
class Message:
    """One turn.

    Args:
        role: Who speaks.
        text: Words, with one `IMAGE` marker for each image, in order.
        learned: Whether an answer is trained on; False where the data mark it as not to be learned.
    """

    role: Role
    text: str
    learned: bool = True


class Remark(NamedTuple):
    """Something that a reader did or left undone, which people should hear of.

    Args:
        kind: Key of `check.findings.KINDS`.
        about: The same words for every row with this remark, so that rows can be counted.
        what: What this row holds.
    """

    kind: str
    about: str
    what: str


@dataclass(frozen=True)
class Sample:
    """One conversation about zero or more images; what the assistant says is trained on.

    Args:
        id: Name of the sample in every error message and report.
        messages: System (at most one, first), then user and assistant in turn; or one document,
            whose whole text is trained on.
        images: One for each marker, in order: a path, or the bytes of an image file.
        regions: Boxes and points, one for each `REGION` marker, in order; without any, such a
            marker is plain text.
        remarks: What the reader has to say; two samples that differ in it alone are equal.

    Raises:
        RecordError: Markers and images do not match, or the turns are in the wrong order.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = field(default=())
    regions: tuple[Region, ...] = field(default=(), kw_only=True)
    remarks: tuple[Remark, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        markers = sum(message.text.count(IMAGE) for message in self.messages)
        if markers != len(self.images):
            raise RecordError(
                f"{markers} {IMAGE} markers for {len(self.images)} images",
                "each image needs one marker",
                f"sample {self.id}",
                "image-count",
            )

        markers = sum(message.text.count(REGION) for message in self.messages)
        if self.regions and markers != len(self.regions):
            raise RecordError(
                f"{markers} {REGION} markers for {len(self.regions)} regions",
                "each region needs one marker",
                f"sample {self.id}",
                "region-count",
            )
        if self.is_document:
            return
        roles = [message.role for message in self.messages if message.role != "system"]
        if (
            not roles
            or roles != ["user", "assistant"] * (len(roles) // 2)
            or "system" in [m.role for m in self.messages[1:]]
        ):
            order = ", ".join(message.role for message in self.messages) or "nothing"
            raise RecordError(
                f"roles are {order}",
                "wanted an optional system turn, then user and assistant in turn",
                f"sample {self.id}",
                "role-order",
            )

    @property
    def is_document(self) -> bool:
        """Whether it is one document, and no conversation."""
        return [message.role for message in self.messages] == ["document"]


def as_chat(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return messages with content parts, as chat templates of transformers read them.

    The newline after an image is left to the template. The assistant's words lose the white space
    around them: a tokenizer would join it to the end of the prompt, and then no prompt would begin
    as it did in training.
    """
    return [
        {
            "role": message.role,
            "content": content_parts(
                message.text.strip() if message.role == "assistant" else message.text
            ),
        }
        for message in messages
    ]


def as_requested(question: str | Sequence[Message], uris: Sequence[str]) -> list[dict[str, Any]]:
    """Return a question, or a conversation, as a request of OpenAI's chat completions holds it.

    Args:
        question: As for `turns_of`.
        uris: Images in order, as data URIs.
    """
    images = iter(uris)
    asked = []
    for turn in as_chat(turns_of(question, len(uris))):
        parts = [
            {"type": "image_url", "image_url": {"url": next(images)}}
            if part["type"] == "image"
            else part
            for part in turn["content"]
        ]
        only_text = len(parts) == 1 and parts[0]["type"] == "text"
        asked.append({"role": turn["role"], "content": parts[0]["text"] if only_text else parts})
    return asked


def content_parts(text: str) -> list[dict[str, str]]:
    """Return a text as content parts: an image for each marker, and the words between them.

    The newline after an image is left to the chat template.
    """
    first, *rest = text.split(IMAGE)
    parts = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        parts.append({"type": "image"})
        if piece := piece.removeprefix("\n"):
            parts.append({"type": "text", "text": piece})
    return parts


def with_tiles(messages: Sequence[Message], spans: Sequence[Span]) -> tuple[Message, ...]:
    """Return messages in which each marker is what the chat template gets for the image.

    Only a model that takes tiles as images of their own has more than the marker there.
    """
    if not any(span.in_conversation for span in spans):
        return tuple(messages)
    texts = iter(span.text for span in spans)
    return tuple(
        replace(message, text=re.sub(IMAGE, lambda _: next(texts), message.text))
        for message in messages
    )


def user_turn(question: str, num_images: int) -> Message:
    """Return the user's turn of a question about images.

    Args:
        question: Text; one with as many markers as there are images says where each of them
            stands, and the images go in front of one without markers.
        num_images: Images of the question.

    Raises:
        ValueError: Markers and images do not match.
    """
    markers = question.count(IMAGE)
    if markers and markers != num_images:
        raise ValueError(
            f"question {question[:200]!r} holds {markers} {IMAGE} markers for {num_images} images: "
            "leave them out, and the images are put in front, or write one for each image"
        )
    return Message("user", question if markers else f"{IMAGE}\n" * num_images + question)


def turns_of(question: str | Sequence[Message], num_images: int) -> list[Message]:
    """Return the turns of a question: the user's one, or those of a conversation as they are.

    Args:
        question: Text, see `user_turn`; or turns with a marker for each image.
        num_images: Images of all turns.

    Raises:
        ValueError: Markers and images do not match.
    """
    if isinstance(question, str):
        return [user_turn(question, num_images)]
    markers = sum(turn.text.count(IMAGE) for turn in question)
    if markers != num_images:
        raise ValueError(
            f"the conversation holds {markers} {IMAGE} markers for {num_images} images: "
            "give one marker for each image"
        )
    return list(question)
