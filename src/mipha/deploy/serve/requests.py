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
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mipha.data.sample import IMAGE
from mipha.deploy.serve.untrusted_images import fetch_image, read_untrusted_image, shown

_MIB = 1024 * 1024
_MOST_DIGITS = 20
_MOST_STOPS = 4
_MOST_STOP_CHARS = 200
_SEED_END = 2**32
"""llama.cpp's seeds have 32 bits; the other engines take more."""

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


class RequestError(ValueError):
    """A request that is refused, in one sentence that its sender may read.

    Args:
        message: What is wrong and what to do.
        status: HTTP status, 400 to 499.
        code: Word for programs.
        param: Place in the request, such as `messages[0].content`; None for the request as a whole.
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
            `data.check.tokens.special_tokens_of`. The image marker and everything like `<|im_end|>`
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


# ---- Fields: types and ranges ----------------------------------------------------------------
# Source of the names: OpenAI's reference of chat completions. A description completes the sentence
# "FIELD is VALUE, wanted ...".


def _is_off(value: bool) -> bool:
    if value:
        raise ValueError("must be false")
    return value


_Off = Annotated[bool, AfterValidator(_is_off)]  # Literal[False] would take 0
_One = Annotated[int, Field(ge=1, le=1)]  # Literal[1] would take true
_Zero = Annotated[float, Field(ge=0, le=0)]
_EmptyList = Annotated[list[Any], Field(max_length=0)]
_EmptyObject = Annotated[dict[str, Any], Field(max_length=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _TextFormat(_Strict):
    type: Literal["text"]


class _WithoutEffect(_Strict):
    """Fields that this server cannot serve; only the values that change nothing are taken."""

    n: _One | None = None
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: _EmptyObject | None = None
    logprobs: _Off | None = None
    top_logprobs: _Zero | None = None
    tools: _EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: _EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: _TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: _Off | None = None
    audio: None = None
    moderation: None = None
    prediction: None = None
    web_search_options: None = None


class _Labels(_Strict):
    """Fields for the provider's books; no answer depends on them."""

    user: str | None = Field(None, description="a text")
    safety_identifier: str | None = Field(None, description="a text")
    prompt_cache_key: str | None = Field(None, description="a text")
    prompt_cache_retention: str | None = Field(None, description="a text")
    metadata: dict[Any, Any] | None = Field(None, description="an object")
    prompt_cache_options: dict[Any, Any] | None = Field(None, description="an object")


class _ImageUrl(_Strict):
    url: str
    detail: Any = None


class _Part(_Strict):
    """A text or an image; the other field stays unset."""

    type: Literal["text", "image_url"]
    text: str = Field(None)
    image_url: _ImageUrl = Field(None)

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> _Part:
        if self.model_fields_set != {"type", self.type}:
            raise ValueError("a part holds its type, and what the type names")
        return self


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _MessageExtras(_Strict):
    """Fields that the client's own message objects carry along; they must say nothing."""

    name: None = None
    refusal: None = None
    function_call: None = None
    audio: None = None
    tool_calls: _EmptyList | None = None
    annotations: _EmptyList | None = None


class _Message(_MessageExtras):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], BeforeValidator(_as_parts)]


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: _Off | None = None


_Length = Annotated[int, Field(ge=1)]
_StopText = Annotated[str, Field(min_length=1, max_length=_MOST_STOP_CHARS)]


class _Body(_WithoutEffect, _Labels):
    model: str = Field(min_length=1, max_length=300, description="a name that GET /v1/models lists")
    max_tokens: _Length | None = Field(
        None, description="a whole number from 1 to {max_new_tokens:,}"
    )
    max_completion_tokens: _Length | None = Field(
        None, description="a whole number from 1 to {max_new_tokens:,}"
    )
    temperature: float = Field(0.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, ge=0.001, le=1, description="a number from 0.001 to 1")
    stop: Annotated[list[_StopText], BeforeValidator(_as_list)] = Field(
        [],
        max_length=_MOST_STOPS,
        description=f"up to {_MOST_STOPS} texts of 1 to {_MOST_STOP_CHARS} characters",
    )
    seed: Annotated[int, Field(ge=0, lt=_SEED_END)] | None = Field(
        None, description=f"a whole number from 0 to {_SEED_END - 1:,}"
    )
    stream: bool = Field(False, description="true or false")
    stream_options: _StreamOptions | None = Field(
        None, description="include_usage and nothing else, and only where stream is true"
    )
    messages: list[_Message] = Field(min_length=1)


_MESSAGE_PLACES = {
    "messages": "a list with at least one message: ask something",
    "message": "an object with role and content",
    "role": "one of system, developer, user, assistant",
    "content": "a text or a list of parts",
    "part": '{"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}',
    "image_url": '{"url": ...} with a data URI',
}
"""Places in `messages` that a refusal names, and what is wanted there."""


def _refusal(error: ValidationError, request: dict[str, Any], limits: Limits) -> RequestError:
    """Return the first fault that pydantic found as one sentence; unknown fields come first."""
    problems = error.errors(include_url=False, include_context=False)
    problem = min(problems, key=lambda one: one["type"] != "extra_forbidden" or len(one["loc"]) > 1)
    place, kind = problem["loc"], problem["type"]

    if not place:
        return RequestError(
            "the body holds a name with half of a character (a lone surrogate): leave it out",
            code="unknown_parameter",
        )
    name = str(place[0])
    if name not in _Body.model_fields:
        return RequestError(
            f"{shown(name)} is no field of a chat request: leave it out", code="unknown_parameter"
        )
    if name == "messages":
        return _message_refusal(place[1:], request.get("messages"))

    value = shown(request.get(name))
    if name in _WithoutEffect.model_fields:
        return RequestError(
            f"{name} is {value}, which this server cannot do: leave it out",
            code="unsupported_parameter",
            param=name,
        )
    if kind == "string_unicode":
        return _half_character(name)
    wanted = str(_Body.model_fields[name].description).format(max_new_tokens=limits.max_new_tokens)
    return RequestError(f"{name} is {value}, wanted {wanted}", param=name)


def _message_refusal(place: tuple[int | str, ...], value: Any) -> RequestError:
    """Return what is wrong at a place in `messages`, named by the nearest place that we name."""
    param = kind = "messages"
    for step in place:
        if isinstance(step, int):
            param, kind = f"{param}[{step}]", "message" if kind == "messages" else "part"
        elif step in _MESSAGE_PLACES:
            param, kind = f"{param}.{step}", step
        elif kind == "message":
            return RequestError(
                f"{param} holds {shown(step)}, which this server does not use: leave it out",
                param=param,
            )
        else:
            break
        # A field that is missing has no value.
        value = value[step] if isinstance(step, int) else value.get(step)
    return RequestError(f"{param} is {shown(value)}, wanted {_MESSAGE_PLACES[kind]}", param=param)


def _half_character(where: str) -> RequestError:
    return RequestError(
        f"{where} holds half of a character (a lone surrogate): remove it", param=where
    )


# ---- From bytes to fields and turns -----------------------------------------------------------


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
    # A value of null says what leaving the field out says.
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
    try:
        checked = _Body.model_validate(request)
    except ValidationError as error:
        raise _refusal(error, request, limits) from None
    return _fields(checked, limits), _drafts(checked.messages, limits)


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


def _fields(body: _Body, limits: Limits) -> dict[str, Any]:
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


def _drafts(messages: list[_Message], limits: Limits) -> tuple[_Draft, ...]:
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


def _draft(message: _Message, where: str, limits: Limits) -> _Draft:
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
        raise _half_character(where) from error
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


def _unread_image(image: _ImageUrl, where: str, limits: Limits) -> _UnreadImage:
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
