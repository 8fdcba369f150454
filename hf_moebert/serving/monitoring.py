"""Monitoring of a server: its metrics, and the middleware that counts answers and reports unexpected errors."""

import asyncio
import logging
import os
import traceback
import uuid
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .requests import describe_refusal


logger = logging.getLogger(__name__)
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client, when it is imported, finds the metrics of all workers


class Metrics:
    """Metrics of one app, or of all workers of a server, which GET /metrics returns.

    Args:
        depth: Returns the number of waiting inputs.
    """

    def __init__(self, depth: Callable[[], float]) -> None:
        self._depth = depth
        self.registry = CollectorRegistry()
        self.answers = Counter("http_answers", "Answers by status.", ["status"], registry=self.registry)
        self.latency = Histogram("predict_seconds", "From body to answer.", registry=self.registry)
        self.batches = Histogram(
            "batch_inputs", "Inputs of a batch.", registry=self.registry, buckets=[2**k for k in range(9)]
        )
        self._queue = Gauge("queue_inputs", "Inputs that wait.", registry=self.registry, multiprocess_mode="livesum")
        self._shared = SHARED in os.environ

    def note_depth(self) -> None:
        """Note how many inputs wait, for other workers to read."""
        if self._shared:
            self._queue.set(self._depth())

    def write(self) -> bytes:
        """Write all metrics in the text format of Prometheus, of all workers together."""
        if not self._shared:
            self._queue.set(self._depth())
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)


class MonitoringMiddleware:
    """Middleware that counts answers, and answers unexpected errors with an id; only the log says more."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count its answer by status."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except ClientDisconnect:
            status = 499
        except asyncio.CancelledError:  # the server ends, and this task here
            if not status:
                closing = describe_refusal("The server is closing. Ask another one.")
                await JSONResponse(closing, 503, {"Connection": "close"})(scope, receive, send_and_note)
        except BaseException as error:  # noqa: BLE001  # a `SystemExit` of a library would end the event loop
            error_id = uuid.uuid4().hex[:12]
            where = describe_error(error)
            logger.error("Error %s while answering %s %r:\n%s", error_id, scope["method"], scope["path"], where)
            if not status:
                detail = "Internal error. The log of the server has the details under this id."
                await JSONResponse(describe_refusal(detail, id=error_id), 500)(scope, receive, send_and_note)
        self.metrics.answers.labels(status).inc()


def describe_error(error: BaseException) -> str:
    """Return where an error was raised, and by which others, without messages, which may hold a client's text."""
    parts: list[str] = []
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        frames = traceback.extract_tb(error.__traceback__)
        parts.insert(
            0, "\n".join([*(f"{one.filename}:{one.lineno} in {one.name}" for one in frames), type(error).__name__])
        )
        error = error.__cause__ or error.__context__ or error
    return "\n".join(parts)
