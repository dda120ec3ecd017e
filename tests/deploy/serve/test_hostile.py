"""More than 500 hostile requests: each gets a 4xx and a sentence, and the server is unharmed."""

from __future__ import annotations

import asyncio
import json
import re
import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from socket import create_connection
from threading import Thread
from urllib.parse import urlsplit

import pytest

from mipha.deploy.serve.requests import Limits, RequestError
from tests.deploy.serve.hostile import CUT_OFF, Body, Wire, bodies, good_request, wires
from tests.deploy.serve.reading import read_chat_request

_MOST_KIB = 1024 * 1024
"""Growth that the process may have; each bomb, unpacked, takes several times as much."""

# Answer of the HTTP reader below the application to bytes that are no request.
_NO_REQUEST = b"Invalid HTTP request received."


@pytest.fixture(scope="module")
def hostile() -> tuple[Body, ...]:
    return tuple(bodies())


def _is_sentence(text: object) -> bool:
    return isinstance(text, str) and 15 < len(text) < 400 and text.isprintable()


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_there_are_more_than_500_and_no_two_are_the_same(hostile: tuple[Body, ...]) -> None:
    requests = [*hostile, *wires()]
    assert (
        len({request.content for request in requests})
        == len({request.kind for request in requests})
        == len(requests)
        > 500
    )
    assert [body.content for body in bodies()] == [body.content for body in hostile]


@pytest.mark.parametrize("allow_remote", [False, True])
def test_every_body_is_refused_with_a_sentence(
    hostile: tuple[Body, ...], allow_remote: bool
) -> None:
    limits, before, wrong = Limits(allow_remote=allow_remote), _peak_kib(), []

    async def refuse_all() -> None:
        for kind, content in hostile:
            try:
                await read_chat_request(content, limits)
            except RequestError as error:
                if not (400 <= error.status < 500 and _is_sentence(str(error)) and error.code):
                    wrong.append((kind, error.status, str(error)))
            else:
                wrong.append((kind, 200, "accepted"))

    asyncio.run(refuse_all())
    assert wrong == []
    assert _peak_kib() - before < _MOST_KIB


def test_a_running_server_refuses_all_and_is_unharmed(
    serving: Callable, hostile: tuple[Body, ...]
) -> None:
    from mipha.deploy.serve.chat import Bounds
    from mipha.deploy.serve.gate import Access, HostNames

    posts = [Wire(kind, _post(content)) for kind, content in hostile]
    before = _peak_kib()
    with serving(
        bounds=Bounds(body_seconds=1.0),
        access=Access(hosts=HostNames(frozenset({"127.0.0.1", "localhost"}))),
    ) as server:
        host, _, port = urlsplit(server.url).netloc.partition(":")
        address = (host, int(port))
        first = _ask(address, _post(good_request()))
        assert first[0] == 200
        wrong = [trouble for trouble in _in_threads(address, [*posts, *wires()]) if trouble]
        assert not wrong, "\n".join(wrong)
        assert _ask(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
        again = _ask(address, _post(good_request()))
        assert again[0] == 200
        assert json.loads(again[1])["choices"] == json.loads(first[1])["choices"]
        assert server.comes_to_rest()
    assert _peak_kib() - before < _MOST_KIB


def _post(body: bytes) -> bytes:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _in_threads(
    address: tuple[str, int], requests: Sequence[Wire], num_threads: int = 6
) -> list[str]:
    troubles: list[str] = []

    def work(mine: Sequence[Wire]) -> None:
        troubles.extend(_trouble(address, wire) for wire in mine)

    threads = [
        Thread(target=work, args=(requests[number::num_threads],)) for number in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(troubles) == len(requests)
    return troubles


def _trouble(address: tuple[str, int], wire: Wire) -> str:
    """Return what is wrong with the answer to a request; empty if nothing is."""
    try:
        status, body = _ask(address, wire.content)
    except (OSError, HTTPException) as error:
        return (
            ""
            if CUT_OFF in wire.kind and isinstance(error, ConnectionError)
            else f"{wire.kind}: {error!r}"
        )
    if not 400 <= status < 500:
        return f"{wire.kind}: status {status}"
    if wire.content.startswith(b"HEAD ") or body == _NO_REQUEST:
        return ""
    try:
        sentence = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{wire.kind}: {status} {body[:100]!r}"
    return "" if _is_sentence(sentence) else f"{wire.kind}: {sentence!a}"


def _ask(address: tuple[str, int], request: bytes) -> tuple[int, bytes]:
    with create_connection(address, timeout=120) as connection:
        with suppress(OSError):  # the server has hung up; its answer can still be read
            connection.sendall(request)
        method = re.match(rb"[A-Z]*", request)
        assert method
        response = HTTPResponse(connection, method=method.group().decode())
        response.begin()
        return response.status, response.read()
