"""Random requests from a fixed seed: each is read, or refused with a sentence, and nothing else.

    python -m tests.deploy.serve.fuzz [--seconds 60] [--seed 1]

They are good requests whose values, texts, bytes or images were changed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from PIL import Image

from mipha.deploy.serve.requests import Limits, RequestError
from tests.deploy.serve.hostile import MODEL, images, wrong_fields
from tests.deploy.serve.reading import read_chat_request

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_MODES = ("RGB", "RGBA", "L", "P", "1", "I;16", "CMYK")

_ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e-320, 1e308, -0.0, 0.5, 1.5),
    *("", " ", "\0", "\ud800", "\u202e", "a" * 50_000, "<image>", "<|im_end|>", "</s>", "null"),
    *([], {}, [[]], [{}], [None], {"": None}, {"type": "text"}, {"url": "x"}, "data:,", "file:///"),
]


def requests(seed: int) -> Iterator[bytes]:
    """Yield bodies without end."""
    chance = random.Random(seed)
    files = [data for _, data in images() if len(data) < 100_000]
    extras = [request for _, request in wrong_fields()]
    while True:
        request = _good(chance, files)
        for _ in range(chance.choice((0, 1, 1, 2, 4))):
            _change(request, chance)
        if chance.random() < 0.1:
            request |= chance.choice(extras)

        body = json.dumps(request).encode()
        yield _damaged(body, chance) if chance.random() < 0.3 else body


async def read_all(seconds: float, seed: int, most: int | None = None) -> Counter[str]:
    """Read random requests and count how each ended; 200 is a request that was read.

    Raises:
        AssertionError: A request ended otherwise than with a sentence.
    """
    limits = Limits(max_pixels=1_000_000)
    ends: Counter[str] = Counter()
    until = time.monotonic() + seconds
    for number, body in enumerate(requests(seed)):
        if time.monotonic() > until or number == most:
            break
        try:
            await read_chat_request(body, limits)
            ends["200"] += 1
        except RequestError as error:
            sentence = str(error)
            good = 400 <= error.status < 500 and 15 < len(sentence) < 400 and sentence.isprintable()
            assert good, (seed, number, error.status, sentence)
            ends[f"{error.status} {error.code}"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, request {number}: {error!r}") from error
    return ends


def _good(chance: random.Random, files: list[bytes]) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for _ in range(chance.randint(0, 2)):
        turns += [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    parts: list[dict[str, Any]] = [{"type": "text", "text": "What is this?"}]
    for _ in range(chance.choice((0, 1, 1, 2))):
        data = chance.choice(files) if chance.random() < 0.2 else _image(chance)
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url, "detail": "auto"}})
    turns.append({"role": "user", "content": parts})
    return {"model": MODEL, "messages": turns, "max_tokens": 8, "temperature": 0.5, "stop": ["a"]}


def _image(chance: random.Random) -> bytes:
    """Return an image file, often damaged."""
    kind, mode = chance.choice(_FORMATS), chance.choice(_MODES)
    size = chance.choice(((1, 1), (24, 24), (200, 3), (3, 500)))
    buffer = io.BytesIO()
    try:
        Image.new(mode, size, 1).save(buffer, kind)
    except (OSError, ValueError, TypeError):  # the format does not know the mode
        Image.new("RGB", size).save(buffer, kind)
    data = buffer.getvalue()
    return _damaged(data, chance) if chance.random() < 0.6 else data


def _change(value: Any, chance: random.Random) -> None:
    """Change, remove or add one value somewhere in a JSON value."""
    while isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and chance.random() < 0.8:
            value = value[key]
            continue
        way = chance.random()
        if way < 0.6:
            value[key] = deepcopy(chance.choice(_ODD))
        elif way < 0.8:
            del value[key]
        elif isinstance(value, list):
            value.extend([value[key]] * chance.choice((1, 5, 70)))
        else:
            value[chance.choice(("text", "image_url", "name", "x", "\ud800"))] = deepcopy(
                chance.choice(_ODD)
            )
        return


def _damaged(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with some of them changed, cut out or doubled."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 20))):
        if not changed:
            break
        place = chance.randrange(len(changed))
        if chance.random() < 0.7:
            place = chance.randrange(min(len(changed), 64))  # headers decide
        length = chance.choice((1, 2, 4, 30))
        way = chance.random()
        if way < 0.5:
            changed[place : place + 1] = bytes([chance.choice((0, 1, 127, 128, 255))])
        elif way < 0.75:
            del changed[place : place + length]
        else:
            changed[place:place] = changed[place : place + length] * chance.choice((1, 50))
    return bytes(changed)


def main() -> None:
    """Read random requests for some time, and print how they ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.serve.fuzz")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    ends = asyncio.run(read_all(options.seconds, options.seed))
    print(f"{ends.total()} requests: {dict(ends.most_common())}")


if __name__ == "__main__":
    main()
