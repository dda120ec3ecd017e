"""The web page as one text that needs nothing beside it, and the headers that keep it so."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

_NO_OTHERS = "default-src 'none'; connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@cache
def page() -> str:
    """HTML with its style and its script inside: pick a picture, ask, read the answer as it is written."""
    return _part("html").replace("$style", _part("css")).replace("$script", _part("js"))


def page_headers() -> dict[str, str]:
    """Headers to send with the page: only its own style and script run, and it talks to this server alone."""
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
    """Source: Content Security Policy Level 3, hash sources: of what stands between the tags."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
