"""The fields of a chat request: names, types and ranges as pydantic models, and their refusals.

Source of the names: OpenAI's reference of chat completions. The description of a field completes
the sentence "FIELD is VALUE, wanted ...".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mipha.deploy.serve.untrusted_images import shown

_MOST_STOPS = 4
_MOST_STOP_CHARS = 200
_SEED_END = 2**32
"""llama.cpp's seeds have 32 bits; the other engines take more."""


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


class ImageUrl(_Strict):
    """An image as a data URI or an address.

    `detail` is a hint, and every image is read at the model's one resolution.
    """

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class _Part(_Strict):
    """A text or an image; the other field stays unset."""

    type: Literal["text", "image_url"]
    text: str = Field(None)
    image_url: ImageUrl = Field(None)

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


class Message(_MessageExtras):
    """One message; a content that is one text becomes one part.

    Only an assistant's content may be None.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part] | None, BeforeValidator(_as_parts)]


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: _Off | None = None


_Length = Annotated[int, Field(ge=1)]
_StopText = Annotated[str, Field(min_length=1, max_length=_MOST_STOP_CHARS)]


class Body(_WithoutEffect, _Labels):
    """The fields of a chat request."""

    model: str = Field(min_length=1, max_length=300, description="a name that GET /v1/models lists")
    max_tokens: _Length | None = Field(None, description="a whole number from 1")
    max_completion_tokens: _Length | None = Field(None, description="a whole number from 1")
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
    messages: list[Message] = Field(min_length=1)


def read_fields(request: dict[str, Any]) -> Body:
    """Check names, types and ranges of the fields of a request.

    Args:
        request: The JSON object, fields that are None left out.

    Raises:
        RequestError: A field is unknown, would have no effect, or holds a wrong value.
    """
    try:
        return Body.model_validate(request)
    except ValidationError as error:
        raise _refusal(error, request) from None


_MESSAGE_PLACES = {
    "messages": "a list with at least one message: ask something",
    "message": "an object with role and content",
    "role": "one of system, developer, user, assistant",
    "content": "a text or a list of parts",
    "part": '{"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}',
    "image_url": '{"url": ...} with a data URI, and detail low, high or auto if any',
}
"""Places in `messages` that a refusal names, and what is wanted there."""


def _refusal(error: ValidationError, request: dict[str, Any]) -> RequestError:
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
    if name not in Body.model_fields:
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
        return half_character(name)
    wanted = Body.model_fields[name].description
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


def half_character(where: str) -> RequestError:
    """Return the refusal of a text that is not Unicode."""
    return RequestError(
        f"{where} holds half of a character (a lone surrogate): remove it", param=where
    )
