"""The application: routes, errors and the web page, the same for every engine behind it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Sequence
from functools import cache
from importlib import resources
from threading import Event

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mipha.deploy.serve.chat import Bounds, Chat, check_model, error_response, note
from mipha.deploy.serve.engine import Engine, ServiceError
from mipha.deploy.serve.gate import CHAT, MODELS, PATHS, Access, Gate
from mipha.deploy.serve.metrics import Metrics
from mipha.deploy.serve.requests import RequestError
from mipha.deploy.serve.untrusted_images import shown

_NO_OTHERS = (
    "default-src 'none'; connect-src 'self'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page: nothing from elsewhere."""

_LAST_SECONDS = 0.5
"""Time in which a server that is told to end stops accepting: the next request is not its own."""


def create_app(
    engine: Engine,
    model: str,
    metrics: Metrics,
    bounds: Bounds | None = None,
    access: Access | None = None,
    adapters: Sequence[str] = (),
) -> Starlette:
    """Make the ASGI application; whoever starts the engine and the server closes them.

    Args:
        engine: Engine that answers.
        model: Name of the model, which requests give and which is listed.
        metrics: Counts and times that are shown.
        bounds: Load that is taken on at a time.
        access: Who may ask; None: anybody who reaches the server.
        adapters: Names of adapters over the model, which requests give in its place.
    """
    access = access or Access()
    chat = Chat(engine, names := [model, *adapters], bounds or Bounds(), metrics)
    shared = {"object": "model", "created": int(time.time()), "owned_by": "mipha"}
    cards = {name: {"id": name, **shared} for name in names}

    async def web_page(_: Request) -> Response:
        return HTMLResponse(page(), headers=page_headers())

    async def health(request: Request) -> Response:
        alive = engine.is_alive()
        facts = {"status": "ok" if alive else "failed"}
        # The path is open, but only those who may ask learn what is served.
        if access.admits(request.scope):
            facts |= {"engine": engine.name, "model": model}
        return JSONResponse(facts, 200 if alive else 503)

    async def figures(_: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(cards.values())})

    async def one_model(request: Request) -> Response:
        check_model(name := request.path_params["name"], names)
        return JSONResponse(cards[name])

    async def completions(_: Request) -> ASGIApp:
        return chat.answer  # not a finished response: it watches the connection while it works

    routes = [
        Route("/", web_page),
        Route("/health", health),
        Route("/metrics", figures),
        Route(MODELS, models),
        Route(MODELS + "/{name:path}", one_model),
        Route(CHAT, completions, methods=["POST"]),
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
        middleware=[Middleware(Gate, access=access, metrics=metrics)],
    )
    app.router.redirect_slashes = False  # an unknown path gets a sentence, not another address
    return app


def create_loading_app(metrics: Metrics, loaded: Event) -> ASGIApp:
    """Make the application that stands at the port until the model is loaded: always status 503.

    Requests to the model wait for it first, so that a client that asks again at once succeeds.

    Args:
        metrics: Counts of the requests.
        loaded: What is set when the model is loaded, or will not be.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        said = "the model is loading: ask again in a moment"
        if scope["path"].startswith(MODELS) or scope["path"] == CHAT:
            while not loaded.is_set():
                await asyncio.sleep(0.1)
            await asyncio.sleep(_LAST_SECONDS)
            said = "the model was loading until now: ask again"
        response = error_response(ServiceError(said, status=503, code="loading"))
        if scope["path"] == "/health":
            response = JSONResponse({"status": "loading"}, 503, headers={"Retry-After": "5"})
        await response(scope, receive, send)

    return Gate(answer, Access(), metrics)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method[:20]} {shown(request.scope['path'])}"
    sentences = {
        404: f"{what} is not here: ask one of {', '.join(PATHS)}",
        405: f"{what} does not exist: ask with another method",
    }
    refusal = RequestError(
        sentences.get(error.status_code, error.detail), status=error.status_code, code="not_found"
    )
    note(request.scope, code=refusal.code)
    return error_response(refusal, dict(error.headers or {}))


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, (RequestError, ServiceError))
    note(request.scope, code=error.code)
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
