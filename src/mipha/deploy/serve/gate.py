"""The gate that every request passes: size of its headers, Host name, API key, count and log line.

Every path is closed unless it is listed as open. The gate decides by `scope["path"]`, which the
router reads too, and never by a URL, because starlette builds that out of the Host header.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mipha.deploy.serve.chat import error_response, note
from mipha.deploy.serve.metrics import Metrics
from mipha.deploy.serve.requests import RequestError
from mipha.deploy.serve.untrusted_images import shown

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
PATHS = ("/", "/health", "/metrics", MODELS, CHAT)

NEEDS_NO_KEY = frozenset({"/", "/health"})
"""Paths that are open without the key; every other path is closed, those that do not exist too."""

NEEDS_NO_NAME = frozenset({"/health"})
"""Paths that are answered under any Host name, because probes ask by address."""

MAX_HEADER_BYTES = 16_384
"""Size of a request's headers; h11 itself stops reading only where they never end."""

_CLIENT_LEFT = 499
"""Status in counts and log of a request whose client left. Source: nginx."""

_NO_SNIFFING = (b"x-content-type-options", b"nosniff")

_HOST_HEADER = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9._-]{1,253}))(?::\d{1,5})?")

access_log = logging.getLogger("mipha.access")
"""One line a request: client, request, status, seconds, tokens; never content."""


@dataclass(frozen=True)
class HostNames:
    """Names under which the server answers.

    A web page whose own name was made to point to this machine sends that name, and is refused.

    Args:
        names: Names and numeric addresses, in lower case.
        any_address: Whether every numeric address is answered too: a server that listens at all
            addresses does not know them, and a name is needed for the attack.
    """

    names: frozenset[str]
    any_address: bool = False

    def __contains__(self, host_header: str) -> bool:
        found = _HOST_HEADER.fullmatch(host_header.strip().lower())
        name = found and (found[1] or found[2])
        return bool(name) and (name in self.names or (self.any_address and _is_address(name)))


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
        api_key: Key that requests must carry; None: anybody who reaches the server may ask.
        hosts: Names under which the server answers; None: any.

    Raises:
        ValueError: The key is empty, or cannot stand in a header.
    """

    api_key: str | None = None
    hosts: HostNames | None = None

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            raise ValueError(
                "the API key must be printable ASCII without spaces around it: choose another"
            )
        if key == "":
            raise ValueError(
                "the API key is empty: set --api-key or MIPHA_API_KEY to a text, or unset them"
            )

    def refusal(self, scope: Scope) -> RequestError | None:
        """Return why a request may not pass, None if it may; open paths pass without the key."""
        if scope["path"] not in NEEDS_NO_NAME and not self._has_name(scope):
            return RequestError(
                "this server does not answer under this Host name: ask it as localhost or by its "
                "address, or start it with an API key or --allow-host",
                status=421,
                code="wrong_host",
            )
        if scope["path"] not in NEEDS_NO_KEY and not self._has_key(scope):
            return RequestError(
                "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        return None

    def admits(self, scope: Scope) -> bool:
        """Return whether the sender may ask the model."""
        return self._has_name(scope) and self._has_key(scope)

    def _has_name(self, scope: Scope) -> bool:
        return self.hosts is None or _header(scope, b"host") in self.hosts

    def _has_key(self, scope: Scope) -> bool:
        if self.api_key is None:
            return True
        # The scheme is case-insensitive (RFC 9110, section 11.1).
        scheme, _, given = _header(scope, b"authorization").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode(), self.api_key.encode()
        )


class Gate:
    """Lets requests pass that may ask; counts and logs all of them.

    Args:
        app: Application behind the gate.
        access: Who may ask.
        metrics: Counts of the server.
    """

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self._app, self._access, self._metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._count(scope, status)
                others = (pair for pair in message["headers"] if pair != _NO_SNIFFING)
                message["headers"] = [*others, _NO_SNIFFING]
            await send(message)

        try:
            refusal = _too_long(scope) or self._access.refusal(scope)
            if refusal:
                note(scope, code=refusal.code)
                await error_response(refusal)(scope, receive, sending)
            else:
                await self._app(scope, receive, sending)
        except Exception:
            # The application's outermost layer answers, which is not behind the gate.
            if not status:
                status = 500
                self._count(scope, status)
            raise
        finally:
            if not status:
                status = _CLIENT_LEFT
                self._count(scope, status)
            access_log.info(_LogLine(scope, status, time.monotonic() - begun))

    def _count(self, scope: Scope, status: int) -> None:
        # A stranger must not make up labels.
        path = scope["path"] if scope["path"] in PATHS else "other"
        self._metrics.add("requests_total", path=path, status=str(status))


@dataclass(frozen=True)
class _LogLine:
    """A line of the access log, which is written only if somebody reads it."""

    scope: Scope
    status: int
    seconds: float

    def __str__(self) -> str:
        client = (self.scope.get("client") or ("-",))[0]
        method, path = self.scope["method"][:20], shown(self.scope["path"])
        facts = "".join(
            f" {name}={value}" for name, value in self.scope.get("mipha.facts", {}).items()
        )
        name = client if _is_address(client) else "-"
        return f"{name} {method} {path} {self.status} {self.seconds:.3f}s{facts}"


def _header(scope: Scope, wanted: bytes) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _too_long(scope: Scope) -> RequestError | None:
    """Return the refusal of too long headers: names, values, and the path with its query."""
    size = (
        len(scope["raw_path"])
        + len(scope["query_string"])
        + sum(len(name) + len(value) for name, value in scope["headers"])
    )
    if size <= MAX_HEADER_BYTES:
        return None
    return RequestError(
        f"the headers have {size:,} bytes and {MAX_HEADER_BYTES:,} are read at most: "
        "send what is long in the body",
        status=431,
        code="headers_too_large",
    )
