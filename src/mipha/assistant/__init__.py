"""Image + question -> Answer: one at a time, many at once, streamed, or in several turns."""

from mipha.assistant.assistant import (
    Answer,
    Assistant,
    Chat,
    EncodedImage,
    Prompt,
    load,
    render_prompt,
    with_adapter,
)
from mipha.data.images import ImageLike

__all__ = [
    "Answer",
    "Assistant",
    "Chat",
    "EncodedImage",
    "ImageLike",
    "Prompt",
    "load",
    "render_prompt",
    "with_adapter",
]
