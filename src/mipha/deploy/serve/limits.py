"""What a stranger's request may ask for, and how it is refused."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_MIB = 1024 * 1024
_SHOWN_CHARS = 60


class RequestError(ValueError):
    """A request that is refused, in one sentence that its sender may read.

    Args:
        message: What is wrong and what to do.
        status: Of HTTP, 400 to 499.
        code: A word for programs.
        param: The place in the request, such as `messages[0].content`; null where it is the request as a whole.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Limits:
    """What one request may ask for at most.

    Args:
        body_bytes: The whole request, pictures as base64 included.
        image_bytes: One picture's file.
        max_pixels: One picture's width x height, read from its header; decoding takes up to 16 bytes a pixel for a moment.
        max_images: Pictures in one conversation.
        max_messages: Turns, the system's included.
        max_text_chars: Characters of all turns together.
        max_new_tokens: The longest answer, and the answer's limit where the request names none.
        fetch_seconds: From looking up an address to the picture's last byte, redirects included.
        fetch_bytes: One picture from an address.
        allow_remote: Whether pictures are fetched from https addresses.
        control_tokens: What the tokenizer reads as control tokens when it stands in a text: `data.check.text.special_tokens_of`.
            The image marker and everything like `<|im_end|>` are refused in any case.
    """

    body_bytes: int = 20 * _MIB
    image_bytes: int = 14 * _MIB
    max_pixels: int = 25_000_000
    max_images: int = 1
    max_messages: int = 64
    max_text_chars: int = 32_000
    max_new_tokens: int = 1_024
    fetch_seconds: float = 10.0
    fetch_bytes: int = 14 * _MIB
    allow_remote: bool = False
    control_tokens: re.Pattern[str] = re.compile(
        r"</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>"
    )


def shown(value: object) -> str:
    """A stranger's value as it may stand in a sentence: short, on one line, ASCII."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value[:_SHOWN_CHARS] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
