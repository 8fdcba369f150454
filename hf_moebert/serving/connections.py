"""Connections of a server: what uvicorn has no limit for, clients that send or read slowly or not at all."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import ServingLimits


class LimitedConnection(H11Protocol):
    """A connection of uvicorn that is closed when its client is too slow.

    Headers must be whole `header_timeout_s` after the connection was made, or after their first byte on one that was
    answered before; an answer must be read within `timeout_s`. Beyond `max_connections`, the connection that has gone
    longest without a request is closed for a new one.

    Args:
        limits: Limits of the server.
        idle: Connections without a request in progress, the longest first; one dict for all connections of a server.
        uvicorn: What uvicorn gives its connections.
    """

    def __init__(self, limits: ServingLimits, idle: dict["LimitedConnection", None], **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits, self._idle = limits, idle
        self._headers_due: asyncio.TimerHandle | None = None
        self._answer_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers, and close another connection if there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # `pause_writing` is called as soon as the client does not read
        if len(self.connections) > self._limits.max_connections and self._idle:
            next(iter(self._idle)).drop()
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Read on; a request in progress has its own limits, everything else must become one in time."""
        super().data_received(data)
        if not self._busy:
            self._wait_for_headers()

    def handle_events(self) -> None:
        """Wait no longer for headers once they are whole."""
        super().handle_events()
        if self._busy:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Note that nothing is in progress; uvicorn closes the connection if nothing comes for `keep_alive_s`."""
        if not self.transport.is_closing():
            self._idle[self] = None
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Begin to wait until the client reads."""
        super().pause_writing()
        self._answer_due = self.loop.call_later(self._limits.timeout_s, self.drop)

    def resume_writing(self) -> None:
        """Wait no longer until the client reads."""
        super().resume_writing()
        if self._answer_due is not None:
            self._answer_due.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._stop_waiting()
        self.resume_writing()

    def drop(self) -> None:
        """Close the connection without waiting for its client."""
        self._idle.pop(self, None)
        self.transport.abort()

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_headers(self) -> None:
        self._idle.setdefault(self)
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(self._limits.header_timeout_s, self.drop)

    def _stop_waiting(self) -> None:
        self._idle.pop(self, None)
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None
