"""Connections of the HTTP server: bounded in number, and each bounded in time before its request.

uvicorn bounds neither: a thousand connections with half a header would keep everybody out. Here a
connection has a few seconds for a whole header, and where all places are taken, a new connection
takes the place of the one that has waited longest without a request. So whoever sends a request at
once is answered, however many connections do nothing.
"""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

from mipha.deploy.serve.chat import error_body
from mipha.deploy.serve.engine import ServiceError

_LAST_SECONDS = 0.3
"""Time for the request of a connection that was made before the server stopped."""


def connection_class(header_seconds: float, most: int) -> type[H11Protocol]:
    """Return the class of a server's connections.

    Args:
        header_seconds: Time for a header to arrive whole.
        most: Connections at a time.
    """
    idle: dict[Connection, None] = {}  # those without a request, longest first

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            # Make room for the new connection, or refuse it.
            if len(self.connections) >= most:
                longest = next(iter(idle), None)
                if longest is None:
                    self.transport = transport
                    transport.write(_FULL)
                    transport.close()
                    return
                longest._forget()
                longest.connections.discard(longest)
                longest.transport.abort()

            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete:
                idle[self] = None  # uvicorn's own timer closes it if nothing more comes

        def shutdown(self) -> None:
            # A client that has just connected is about to ask: a moment more loses no request
            # where the server stops, or hands its port over.
            if self.cycle is None:
                self.loop.call_later(_LAST_SECONDS, self._end)
            else:
                super().shutdown()

        def _end(self) -> None:
            if not self.transport.is_closing():
                super().shutdown()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the timer where no request is being answered, stop it where one is."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()
            elif self._timer is None and not self.transport.is_closing():
                idle[self] = None
                self._timer = self.loop.call_later(header_seconds, self._close_late)

        def _forget(self) -> None:
            idle.pop(self, None)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close_late(self) -> None:
            self._timer = None
            idle.pop(self, None)
            self.transport.abort()

        def _unsupported_upgrade_warning(self) -> None:
            """Say nothing: a stranger must not write lines into the log."""

    return Connection


_BUSY = json.dumps(
    error_body(
        ServiceError(
            "all connections are taken: ask again in a moment", status=503, code="server_busy"
        )
    )
).encode()

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(_BUSY), _BUSY)
)
