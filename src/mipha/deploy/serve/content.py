"""The `messages` of a chat request: who says what about which picture, and nothing that could pass for something else."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, Literal

from mipha.data.sample import IMAGE
from mipha.deploy.serve.limits import Limits, RequestError, shown

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""The client's word -> ours; OpenAI renamed `system` to `developer`."""

_CONTROL_TOKEN = re.compile(rf"{re.escape(IMAGE)}|<__media__>|<\|[^|<>\s]{{1,40}}\|>")
"""What a chat template, llama.cpp's multimodal reader and nearly every tokenizer would not read as text.

A tokenizer splits its control tokens off wherever they stand: typed by a user, they would end a turn, begin another one's, or open a
place for a picture that is not there. They are refused and not rewritten, for a question that was changed is another question.
"""

# What the client's own message objects carry along, at values that say nothing.
_EMPTY_FIELDS = {
    "name": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
    "function_call": (None,),
    "audio": (None,),
} | {"annotations": (None, [])}
_DATA_URI = re.compile(r"data:([^,]{0,200}),", re.I)


@dataclass(frozen=True)
class PictureSource:
    """A picture that is not read yet.

    Args:
        param: Its place in the request.
        data: The file's bytes; null where it is at an address.
        url: The address.
    """

    param: str
    data: bytes | None = None
    url: str = ""


@dataclass(frozen=True)
class Draft:
    """One turn, its pictures not read yet."""

    role: Literal["system", "user", "assistant"]
    text: str
    pictures: tuple[PictureSource, ...] = ()


def read_messages(messages: object, limits: Limits) -> tuple[Draft, ...]:
    """Check a conversation: an optional system turn, then user and assistant in turn, the last word the user's.

    Raises:
        RequestError: Anything else, with its place.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(
            "messages must be a list with at least one message: ask something", param="messages"
        )
    if len(messages) > limits.max_messages:
        raise RequestError(
            f"messages holds {len(messages)} messages and {limits.max_messages} are read at most: begin a new conversation",
            param="messages",
        )
    drafts = tuple(
        _draft(message, f"messages[{number}]", limits) for number, message in enumerate(messages)
    )
    roles = [draft.role for draft in drafts]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise RequestError(
            f"the roles are {shown(', '.join(roles))}: begin with system or user, let user and assistant take turns, end with user",
            param="messages",
        )
    if (num_chars := sum(len(draft.text) for draft in drafts)) > limits.max_text_chars:
        raise RequestError(
            f"the messages have {num_chars:,} characters and {limits.max_text_chars:,} are read at most: shorten them",
            code="string_above_max_length",
            param="messages",
        )
    if (num_images := sum(len(draft.pictures) for draft in drafts)) > limits.max_images:
        raise RequestError(
            f"the conversation holds {num_images} pictures and this model reads {limits.max_images}: begin a new one for another picture",
            param="messages",
        )
    return drafts


def _draft(message: object, where: str, limits: Limits) -> Draft:
    if not isinstance(message, dict):
        raise RequestError(
            f"{where} is {shown(message)}, wanted an object with role and content", param=where
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(
            f"{where}.role is {shown(role)}, wanted one of {', '.join(ROLES)}",
            param=f"{where}.role",
        )
    for name, value in message.items():
        if name not in ("role", "content") and not any(
            value == empty for empty in _EMPTY_FIELDS.get(name, ())
        ):
            raise RequestError(
                f"{where} holds {shown(name)}, which this server does not use: leave it out",
                param=where,
            )
    text, pictures = _content(message.get("content"), f"{where}.content", limits)
    if pictures and role != "user":
        raise RequestError(
            f"{where} shows a picture, which only the user can do: put it into a user message",
            param=f"{where}.content",
        )
    if not text.strip() and not pictures:
        raise RequestError(
            f"{where} says nothing: give it a text, or leave it out", param=f"{where}.content"
        )
    return Draft(ROLES[role], text, pictures)


def _content(content: object, where: str, limits: Limits) -> tuple[str, tuple[PictureSource, ...]]:
    if isinstance(content, str):
        return _only_words(content, where, limits), ()
    if not isinstance(content, list):
        raise RequestError(
            f"{where} is {shown(content)}, wanted a text or a list of parts", param=where
        )
    texts, pictures = [], []
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str) and len(part) == 2:
            texts.append(part["text"])
        elif kind == "image_url" and len(part) == 2:
            pictures.append(_picture(part.get("image_url"), f"{place}.image_url", limits))
        else:
            raise RequestError(
                f'{place} must be {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": {{"url": ...}}}}',
                param=place,
            )
    return _only_words("\n".join(texts), where, limits), tuple(
        pictures
    )  # joined first: two halves of a marker must not slip through


def read_text(text: str, where: str) -> str:
    """A text that every engine reads as it was sent.

    Raises:
        RequestError: It is no Unicode text, or ends early for a program in C.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where} holds half of a character (a lone surrogate): remove it", param=where
        ) from error
    if "\0" in text:
        raise RequestError(f"{where} holds a zero character: remove it", param=where)
    return text


def _only_words(text: str, where: str, limits: Limits) -> str:
    if found := _CONTROL_TOKEN.search(text) or limits.control_tokens.search(text):
        raise RequestError(
            f"{where} holds {shown(found.group())}, which the model would read as a control token: leave it out or write it with spaces",
            code="control_token",
            param=where,
        )
    return read_text(text, where)


def _picture(value: Any, where: str, limits: Limits) -> PictureSource:
    url = value.get("url") if isinstance(value, dict) else None
    if not isinstance(url, str) or set(value) - {"url", "detail"}:
        raise RequestError(f'{where} must be {{"url": ...}} with a data URI', param=where)
    if value.get("detail") not in (None, "auto"):
        raise RequestError(
            f"{where}.detail is {shown(value['detail'])}: this model has one resolution, leave it out",
            param=where,
        )
    if found := _DATA_URI.match(url):
        return PictureSource(where, data=_decoded(url, found, where, limits))
    if not re.match(r"https?:", url, re.I):
        raise RequestError(
            f"{where} is {shown(url)}: send the picture itself as data:image/png;base64,...",
            param=where,
        )
    if not limits.allow_remote:
        raise RequestError(
            f"{where} is an address and this server fetches none: send the picture itself as a data URI",
            param=where,
        )
    return PictureSource(where, url=url)


def _decoded(url: str, found: re.Match[str], where: str, limits: Limits) -> bytes:
    """What the label says is not believed, and so not read."""
    if not found.group(1).lower().endswith(";base64"):
        raise RequestError(
            f"{where} is a data URI without base64: write data:image/png;base64,...", param=where
        )
    if (len(url) - found.end()) * 3 // 4 > limits.image_bytes + 2:
        raise RequestError(
            f"{where} has more than {limits.image_bytes:,} bytes: make the picture smaller",
            status=413,
            code="image_too_large",
            param=where,
        )
    try:
        data = base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"{where} is no whole base64: encode the file again, without line breaks", param=where
        ) from error
    if not data:
        raise RequestError(f"{where} holds no bytes: send the picture's file", param=where)
    return data
