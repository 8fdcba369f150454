"""Several processes that serve one application on one socket, and share the pages of its weights."""

import ctypes
import gc
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from select import select
from types import FrameType
from typing import Any, Self

from fastapi import FastAPI

from .server import LimitedServer, address_of, listen


M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of <malloc.h>
LARGE_BUFFER = 2**20  # bytes
RETURN_EVERY_S = 10


def run_workers(
    app: FastAPI,
    *,
    workers: int,
    begin: Callable[[], object] | None = None,
    host: str,
    port: int,
    announce: Callable[[str], object],
) -> None:
    """Serve by several processes until SIGINT or SIGTERM, which end each as they end a server of one.

    The workers are forks of this process: what it has loaded is theirs, in the same memory as long as nobody writes to
    it. It must hold no threads, so it may have computed with one thread only. Should a worker end by itself, all end.

    Args:
        app: Application from `build_app`, which has answered nothing yet.
        workers: Number of processes.
        begin: Called in each worker before it serves.
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
        announce: Called with the URL of the server as soon as all accept connections.

    Raises:
        OSError: If the address is not available, or the system has no `fork`.
        ValueError: If the system allows fewer open files than `max_connections` need.
        RuntimeError: If a worker did not end in order.
    """
    if not hasattr(os, "fork"):
        raise OSError("`workers` must be 1 on this system, which cannot fork. Start several servers instead.")
    listener = listen(host, port, app.state.service.limits)
    url = address_of(listener, host)
    gc.collect()
    keep_little()
    gc.freeze()  # or a search for cycles in a worker would copy the pages of all objects
    ready, alive = os.pipe(), os.pipe()
    with Signals() as signals:
        children = [_fork(app, begin, listener, ready, alive) for _ in range(workers)]
        signals.pass_on_to(children)
        listener.close()  # the last worker that closes its copy ends listening
        os.close(ready[1])
        os.close(alive[0])
        if len(_read_all(ready[0], workers)) == workers and not signals.stopping:
            announce(url)
        asked, codes = _wait(children, signals)
    os.close(alive[1])
    if asked and any(codes):
        sys.exit(1)  # as a server of one process, if something that it runs does not end
    if any(codes):
        raise RuntimeError(f"A worker ended by itself, with the exit codes {codes}. Start the server again.")


def keep_little() -> None:
    """Let the C library of Linux return large buffers when they are freed, and share one heap among threads.

    Each worker would keep its own.
    """
    if has_glibc():
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BUFFER)
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
        return_freed()


def return_freed() -> None:
    """Let the C library of Linux return what lies free between smaller buffers, as a crowd of requests leaves it."""
    if has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def has_glibc() -> bool:
    """Check whether the C library is that of Linux."""
    return platform.libc_ver()[0] == "glibc"


class Signals:
    """Passes SIGINT and SIGTERM on to workers, as SIGTERM."""

    def __init__(self) -> None:
        self.stopping = False
        self._children: Sequence[int] = ()

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on_to(self, children: Sequence[int]) -> None:
        """Set the workers; a signal that came before is passed on now."""
        self._children = children
        if self.stopping:
            self.stop()

    def stop(self) -> None:
        """Ask all workers to end."""
        self.stopping = True
        for child in self._children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stop()


def _fork(
    app: FastAPI, begin: Callable[[], object] | None, listener: Any, ready: tuple[int, int], alive: tuple[int, int]
) -> int:
    """Start a worker, and return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        os.close(alive[1])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # until uvicorn takes it; SIGTERM ends what is not ready yet
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # uvicorn raises it again when all is answered
        if begin is not None:
            begin()
        server = LimitedServer(app, ends_process=True)
        threading.Thread(target=_end_with_parent, args=(alive[0],), daemon=True).start()
        os.write(ready[1], b".")
        server.run(sockets=[listener])
        code = int(server.worker_failed)
    except BaseException as error:  # noqa: BLE001  # no stack of the parent may go on in this process
        sys.stderr.write(f"hf-moebert: a worker could not start: {type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(code)


def _end_with_parent(pipe: int) -> None:
    """Wait until the parent is gone, however it ended, and end this process in order; meanwhile keep it small."""
    while not select([pipe], [], [], RETURN_EVERY_S)[0]:
        return_freed()
    os.kill(os.getpid(), signal.SIGTERM)


def _read_all(pipe: int, count: int) -> bytes:
    """Read bytes from a pipe until there are so many, or no more can come."""
    found = b""
    while len(found) < count and (part := os.read(pipe, count)):
        found += part
    os.close(pipe)
    return found


def _wait(children: list[int], signals: Signals) -> tuple[bool, list[int]]:
    """Wait for all workers, and stop the others when one has ended by itself.

    Returns:
        Whether a signal ended them, and their exit codes; not 0 for one that ended by itself.
    """
    codes, asked = [], True
    for _ in children:
        code = os.waitstatus_to_exitcode(os.wait()[1])
        in_order = signals.stopping and code in (0, -signal.SIGTERM)
        codes.append(0 if in_order else code or 1)
        if not signals.stopping:
            asked = False
            signals.stop()
    return asked, codes
