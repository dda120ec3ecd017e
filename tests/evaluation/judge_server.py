"""A judge's server for tests, asked over a real connection."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Server:
    """A judge's server with a script: a text, None, (status, body), or seconds to keep waiting."""

    def __init__(self) -> None:
        self.script: list[str | tuple[int, str] | float | None] = []
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told.requests.append((self.path, self.headers.get("Authorization"), body))
                answer = told.script.pop(0)
                if isinstance(answer, float):
                    time.sleep(answer)
                    return  # closes the connection silently
                choices = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                status, text = answer if isinstance(answer, tuple) else (200, json.dumps(choices))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server on a free port, reached without a proxy."""
    served = Server()
    thread = threading.Thread(target=served.http.serve_forever, args=(0.01,))
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield served
    served.http.shutdown()
    thread.join()
    served.http.server_close()
