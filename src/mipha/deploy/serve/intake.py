"""The body of a chat request -> what an engine is asked, or one sentence.

bytes --strict JSON--> fields --what would have no effect is refused--> turns --header first, then pixels--> ChatRequest
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from mipha.deploy.serve.content import Draft, read_messages, read_text
from mipha.deploy.serve.limits import Limits, RequestError, shown
from mipha.deploy.serve.pictures import read_picture
from mipha.deploy.serve.remote import fetch_image

__all__ = ["ChatRequest", "Limits", "RequestError", "Turn", "read_chat_request"]

_READERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="mipha-intake")
"""Bodies are parsed and pictures decoded here, two at a time: the server goes on answering, and memory has a bound."""

_MOST_DIGITS = 20
_MOST_STOPS = 4
_MOST_STOP_CHARS = 200
_SEED_END = 2**32
"""llama.cpp's seeds have 32 bits; the other engines take more."""

# Source of the names: OpenAI's chat completions reference. A value listed here changes nothing; another would be ignored: it is refused.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
}
_LABELS = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
} | {
    "metadata": dict,
    "prompt_cache_options": dict,
}
"""For the provider's books; no answer depends on them."""

_LENGTHS = ("max_tokens", "max_completion_tokens")
_READ = {
    "model",
    "messages",
    *_LENGTHS,
    "temperature",
    "top_p",
    "stop",
    "seed",
    "stream",
    "stream_options",
}


@dataclass(frozen=True)
class Turn:
    """One message.

    Args:
        text: Without image markers or control tokens; texts of several parts stand on lines of their own.
        images: Upright, RGB; only a user's turn has any. They belong in front of the text, as in training.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """What an engine is asked.

    Args:
        turns: An optional system turn, then user and assistant in turn; the last is the user's.
        max_new_tokens: Of the answer; the limit where the request names none.
        temperature: 0 to 2; 0, which is greedy, where the request names none.
        top_p: Up to 1.
        stop: Texts before which an answer ends.
        seed: Null: any.
        stream: Whether the answer is sent piece by piece.
        include_usage: Whether the last piece counts the tokens.
        model: The name that was asked for; whether it is served is for the app to say.
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
    """Read a request of OpenAI's chat completions completely: JSON, fields, texts and pictures.

    Args:
        fetch: Gets a picture from an address, if the limits allow it.

    Raises:
        RequestError: Whatever else the bytes are.
    """
    loop = asyncio.get_running_loop()
    fields, drafts = await loop.run_in_executor(_READERS, _parse, body, limits)
    turns = []
    for draft in drafts:
        images = []
        for source in draft.pictures:
            try:
                data = source.data or await fetch(
                    source.url, max_bytes=limits.fetch_bytes, max_seconds=limits.fetch_seconds
                )
                images.append(
                    await loop.run_in_executor(_READERS, read_picture, data, limits.max_pixels)
                )
            except ValueError as error:
                sentence = " ".join(str(error).split())
                raise RequestError(
                    f"{source.param}: {sentence}", code="invalid_image", param=source.param
                ) from error
        turns.append(Turn(draft.role, draft.text, tuple(images)))
    return ChatRequest(tuple(turns), **fields)


def _parse(body: bytes, limits: Limits) -> tuple[dict[str, Any], tuple[Draft, ...]]:
    request = _json_object(body, limits)
    for name, value in request.items():
        _check_effect(name, value)
    fields = _fields(request, limits)
    return fields, read_messages(request.get("messages"), limits)


def _json_object(body: bytes, limits: Limits) -> dict[str, Any]:
    if len(body) > limits.body_bytes:
        raise RequestError(
            f"the body has {len(body):,} bytes and {limits.body_bytes:,} are read at most: send smaller pictures",
            status=413,
            code="body_too_large",
        )
    # Before anything is built: twenty megabytes of empty lists would become half a gigabyte of Python objects. Base64 has none of these.
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


def _check_effect(name: str, value: Any) -> None:
    if name in _READ or value is None:
        return
    if name in _LABELS:
        if not isinstance(value, _LABELS[name]):
            raise RequestError(
                f"{name} is {shown(value)}, wanted {'an object' if _LABELS[name] is dict else 'a text'}",
                param=name,
            )
    elif name not in _NO_EFFECT:
        raise RequestError(
            f"{shown(name)} is no field of a chat request: leave it out", code="unknown_parameter"
        )
    elif not any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in _NO_EFFECT[name]
    ):
        raise RequestError(
            f"{name} is {shown(value)}, which this server cannot do: leave it out",
            code="unsupported_parameter",
            param=name,
        )


def _fields(request: dict[str, Any], limits: Limits) -> dict[str, Any]:
    model, most = request.get("model"), limits.max_new_tokens
    if not isinstance(model, str) or not model or len(model) > 300:
        raise RequestError(
            f"model is {shown(model)}, wanted a name that GET /v1/models lists", param="model"
        )
    lengths = {
        _number(request, name, most, 1, most, whole=True)
        for name in _LENGTHS
        if request.get(name) is not None
    }
    if len(lengths) > 1:
        raise RequestError(
            "max_tokens and max_completion_tokens differ: give one of them", param="max_tokens"
        )
    stream = _flag(request, "stream")
    options = request.get("stream_options")
    if options is not None and (
        not stream
        or not isinstance(options, dict)
        or set(options) - {"include_usage", "include_obfuscation"}
    ):
        raise RequestError(
            "stream_options may hold include_usage, and only where stream is true",
            param="stream_options",
        )
    if options and _flag(options, "include_obfuscation"):
        raise RequestError(
            "stream_options.include_obfuscation is true, which this server cannot do: leave it out",
            param="stream_options",
        )
    return {
        "model": read_text(model, "model"),
        "max_new_tokens": next(iter(lengths), most),
        "temperature": float(_number(request, "temperature", 0.0, 0, 2)),
        "top_p": float(_number(request, "top_p", 1.0, 0.001, 1)),
        "stop": _stop(request.get("stop")),
        "seed": _number(request, "seed", None, 0, _SEED_END - 1, whole=True),
        "stream": stream,
        "include_usage": bool(options) and _flag(options, "include_usage"),
    }


def _number(
    request: dict[str, Any], name: str, default: Any, low: float, high: float, whole: bool = False
) -> Any:
    value = request.get(name)
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int if whole else (int, float))
        or not low <= value <= high
    ):
        kind = "a whole number" if whole else "a number"
        raise RequestError(
            f"{name} is {shown(value)}, wanted {kind} from {low:,} to {high:,}", param=name
        )
    return value


def _flag(request: dict[str, Any], name: str) -> bool:
    value = request.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} is {shown(value)}, wanted true or false", param=name)
    return bool(value)


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else value if isinstance(value, list) else [value]
    if len(stops) > _MOST_STOPS or not all(
        isinstance(stop, str) and 0 < len(stop) <= _MOST_STOP_CHARS for stop in stops
    ):
        raise RequestError(
            f"stop must be up to {_MOST_STOPS} texts of 1 to {_MOST_STOP_CHARS} characters",
            param="stop",
        )
    return tuple(read_text(stop, "stop") for stop in stops)
