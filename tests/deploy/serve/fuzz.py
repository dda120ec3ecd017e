"""Random chat requests: good ones whose values, texts, bytes or images were changed."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator
from typing import Any

from PIL import Image

from tests.deploy.serve.hostile import MODEL, images, wrong_fields
from tests.fuzz import change, damaged

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_MODES = ("RGB", "RGBA", "L", "P", "1", "I;16", "CMYK")


def requests(seed: int) -> Iterator[bytes]:
    """Yield bodies without end."""
    chance = random.Random(seed)
    files = [data for _, data in images() if len(data) < 100_000]
    extras = [request for _, request in wrong_fields()]
    while True:
        request = _good(chance, files)
        for _ in range(chance.choice((0, 1, 1, 2, 4))):
            change(request, chance)
        if chance.random() < 0.1:
            request |= chance.choice(extras)

        body = json.dumps(request).encode()
        yield damaged(body, chance) if chance.random() < 0.3 else body


def _good(chance: random.Random, files: list[bytes]) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for _ in range(chance.randint(0, 2)):
        turns += [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    parts: list[dict[str, Any]] = [{"type": "text", "text": "What is this?"}]
    for _ in range(chance.choice((0, 1, 1, 2))):
        data = chance.choice(files) if chance.random() < 0.2 else image(chance)
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url, "detail": "auto"}})
    turns.append({"role": "user", "content": parts})
    return {"model": MODEL, "messages": turns, "max_tokens": 8, "temperature": 0.5, "stop": ["a"]}


def image(chance: random.Random) -> bytes:
    """Return an image file, often damaged."""
    kind, mode = chance.choice(_FORMATS), chance.choice(_MODES)
    size = chance.choice(((1, 1), (24, 24), (200, 3), (3, 500)))
    buffer = io.BytesIO()
    try:
        Image.new(mode, size, 1).save(buffer, kind)
    except (OSError, ValueError, TypeError):  # the format does not know the mode
        Image.new("RGB", size).save(buffer, kind)
    data = buffer.getvalue()
    return damaged(data, chance) if chance.random() < 0.6 else data
