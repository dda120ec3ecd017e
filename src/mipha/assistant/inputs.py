"""What a question brings: its picture, in whatever form, and its words in the model's own template."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import LlavaProcessor

from mipha.data.encode import as_chat
from mipha.data.images import open_image
from mipha.data.sample import IMAGE, Message

ImageLike = Path | str | bytes | Image.Image | np.ndarray
"""A path, the bytes of an image file, a PIL image, or an array `(height, width, 3)` of 0..255."""


def render_prompt(processor: LlavaProcessor, question: str, has_image: bool) -> str:
    """The whole text that the model reads for one question, the image as one placeholder."""
    return templated(processor, [user_turn(question, has_image)], tokenize=False)


def user_turn(question: str, has_image: bool) -> Message:
    """The user's turn of one question, the image in front of it.

    Raises:
        ValueError: The question holds the image's marker.
    """
    if IMAGE in question:
        raise ValueError(
            f"question {question!r} holds {IMAGE}: leave it out, the image is put in front"
        )
    return Message("user", f"{IMAGE}\n{question}" if has_image else question)


def templated(processor: LlavaProcessor, messages: Sequence[Message], tokenize: bool) -> Any:
    """A conversation that waits for the assistant: its text, or its token ids."""
    return processor.tokenizer.apply_chat_template(
        as_chat(tuple(messages)),
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        tokenize=tokenize,
        return_dict=False,
    )


def image_key(image: ImageLike | None) -> str:
    """The same for the same image; empty without one."""
    if image is None:
        return ""
    return (
        str(image)
        if isinstance(image, (Path, str))
        else f"{hash(image)}"
        if isinstance(image, bytes)
        else f"object {id(image)}"
    )


def opened(image: ImageLike) -> Image.Image:
    """The picture, upright and RGB."""
    if isinstance(image, (Image.Image, np.ndarray)):
        buffer = io.BytesIO()
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
            buffer, format="PNG"
        )
        return open_image(buffer.getvalue())
    return open_image(Path(image) if isinstance(image, str) else image)
