"""Who may pass the gate: keys, Host names, time limits, and the line that each request leaves."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import re
import socket
import time
from collections.abc import Callable
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mipha.deploy.serve.app import create_app, create_loading_app
from mipha.deploy.serve.chat import Bounds
from mipha.deploy.serve.gate import Access, HostNames
from mipha.deploy.serve.metrics import Metrics
from mipha.deploy.serve.requests import Limits
from mipha.deploy.serve.server import host_names, listen

CHAT = "/v1/chat/completions"
CLOSED = ("/metrics", "/v1/models", "/v1/models/tiny", CHAT, "/v1/files", "/docs", "/openapi.json")


class Still:
    """An engine that is there and is never asked."""

    name = "still"

    def is_alive(self) -> bool:
        return True


def call(app: Any, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of one request, by ASGI alone."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "server": ("127.0.0.1", 80),
        "client": ("192.0.2.7", 1),
    }
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    try:
        return sent[0]["status"], json.loads(body)
    except ValueError:
        return sent[0]["status"], {}


def app_with(access: Access) -> Any:
    return create_app(Still(), "tiny", Metrics(), access=access)  # type: ignore[arg-type]


# Up to starlette 1.0.0 each of these makes "/" or "/health" of the path in `request.url`.
@pytest.mark.parametrize(
    "host", ["localhost", "x/#", "x/?", "x/health#", "x/health?", "/", "", "a@b", "[::1]/#", "x\\#"]
)
@pytest.mark.parametrize("path", CLOSED)
def test_no_host_header_opens_a_closed_path(path: str, host: str) -> None:
    app = app_with(Access("secret"))
    for method in ("GET", "POST", "HEAD", "OPTIONS"):
        assert call(app, path, method, host=host)[0] == 401, (method, path)
        assert call(app, path, method, host=host, authorization="Bearer secre")[0] == 401


def test_every_route_but_the_open_ones_is_closed() -> None:
    app = app_with(Access("secret"))
    paths = {route.path.replace("{name:path}", "tiny") for route in app.routes}
    assert {path for path in paths if call(app, path)[0] != 401} == {"/", "/health"}


@pytest.mark.parametrize(
    ("header", "passes"),
    [
        ("Bearer secret", True),
        ("bearer secret", True),
        ("BEARER  secret ", True),
        ("secret", False),
        ("Bearersecret", False),
        ("Basic secret", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("", False),
        ("Bearer secret2", False),
        ("Bearer s\u00e9cret", False),
    ],
)
def test_the_key_follows_the_scheme_bearer_in_any_case(header: str, passes: bool) -> None:
    status, _ = call(app_with(Access("secret")), "/v1/models", authorization=header)
    assert status == (200 if passes else 401)


@pytest.mark.parametrize("key", ["", " ", " a", "a ", "gr\u00fcn", "a\nb"])
def test_an_empty_or_odd_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        Access(key)


@pytest.mark.parametrize(
    ("at", "given", "answered", "refused"),
    [
        ("127.0.0.1", [], ["localhost", "127.0.0.1:8000", "[::1]:1", "LocalHost:80"], ["mipha"]),
        ("127.0.0.2", [], ["127.0.0.2", "localhost"], ["evil.example", "127.0.0.3"]),
        ("127.0.0.1", ["Mipha.lan"], ["mipha.lan:8000"], ["evil.mipha.lan", "mipha.lan.evil"]),
        ("0.0.0.0", [], ["10.1.2.3:8000", "[fe80::1]", "localhost"], ["evil.example", "x.local"]),
        (
            "127.0.0.1",
            [],
            ["localhost"],
            [
                "[::1].evil",
                "localhost:1@evil",
                "localhost:x",
                "localhost/",
                "",
                ":80",
                "a b",
                "[x]",
            ],
        ),
    ],
)
def test_names_come_from_the_address_of_the_socket(
    at: str, given: list[str], answered: list[str], refused: list[str]
) -> None:
    with listen(at, 0) as listening:
        app = app_with(Access(hosts=host_names(listening, given)))
    for path in ("/", "/metrics", "/v1/models"):
        assert {host: call(app, path, host=host)[0] for host in answered} == dict.fromkeys(
            answered, 200
        )
        assert {host: call(app, path, host=host)[0] for host in refused} == dict.fromkeys(
            refused, 421
        )


def test_health_is_open_and_names_the_model_only_to_those_who_may_ask() -> None:
    app = app_with(Access("secret", HostNames(frozenset({"localhost"}))))
    facts = {"status": "ok", "engine": "still", "model": "tiny"}
    for headers in ({}, {"host": "evil.example"}, {"host": "localhost"}):
        assert call(app, "/health", **headers) == (200, {"status": "ok"})
    headers = {"host": "localhost", "authorization": "Bearer secret"}
    assert call(app, "/health", **headers) == (200, facts)


def test_a_server_that_loads_says_so_everywhere() -> None:
    metrics = Metrics()
    loaded = Event()
    app = create_loading_app(metrics, loaded)
    assert call(app, "/health") == (503, {"status": "loading"})
    loaded.set()  # requests to the model wait for it
    for path in ("/", *CLOSED):
        status, body = call(app, path)
        assert (status, body["error"]["code"]) == (503, "loading")
    assert 'requests_total{path="/health",status="503"} 1' in metrics.text()


def _access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mipha.access"]


def _status_of(line: str) -> int:
    return int(re.search(r'" (\d{3}) ', line)[1])


def test_each_request_leaves_one_line_without_its_content(
    serving: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mipha.access")
    with serving() as server:
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "my secret"}]}
        assert server.http.post(CHAT, json=asked | {"max_tokens": 3}).status_code == 200
        assert server.http.post(CHAT, json=asked | {"n": 7}).status_code == 400
        assert server.http.get("/%0A127.0.0.1%20GET%20/fake%20200").status_code == 404
        assert server.http.request("A" * 5_000, "/health").status_code == 405
        # A client may have its answer before the line of it is written.
        until = time.monotonic() + 20
        while len(lines := _access_lines(caplog)) < 4 and time.monotonic() < until:
            time.sleep(0.01)
    good, bad, forged, long = sorted(lines, key=_status_of)
    assert good.startswith(f'127.0.0.1 POST "{CHAT}" 200 ') and "completion=3" in good
    assert bad.endswith("code=unsupported_parameter") and f'POST "{CHAT}" 400' in bad
    assert "\n" not in forged and forged.startswith('127.0.0.1 GET "/') and len(long) < 200
    assert "secret" not in "".join(lines)


def test_a_client_that_leaves_is_counted_as_such(
    serving: Callable, gate: Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mipha.access")
    with serving() as server:
        gate.clear()
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "left?"}]}
        with pytest.raises(httpx.ReadTimeout):
            server.http.post(CHAT, json=asked, timeout=httpx.Timeout(10, read=0.2))
        sample = f'requests_total{{path="{CHAT}",status="499"}}'
        while not server.metric(sample):
            time.sleep(0.01)
        gate.set()
        assert server.metric(f'requests_total{{path="{CHAT}",status="200"}}') == 0
    assert any(f'"{CHAT}" 499' in record.getMessage() for record in caplog.records)


# ---- Connections -----------------------------------------------------------------------------


def connect(url: str, content: bytes = b"") -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=20)
    connection.sendall(content)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Read what is left of an answer, and wait until the other side closes, for some seconds."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "


@pytest.mark.parametrize(
    "content", [b"", b"G", HALF, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + HALF]
)
def test_a_connection_without_a_whole_header_is_closed(serving: Callable, content: bytes) -> None:
    with serving(server={"header_seconds": 2.0}) as server:
        connection = connect(server.url, content)
        if content.startswith(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert is_closed(connection)
        assert server.http.get("/health").status_code == 200


def test_a_header_that_trickles_is_closed_too(serving: Callable) -> None:
    with serving(server={"header_seconds": 0.5}) as server:
        connection = connect(server.url, HALF)
        with pytest.raises(OSError):
            for _ in range(400):
                connection.sendall(b"y")
                time.sleep(0.05)


def test_a_long_answer_is_not_cut_by_the_time_for_headers(serving: Callable, gate: Event) -> None:
    with serving(server={"header_seconds": 0.2}) as server:
        gate.clear()
        body = json.dumps(
            {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "max_tokens": 2}
        ).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        connection = connect(
            server.url, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        )
        time.sleep(0.6)
        gate.set()
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_connections_that_do_nothing_keep_nobody_out(serving: Callable) -> None:
    with serving(server={"header_seconds": 30.0, "max_connections": 20}) as server:
        idle = [connect(server.url, HALF) for _ in range(60)]
        for _ in range(30):
            with httpx.Client(base_url=server.url, trust_env=False, timeout=20) as client:
                assert client.get("/health").status_code == 200
        assert sum(map(is_closed, idle[:40])) == 40  # the longest idle ones made room
        for connection in idle:
            connection.close()


def test_where_all_connections_are_at_work_one_more_is_told_so(
    serving: Callable, gate: Event
) -> None:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "?"}]}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with serving(server={"max_connections": 3}) as server:
        gate.clear()
        working = [connect(server.url, request) for _ in range(3)]
        while server.metric("requests_held") < 3:
            time.sleep(0.01)
        response = http.client.HTTPResponse(connect(server.url))
        response.begin()
        assert (response.status, response.headers["retry-after"]) == (503, "5")
        assert json.loads(response.read())["error"]["code"] == "server_busy"
        gate.set()
        assert all(one.recv(4096).startswith(b"HTTP/1.1 200") for one in working)


def test_a_stranger_writes_no_line_into_the_log(
    serving: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(bounds=Bounds(limits=Limits(body_bytes=50_000))) as server:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        for content in (b"nonsense\r\n\r\n", HALF + b"\r\n" + upgrade):
            assert connect(server.url, content).recv(4096).startswith(b"HTTP/1.1 ")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
