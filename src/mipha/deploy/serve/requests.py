"""The body of a chat request -> what an engine is asked, or one sentence that refuses it.

parse_request:  bytes --strict JSON--> fields --pydantic models--> types --limits--> turns
fetch_images:   images at addresses -> their files
decode_images:  image files -> ChatRequest

Three steps, because each has a bound of its own: parsing is quick, an address may be slow, and
decoding takes memory. What would change the answer but cannot be done, or could pass for something
else, is refused by name.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
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
from mipha.deploy.serve.untrusted_images import (
    decoded_bytes,
    fetch_image,
    read_untrusted_image,
    shown,
)

_MIB = 1024 * 1024
_MOST_DIGITS = 20

_CONTROL_TOKEN = re.compile(rf"{re.escape(IMAGE)}|<__media__>|<\|[^|<>\s]{{1,40}}\|>")
"""Texts that a chat template, llama.cpp's multimodal reader or a tokenizer would not read as text.

A tokenizer splits its control tokens off wherever they stand: typed by a user, they would end a
turn, begin another one's, or open a place for an image that is not there. They are refused and not
rewritten, because a question that was changed is another question. In an assistant's turn they are
dropped, as the decoder drops them from answers: what an engine answered is accepted as history.
"""

_DATA_URI = re.compile(r"data:([^,]{0,200}),", re.I)

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Args:
        body_bytes: Size of the whole request, images as base64 included.
        image_bytes: Size of one image file.
        max_pixels: Width x height of one image, read from its header.
        decoded_bytes: Size of all images of a request while they are decoded, by their headers:
            width x height x channels x bytes a channel.
        max_images: Images in one conversation.
        max_messages: Turns, the system's included.
        max_text_chars: Characters of all turns together.
        max_new_tokens: Longest answer, whatever the request names.
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
    decoded_bytes: int = 160_000_000
    max_images: int = 4
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
        text: Text without control tokens; texts of several parts stand on lines of their own. With
            several images it holds a marker for each, where the request has them.
        images: Upright RGB images; only a user's turn has any. A single one belongs in front of the
            text, as in training.
    """

    role: Role
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """A request that an engine can answer.

    Args:
        turns: An optional system turn, then user and assistant in turn; the last is the user's.
        max_new_tokens: Longest answer, in tokens; at most the server's limit.
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


@dataclass(frozen=True)
class _UnreadImage:
    """An image that is not decoded yet.

    Args:
        param: Place in the request.
        data: Bytes of the file; None while it is at an address.
        url: The address.
    """

    param: str
    data: bytes | None = None
    url: str = ""


@dataclass(frozen=True)
class _Draft:
    """One turn whose images are not decoded yet."""

    role: Role
    text: str
    images: tuple[_UnreadImage, ...]


@dataclass(frozen=True)
class ParsedRequest:
    """A request whose images are not decoded yet.

    Args:
        fields: Fields of `ChatRequest` but its turns.
        drafts: The turns.
    """

    fields: dict[str, Any]
    drafts: tuple[_Draft, ...]

    @property
    def model(self) -> str:
        """Return the name that was asked for."""
        return self.fields["model"]

    @property
    def images(self) -> list[_UnreadImage]:
        """Return the images of all turns."""
        return [image for draft in self.drafts for image in draft.images]


def parse_request(body: bytes, limits: Limits) -> ParsedRequest:
    """Read a request of OpenAI's chat completions up to its images.

    Args:
        body: Body of the request.
        limits: Most that it may ask for.

    Raises:
        RequestError: The bytes are anything else.
    """
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
    body_fields = read_fields(request)
    return ParsedRequest(_fields(body_fields, limits), _drafts(body_fields.messages, limits))


async def fetch_images(
    parsed: ParsedRequest, limits: Limits, fetch: Callable[..., Awaitable[bytes]] = fetch_image
) -> ParsedRequest:
    """Return a request with the files of all its images.

    Args:
        parsed: Request whose images may be at addresses.
        limits: Size and time of a fetch.
        fetch: Function that gets a file from an address.

    Raises:
        RequestError: An address gives no file.
    """

    async def fetched(image: _UnreadImage) -> _UnreadImage:
        if image.data is not None:
            return image
        try:
            data = await fetch(
                image.url, max_bytes=limits.fetch_bytes, max_seconds=limits.fetch_seconds
            )
        except ValueError as error:
            raise _invalid_image(image, error) from error
        return replace(image, data=data)

    drafts = [
        replace(draft, images=tuple([await fetched(image) for image in draft.images]))
        for draft in parsed.drafts
    ]
    return replace(parsed, drafts=tuple(drafts))


def measure_images(parsed: ParsedRequest, limits: Limits) -> int:
    """Return how many bytes the images of a request take while they are decoded.

    Raises:
        RequestError: A header is none of an image, or the images are too large.
    """
    total = 0
    for image in parsed.images:
        assert image.data is not None
        try:
            total += decoded_bytes(image.data, limits.max_pixels)
            if total > limits.decoded_bytes:
                raise ValueError(
                    f"with this image, {total:,} bytes would be decoded, and "
                    f"{limits.decoded_bytes:,} are at most: make the images smaller"
                )
        except ValueError as error:
            raise _invalid_image(image, error) from error
    return total


def decode_images(parsed: ParsedRequest, limits: Limits) -> ChatRequest:
    """Decode the images of a request, which `measure_images` has let pass.

    Raises:
        RequestError: An image is damaged.
    """
    turns = []
    for draft in parsed.drafts:
        images = []
        for image in draft.images:
            assert image.data is not None
            try:
                images.append(read_untrusted_image(image.data, limits.max_pixels))
            except ValueError as error:
                raise _invalid_image(image, error) from error
        turns.append(Turn(draft.role, draft.text, tuple(images)))
    return ChatRequest(tuple(turns), **parsed.fields)


def _invalid_image(image: _UnreadImage, error: ValueError) -> RequestError:
    sentence = " ".join(str(error).split())
    return RequestError(f"{image.param}: {sentence}", code="invalid_image", param=image.param)


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
    # A longer answer than the limit is cut there, and its finish_reason "length" tells so: clients
    # send a length of their own by default.
    lengths = {body.max_tokens, body.max_completion_tokens} - {None}
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
        "max_new_tokens": min([limits.max_new_tokens, *lengths]),
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
            f"the conversation holds {num_images} images and {limits.max_images} are read at most: "
            "begin a new one, or start the server with a larger --max-images",
            param="messages",
        )
    return drafts


def _draft(message: Message, where: str, limits: Limits) -> _Draft:
    content = f"{where}.content"
    if message.content is None and message.role != "assistant":
        raise RequestError(
            f"{content} is {shown(None)}, wanted a text or a list of parts", param=content
        )
    parts = message.content or []

    # The texts are joined before they are checked: two halves of a marker must not slip through.
    text = "\n".join(part.text for part in parts if part.type == "text")
    if message.role == "assistant":
        text = _without_control_tokens(text, limits)
    text = _only_words(text, content, limits)
    images = tuple(
        _unread_image(part.image_url, f"{content}[{number}].image_url", limits)
        for number, part in enumerate(parts)
        if part.type == "image_url"
    )

    if images and message.role != "user":
        raise RequestError(
            f"{where} shows an image, which only the user can do: put it into a user message",
            param=content,
        )
    # An answer may be empty, so an assistant's turn may be too.
    if not text.strip() and not images and message.role != "assistant":
        raise RequestError(f"{where} says nothing: give it a text, or leave it out", param=content)
    if len(images) > 1:
        text = "\n".join(part.text if part.type == "text" else IMAGE for part in parts)
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


def _without_control_tokens(text: str, limits: Limits) -> str:
    """Return an answer as the decoder gives it; a space keeps two halves from joining."""
    for pattern in (_CONTROL_TOKEN, limits.control_tokens):
        text = pattern.sub(" ", text)
    return text.replace("\0", "")


def _unread_image(image: ImageUrl, where: str, limits: Limits) -> _UnreadImage:
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
