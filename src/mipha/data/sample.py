"""The waist of the training data: every data set makes `Sample`s, all after it reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mipha.data.faults import RecordError
from mipha.data.images import ImageSource

IMAGE = "<image>"
"""Stands in a message's text where an image goes."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn; `text` holds one `IMAGE` marker for each image, in order."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One conversation about zero or more images; what the assistant says is trained on.

    Args:
        id: Name of the sample in every error message and report.
        messages: System (at most one, first), then user and assistant in turn.
        images: One for each marker, in order: a path, or the bytes of an image file.

    Raises:
        RecordError: Markers and images do not match, or the turns are in the wrong order.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = field(default=())

    def __post_init__(self) -> None:
        markers = sum(message.text.count(IMAGE) for message in self.messages)
        if markers != len(self.images):
            raise RecordError(
                f"{markers} {IMAGE} markers for {len(self.images)} images",
                "each image needs one marker",
                f"sample {self.id}",
                "image-count",
            )

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
