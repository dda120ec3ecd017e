"""The front: routes, keys, names, errors and the web page, the same for every engine behind it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from functools import cache
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mipha.deploy.serve.chat import Bounds, Chat, check_model, error_response
from mipha.deploy.serve.engine import Engine, ServiceError
from mipha.deploy.serve.metrics import Metrics
from mipha.deploy.serve.requests import RequestError

_CHAT, _MODELS = "/v1/chat/completions", "/v1/models"
_PATHS = ("/", "/health", "/metrics", _MODELS, _CHAT)

MAX_HEADER_BYTES = 16_384
"""Size of a request's headers; h11 itself stops reading only where they never end."""

_NO_SNIFFING = (b"x-content-type-options", b"nosniff")

_NO_OTHERS = (
    "default-src 'none'; connect-src 'self'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page: nothing from elsewhere."""


def create_app(
    engine: Engine,
    model: str,
    metrics: Metrics,
    bounds: Bounds | None = None,
    api_key: str | None = None,
    hosts: frozenset[str] | None = None,
) -> Starlette:
    """Make the ASGI application; whoever starts the engine and the server closes them.

    Args:
        engine: Engine that answers.
        model: Name of the model, which requests give and which is listed.
        metrics: Counts and times that are shown.
        bounds: Load that is taken on at a time.
        api_key: Key that requests must carry; None: anybody who reaches the server may ask.
        hosts: Names under which the server may be asked; None: any. It keeps out a web page whose
            own name was made to point to this machine.
    """
    chat = Chat(engine, model, bounds or Bounds(), metrics)
    card = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "mipha"}

    def check(request: Request) -> None:
        if hosts is not None and _host(request) not in hosts:
            raise RequestError(
                "this server answers only under the name it was started with: ask it as localhost, "
                "or start it with an API key",
                status=421,
                code="wrong_host",
            )
        if request.url.path != "/" and api_key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                raise RequestError(
                    "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                    status=401,
                    code="invalid_api_key",
                )

    async def web_page(request: Request) -> Response:
        check(request)
        return HTMLResponse(page(), headers=page_headers())

    async def health(_: Request) -> Response:
        alive = engine.is_alive()
        return JSONResponse(
            {"status": "ok" if alive else "failed", "engine": engine.name, "model": model},
            200 if alive else 503,
        )

    async def figures(request: Request) -> Response:
        check(request)
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        check(request)
        return JSONResponse({"object": "list", "data": [card]})

    async def one_model(request: Request) -> Response:
        check(request)
        check_model(request.path_params["name"], model)
        return JSONResponse(card)

    async def completions(request: Request) -> ASGIApp:
        check(request)
        return chat.answer  # not a finished response: it watches the connection while it works

    routes = [
        Route("/", web_page),
        Route("/health", health),
        Route("/metrics", figures),
        Route(_MODELS, models),
        Route(_MODELS + "/{name:path}", one_model),
        Route(_CHAT, completions, methods=["POST"]),
    ]
    handlers = {
        HTTPException: _no_route,
        RequestError: _failed,
        ServiceError: _failed,
        ClientDisconnect: _gone,
        Exception: _broken,
    }
    app = Starlette(
        routes=routes,
        exception_handlers=handlers,
        middleware=[Middleware(_Counted, metrics=metrics)],
    )
    app.router.redirect_slashes = False  # an unknown path gets a sentence, not another address
    return app


class _Counted:
    """Counts every response, adds the header that all have, and refuses too long headers."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A stranger must not make up labels.
                path = scope["path"] if scope["path"] in _PATHS else "other"
                self._metrics.add("requests_total", path=path, status=str(message["status"]))
                message["headers"] = [
                    *(pair for pair in message["headers"] if pair != _NO_SNIFFING),
                    _NO_SNIFFING,
                ]
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif (size := _header_bytes(scope)) > MAX_HEADER_BYTES:
            refusal = RequestError(
                f"the headers have {size:,} bytes and {MAX_HEADER_BYTES:,} are read at most: "
                "send what is long in the body",
                status=431,
                code="headers_too_large",
            )
            await error_response(refusal)(scope, receive, counted)
        else:
            await self._app(scope, receive, counted)


def _header_bytes(scope: Scope) -> int:
    """Return the size of names and values, and of the path with its query."""
    return (
        len(scope["raw_path"])
        + len(scope["query_string"])
        + sum(len(name) + len(value) for name, value in scope["headers"])
    )


def _host(request: Request) -> str:
    """Return the name in the Host header, without the port."""
    host = request.headers.get("host", "").strip().lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:80]!r}"
    sentences = {
        404: f"{what} is not here: ask one of {', '.join(_PATHS)}",
        405: f"{what} does not exist: ask with another method",
    }
    refusal = RequestError(
        sentences.get(error.status_code, error.detail), status=error.status_code, code="not_found"
    )
    return error_response(refusal, dict(error.headers or {}))


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, (RequestError, ServiceError))
    return error_response(error)


async def _gone(_: Request, error: Exception) -> Response:
    # Nobody reads it. Source: nginx's status of a request whose client left.
    return Response(status_code=499)


async def _broken(_: Request, error: Exception) -> Response:
    # Starlette logs the error itself.
    return error_response(ServiceError("the server failed on this request: see its log"))


# ---- The web page -----------------------------------------------------------------------------


@cache
def page() -> str:
    """Return the web page as one HTML text that needs nothing beside it."""
    return _part("html").replace("$style", _part("css")).replace("$script", _part("js"))


def page_headers() -> dict[str, str]:
    """Return the headers of the page: it runs its own script and talks to this server alone."""
    policy = f"{_NO_OTHERS}; style-src {_hash(_part('css'))}; script-src {_hash(_part('js'))}"
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


@cache
def _part(kind: str) -> str:
    return (
        resources.files("mipha.deploy.serve")
        .joinpath("static", f"page.{kind}")
        .read_text(encoding="utf-8")
    )


def _hash(text: str) -> str:
    """Hash the text between the tags. Source: Content Security Policy Level 3, hash sources."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
