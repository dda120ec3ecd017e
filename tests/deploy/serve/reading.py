"""A chat request read in one go, as the server does it in steps."""

from __future__ import annotations

from typing import Any

from mipha.deploy.serve.requests import (
    ChatRequest,
    Limits,
    decode_images,
    fetch_images,
    measure_images,
    parse_request,
)


async def read_chat_request(body: bytes, limits: Limits, **options: Any) -> ChatRequest:
    """Return the request that a body holds; `options` are those of `fetch_images`."""
    parsed = await fetch_images(parse_request(body, limits), limits, **options)
    measure_images(parsed, limits)
    return decode_images(parsed, limits)
