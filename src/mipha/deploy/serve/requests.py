"""The body of a chat request -> what an engine is asked, or one sentence that refuses it.

bytes --strict JSON--> fields --pydantic models--> types and ranges --limits--> turns
turns --images read--> ChatRequest

Whatever would have no effect, or could pass for something else, is refused by name.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from mipha.data.sample import IMAGE
from mipha.deploy.serve.request_fields import (
    Body,
    ImageUrl,
    Message,
    RequestError,
    half_character,
    read_fields,
)
from mipha.deploy.serve.untrusted_images import fetch_image, read_untrusted_image, shown

_MIB = 1024 * 1024
_MOST_DIGITS = 20

_READERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="mipha-requests")
"""Threads that parse bodies and decode images: the server goes on, and memory is bounded."""

_CONTROL_TOKEN = re.compile(rf"{re.escape(IMAGE)}|<__media__>|<\|[^|<>\s]{{1,40}}\|>")
"""Texts that a chat template, llama.cpp's multimodal reader or a tokenizer would not read as text.

A tokenizer splits its control tokens off wherever they stand: typed by a user, they would end a
turn, begin another one's, or open a place for an image that is not there. They are refused and not
rewritten, because a question that was changed is another question.
"""

_DATA_URI = re.compile(r"data:([^,]{0,200}),", re.I)

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Args:
        body_bytes: Size of the whole request, images as base64 included.
        image_bytes: Size of one image file.
        max_pixels: Width x height of one image, read from its header; decoding takes up to 16 bytes
            a pixel for a moment.
        max_images: Images in one conversation.
        max_messages: Turns, the system's included.
        max_text_chars: Characters of all turns together.
        max_new_tokens: Longest answer, and the answer's limit where the request names none.
        fetch_seconds: Time from looking up an address to the image's last byte, redirects included.
        fetch_bytes: Size of one image from an address.
        allow_remote: Whether images are fetched from https addresses.
        control_tokens: Texts that the tokenizer reads as control tokens:
            `data.check.text.special_tokens_of`. The image marker and everything like `<|im_end|>`
            are refused in any case.
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


@dataclass(frozen=True)
class Turn:
    """One message.

    Args:
        role: Who speaks.
        text: Text without image markers or control tokens; texts of several parts stand on lines of
            their own.
        images: Upright RGB images; only a user's turn has any. They belong in front of the text, as
            in training.
    """

    role: Role
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """A request that an engine can answer.

    Args:
        turns: An optional system turn, then user and assistant in turn; the last is the user's.
        max_new_tokens: Longest answer, in tokens; the limit where the request names none.
        temperature: 0 to 2; 0, which is greedy, where the request names none.
        top_p: Above 0, up to 1.
        stop: Texts before which an answer ends.
        seed: Seed of the answer; None: any.
        stream: Whether the answer is sent piece by piece.
        include_usage: Whether the last piece counts the tokens.
        model: Name that was asked for; the app decides whether it is served.
    """

    turns: tuple[Turn, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int | None
    stream: bool
    include_usage: bool
    model: str


async def read_chat_request(
    body: bytes, limits: Limits, *, fetch: Callable[..., Awaitable[bytes]] = fetch_image
) -> ChatRequest:
    """Read a request of OpenAI's chat completions completely: JSON, fields, texts and images.

    Args:
        body: Body of the request.
        limits: Most that it may ask for.
        fetch: Function that gets an image from an address, if the limits allow it.

    Raises:
        RequestError: The bytes are anything else.
    """
    loop = asyncio.get_running_loop()
    fields, drafts = await loop.run_in_executor(_READERS, _parse, body, limits)

    turns = []
    for draft in drafts:
        images = []
        for unread in draft.images:
            try:
                data = unread.data or await fetch(
                    unread.url, max_bytes=limits.fetch_bytes, max_seconds=limits.fetch_seconds
                )
                images.append(
                    await loop.run_in_executor(
                        _READERS, read_untrusted_image, data, limits.max_pixels
                    )
                )
            except ValueError as error:
                sentence = " ".join(str(error).split())
                raise RequestError(
                    f"{unread.param}: {sentence}", code="invalid_image", param=unread.param
                ) from error
        turns.append(Turn(draft.role, draft.text, tuple(images)))
    return ChatRequest(tuple(turns), **fields)


@dataclass(frozen=True)
class _UnreadImage:
    """An image that is not read yet.

    Args:
        param: Place in the request.
        data: Bytes of the file; None where it is at an address.
        url: The address.
    """

    param: str
    data: bytes | None = None
    url: str = ""


@dataclass(frozen=True)
class _Draft:
    """One turn whose images are not read yet."""

    role: Role
    text: str
    images: tuple[_UnreadImage, ...]


def _parse(body: bytes, limits: Limits) -> tuple[dict[str, Any], tuple[_Draft, ...]]:
    """Return the fields of `ChatRequest` but its turns, and the drafts of the turns."""
    # None means the same as a field that is left out.
    request = {
        name: value for name, value in _json_object(body, limits).items() if value is not None
    }
    messages = request.get("messages")
    if isinstance(messages, list) and len(messages) > limits.max_messages:
        raise RequestError(
            f"messages holds {len(messages)} messages and {limits.max_messages} are read at most: "
            "begin a new conversation",
            param="messages",
        )
    body_fields = read_fields(request, limits.max_new_tokens)
    return _fields(body_fields, limits), _drafts(body_fields.messages, limits)


def _json_object(body: bytes, limits: Limits) -> dict[str, Any]:
    if len(body) > limits.body_bytes:
        raise RequestError(
            f"the body has {len(body):,} bytes and {limits.body_bytes:,} are read at most: "
            "send smaller images",
            status=413,
            code="body_too_large",
        )
    # Count before anything is built: twenty megabytes of empty lists would become half a gigabyte
    # of Python objects. Base64 has none of these characters.
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.max_text_chars + 10_000:
        raise RequestError(
            "the body holds too many values: send one conversation",
            status=413,
            code="body_too_large",
        )

    try:
        request = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_whole_number,
        )
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the body is not UTF-8 at byte {error.start}: encode it so", code="invalid_json"
        ) from error
    except RecursionError as error:
        raise RequestError(
            "the body is nested too deeply: send one object with model and messages",
            code="invalid_json",
        ) from error
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(
            f"the body is no JSON ({error}): send one object with model and messages",
            code="invalid_json",
        ) from error

    if not isinstance(request, dict):
        raise RequestError(
            f"the body is {shown(request)}, wanted one object with model and messages",
            code="invalid_json",
        )
    return request


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RequestError(
                f"the body gives {shown(name)} twice in one object: give it once",
                code="invalid_json",
            )
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise RequestError(
        f"the body holds {name}, which JSON does not know: write a number", code="invalid_json"
    )


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise RequestError(
            f"the body holds a number of {len(digits):,} digits: write a smaller one",
            code="invalid_json",
        )
    return int(digits)


def _fields(body: Body, limits: Limits) -> dict[str, Any]:
    """Check what the models cannot: limits, and fields that depend on one another."""
    lengths = set()
    for name in ("max_tokens", "max_completion_tokens"):
        length = getattr(body, name)
        if length is not None and length > limits.max_new_tokens:
            raise RequestError(
                f"{name} is {length}, wanted a whole number from 1 to {limits.max_new_tokens:,}",
                param=name,
            )
        lengths |= {length} - {None}
    if len(lengths) > 1:
        raise RequestError(
            "max_tokens and max_completion_tokens differ: give one of them", param="max_tokens"
        )

    options = body.stream_options
    if options and not body.stream:
        raise RequestError(
            "stream_options may hold include_usage, and only where stream is true",
            param="stream_options",
        )
    return {
        "model": _whole_text(body.model, "model"),
        "max_new_tokens": next(iter(lengths), limits.max_new_tokens),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stop": tuple(_whole_text(stop, "stop") for stop in body.stop),
        "seed": body.seed,
        "stream": body.stream,
        "include_usage": bool(options and options.include_usage),
    }


def _drafts(messages: list[Message], limits: Limits) -> tuple[_Draft, ...]:
    """Check a conversation: an optional system turn, then user and assistant, the user last."""
    drafts = tuple(
        _draft(message, f"messages[{number}]", limits) for number, message in enumerate(messages)
    )
    roles = [draft.role for draft in drafts]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise RequestError(
            f"the roles are {shown(', '.join(roles))}: begin with system or user, let user and "
            "assistant take turns, end with user",
            param="messages",
        )

    if (num_chars := sum(len(draft.text) for draft in drafts)) > limits.max_text_chars:
        raise RequestError(
            f"the messages have {num_chars:,} characters and {limits.max_text_chars:,} are read at "
            "most: shorten them",
            code="string_above_max_length",
            param="messages",
        )
    if (num_images := sum(len(draft.images) for draft in drafts)) > limits.max_images:
        raise RequestError(
            f"the conversation holds {num_images} images and this model reads {limits.max_images}: "
            "begin a new one for another image",
            param="messages",
        )
    return drafts


def _draft(message: Message, where: str, limits: Limits) -> _Draft:
    content = f"{where}.content"
    # The texts are joined before they are checked: two halves of a marker must not slip through.
    text = _only_words(
        "\n".join(part.text for part in message.content if part.type == "text"), content, limits
    )
    images = tuple(
        _unread_image(part.image_url, f"{content}[{number}].image_url", limits)
        for number, part in enumerate(message.content)
        if part.type == "image_url"
    )

    if images and message.role != "user":
        raise RequestError(
            f"{where} shows an image, which only the user can do: put it into a user message",
            param=content,
        )
    if not text.strip() and not images:
        raise RequestError(f"{where} says nothing: give it a text, or leave it out", param=content)
    # OpenAI renamed `system` to `developer`.
    return _Draft("system" if message.role == "developer" else message.role, text, images)


def _whole_text(text: str, where: str) -> str:
    """Return a text that every engine reads as it was sent.

    Raises:
        RequestError: It is no Unicode text, or ends early for a program in C.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise half_character(where) from error
    if "\0" in text:
        raise RequestError(f"{where} holds a zero character: remove it", param=where)
    return text


def _only_words(text: str, where: str, limits: Limits) -> str:
    if found := _CONTROL_TOKEN.search(text) or limits.control_tokens.search(text):
        raise RequestError(
            f"{where} holds {shown(found.group())}, which the model would read as a control token: "
            "leave it out or write it with spaces",
            code="control_token",
            param=where,
        )
    return _whole_text(text, where)


def _unread_image(image: ImageUrl, where: str, limits: Limits) -> _UnreadImage:
    if image.detail not in (None, "auto"):
        raise RequestError(
            f"{where}.detail is {shown(image.detail)}: this model has one resolution, leave it out",
            param=where,
        )
    if found := _DATA_URI.match(image.url):
        return _UnreadImage(where, data=_decoded(image.url, found, where, limits))
    if not re.match(r"https?:", image.url, re.I):
        raise RequestError(
            f"{where} is {shown(image.url)}: send the image itself as data:image/png;base64,...",
            param=where,
        )
    if not limits.allow_remote:
        raise RequestError(
            f"{where} is an address and this server fetches none: "
            "send the image itself as a data URI",
            param=where,
        )
    return _UnreadImage(where, url=image.url)


def _decoded(url: str, found: re.Match[str], where: str, limits: Limits) -> bytes:
    """Return the bytes of a data URI. Its label is not believed, and so not read."""
    if not found.group(1).lower().endswith(";base64"):
        raise RequestError(
            f"{where} is a data URI without base64: write data:image/png;base64,...", param=where
        )
    if (len(url) - found.end()) * 3 // 4 > limits.image_bytes + 2:
        raise RequestError(
            f"{where} has more than {limits.image_bytes:,} bytes: make the image smaller",
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
        raise RequestError(f"{where} holds no bytes: send the image's file", param=where)
    return data
