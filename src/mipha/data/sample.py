"""The waist of the training data: every data set makes `Sample`s, all after it reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mipha.data.faults import RecordError
from mipha.data.images import ImageSource

IMAGE = "<image>"
"""Stands in a message's text where an image goes."""

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
        remarks: What the reader has to say; two samples that differ in it alone are equal.

    Raises:
        RecordError: Markers and images do not match, or the turns are in the wrong order.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = field(default=())
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
