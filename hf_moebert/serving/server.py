"""Server of an application: connections within limits, and an end within a grace period."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from .connections import LimitedConnection
from .limits import ServingLimits


logger = logging.getLogger(__name__)

LINGER_S = 1.0  # for requests that were sent before their clients could know that the server closes
CLOSING_S = 0.2  # for connections to be closed, twice what uvicorn sleeps meanwhile
SPARE_FILES = 100  # for all that is no connection
BACKLOG = 2048


class LimitedServer(uvicorn.Server):
    """A server of uvicorn that closes without losing what it accepted, and ends if its worker does.

    Args:
        app: Application from `build_app`.
        ends_process: Whether to end the process, with exit code 1, if closing takes longer than `grace_s`.
        config: Further options of `uvicorn.Config`.
    """

    def __init__(self, app: FastAPI, *, ends_process: bool = False, **config: Any) -> None:
        self.service = app.state.service
        limits: ServingLimits = self.service.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(LimitedConnection, limits, {}),  # type: ignore[arg-type]
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                h11_max_incomplete_event_size=limits.max_header_bytes,
                limit_concurrency=limits.max_connections + 1,  # if all have requests in progress, 503
                timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]
                **config,
            )
        )

        self.worker_failed = False
        self._ends_process = ends_process
        self._last_resort: threading.Timer | None = None

    async def on_tick(self, counter: int) -> bool:
        """Decide, ten times a second, whether to end."""
        self.worker_failed = self.service.batcher.dead  # it lives until `shutdown`
        return await super().on_tick(counter) or self.worker_failed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was accepted while new requests are refused with 503, then close all connections.

        Connections that are open at the end may send what is on its way, to be refused, for a second. What is not
        answered after nine tenths of `grace_s` is refused too.
        """
        now, grace = asyncio.get_running_loop().time, self.service.limits.grace_s
        latest, linger = now() + 0.9 * grace, min(LINGER_S, grace / 4)
        self.service.begin_closing(linger)
        self._end_process_after(grace)
        await self._wait_while(lambda: not self.service.batcher.dead, latest - CLOSING_S)
        await self._stop_listening()
        await self._wait_while(lambda: self.server_state.connections, min(now() + linger, latest - CLOSING_S))
        self.config.timeout_graceful_shutdown = max(0, latest - CLOSING_S / 2 - now())
        await super().shutdown(sockets)

    async def _wait_while(self, condition: Callable[[], object], latest: float) -> None:
        while condition() and not self.force_exit and asyncio.get_running_loop().time() < latest:
            await asyncio.sleep(0.01)

    async def _stop_listening(self) -> None:
        """Listen no more, and take every connection that the system holds: it would reset those that are left."""
        loop = asyncio.get_running_loop()
        listeners = [listener.dup() for server in self.servers for listener in server.sockets]
        for server in self.servers:
            for listener in server.sockets:
                loop.remove_reader(listener.fileno())
        await asyncio.sleep(0.05)  # for those that asyncio is taking; a server that is closed would drop them
        for server in self.servers:
            server.close()
        waiting: list[socket.socket] = []
        for listener in listeners:
            with listener, suppress(OSError):  # until none is left
                while True:
                    waiting.append(listener.accept()[0])
        for connection in waiting:
            await loop.connect_accepted_socket(self._make_connection, connection)

    def _make_connection(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal or `should_exit`."""
        try:
            super().run(sockets)
        finally:
            if self._last_resort is not None:
                self._last_resort.cancel()

    def _end_process_after(self, seconds: float) -> None:
        if self._ends_process:
            self._last_resort = threading.Timer(seconds, _end_process)
            self._last_resort.daemon = True
            self._last_resort.start()


def _end_process() -> None:
    logger.error("The server did not close within `grace_s`: something that it runs does not end.")
    os._exit(1)  # threads that do not end would hold up any other exit


def _allow_connections(connections: int) -> None:
    """Raise this process's limit of open files to that of the system, if connections need it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + SPARE_FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ValueError(
            f"`max_connections` must be at most {hard - SPARE_FILES}, since this system allows {hard} open files, got "
            f"{connections}. Lower it, or raise that limit."
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def run_server(app: FastAPI, *, host: str, port: int, announce: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM, then answer all accepted requests and return.

    The process ends within `grace_s` after the signal, with exit code 1 if a batch, a task that is loaded or anything
    else does not end by then.

    Args:
        app: Application from `build_app`.
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
        announce: Called with the URL of the server as soon as it accepts connections.

    Raises:
        OSError: If the address is not available.
        ValueError: If the system allows fewer open files than `max_connections` need.
        RuntimeError: If the worker that runs the batches has ended by a fault.
    """
    server = LimitedServer(app, ends_process=True)
    with listen(host, port, server.service.limits) as listener:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn calls it again at the end
        with suppress(KeyboardInterrupt):
            announce(address_of(listener, host))
            server.run(sockets=[listener])
    if server.worker_failed:
        raise RuntimeError("The worker that answers requests has ended by a fault. Start the server again.")


def listen(host: str, port: int, limits: ServingLimits) -> socket.socket:
    """Open the socket of a server.

    Raises:
        OSError: If the address is not available.
        ValueError: If the system allows fewer open files than `max_connections` need.
    """
    _allow_connections(limits.max_connections)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def address_of(listener: socket.socket, host: str) -> str:
    """Return the URL of a server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
