"""Serve anything that answers texts over HTTP; knows no system, only the `Predictor` that it is given."""

import asyncio
import logging
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .batching import BatcherClosed, DynamicBatcher, QueueFull
from .requests import (
    PredictRequest,
    ServingLimits,
    UpdateRequest,
    count_characters,
    folder_inside,
    read_body,
)


logger = logging.getLogger(__name__)


class Predictor(Protocol):
    """What is served. `answer`, `put_task` and `remove_task` are called by one thread, one at a time."""

    def describe_tasks(self) -> Mapping[str, Mapping[str, Any]]:
        """Say what there is."""

    def check(self, inputs: Any, tasks: Sequence[str] | None) -> None:
        """Raise a ValueError about an input that could not be answered; must be quick."""

    def answer(self, requests: Sequence[tuple[Any, Sequence[str] | None]]) -> Sequence[Any]:
        """Answer inputs, each with its own tasks."""

    def load_task(self, folder: Path) -> Any:
        """Read what `put_task` takes; may be slow."""

    def put_task(self, name: str, task: Any) -> None:
        """Add or replace a task, or raise a ValueError and change nothing."""

    def remove_task(self, name: str) -> None:
        """Forget a task."""


class Metrics:
    """What GET /metrics shows; every app has its own."""

    def __init__(self, depth: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter("http_answers", "Answers by status.", ["status"], registry=self.registry)
        self.latency = Histogram("predict_seconds", "From body to answer.", registry=self.registry)
        self.batches = Histogram(
            "batch_inputs", "Inputs of a batch.", registry=self.registry, buckets=[2**k for k in range(9)]
        )
        Gauge("queue_inputs", "Inputs that wait.", registry=self.registry).set_function(depth)


class Watch:
    """Count answers, and answer what nobody expected with an id; what happened is in the server's log alone."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            status = 499
        except Exception:
            error_id = uuid.uuid4().hex[:12]
            logger.exception("Error %s while answering %s %r", error_id, scope["method"], scope["path"])
            if not status:
                detail = "Something went wrong here. The server's log tells more under this id."
                await JSONResponse({"detail": detail, "id": error_id}, 500)(scope, receive, watched)
        self.metrics.answers.labels(status).inc()


class Service:
    """The endpoints, and the batcher behind them."""

    def __init__(self, predictor: Predictor, limits: ServingLimits, updates: Path | None) -> None:
        self.predictor, self.limits = predictor, limits
        self.updates = None if updates is None else updates.resolve(strict=True)
        self.batcher = DynamicBatcher(
            self._run, max_batch=limits.max_batch, max_wait_ms=limits.max_wait_ms, queue_size=limits.queue_size
        )
        self.metrics = Metrics(lambda: self.batcher.depth)
        self._updating = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """At the end, answer what was accepted."""
        yield
        await asyncio.to_thread(self.batcher.close)

    async def predict(self, request: Request) -> Response:
        """POST /predict: the answers of some tasks to one input, or to each of several."""
        asked = await read_body(request, PredictRequest, self.limits)
        inputs = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
        self._check(inputs, asked.tasks)
        with self.metrics.latency.time():
            return JSONResponse({"results": await self._answer(inputs, asked.tasks)})

    async def list_tasks(self) -> Response:
        """GET /tasks: what there is."""
        return JSONResponse({"tasks": self.predictor.describe_tasks()})

    async def put_task(self, name: str, request: Request) -> Response:
        """PUT /tasks/{name}: add or replace a task; it is read while others are answered, and put between batches."""
        root = self._root()
        asked = await read_body(request, UpdateRequest, self.limits)
        folder = folder_inside(root, asked.folder)
        async with self._updating:
            try:
                task = await asyncio.to_thread(self.predictor.load_task, folder)
            except Exception as error:
                logger.warning("The folder %r of task %r cannot be loaded.", str(folder), name, exc_info=True)
                raise HTTPException(
                    422, "`folder` must hold a model of one task. The server's log says why."
                ) from error
            await self._between(partial(self.predictor.put_task, name, task))
            return JSONResponse({"tasks": {name: self.predictor.describe_tasks()[name]}})

    async def delete_task(self, name: str) -> Response:
        """DELETE /tasks/{name}: what was accepted before is still answered."""
        self._root()
        async with self._updating:
            self._check_known([name])
            await self._between(partial(self.predictor.remove_task, name))
        return Response(status_code=204)

    async def health(self) -> Response:
        """GET /health: 200 as long as requests are taken and answered."""
        alive = self.batcher.alive
        return JSONResponse({"status": "ok" if alive else "closing"}, 200 if alive else 503)

    async def show_metrics(self) -> Response:
        """GET /metrics: in Prometheus' text format."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _run(self, requests: list[tuple[list[Any], list[str] | None]]) -> list[list[Any]]:
        flat = [(one, tasks) for inputs, tasks in requests for one in inputs]
        self.metrics.batches.observe(len(flat))
        answers = iter(self.predictor.answer(flat))
        return [[next(answers) for _ in inputs] for inputs, _ in requests]

    async def _answer(self, inputs: list[Any], tasks: list[str] | None) -> list[Any]:
        length = max(count_characters(one) for one in inputs)
        try:
            future = self.batcher.submit((inputs, tasks), size=len(inputs), length=length)
        except QueueFull as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
        except BatcherClosed as error:
            raise HTTPException(503, "The server is closing. Ask another one.") from error
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.limits.timeout_s)
        except TimeoutError as error:
            raise HTTPException(504, f"No answer within {self.limits.timeout_s} seconds. Try again later.") from error
        except Exception:
            self._check(inputs, tasks)  # what it asks for may have been removed meanwhile
            raise

    async def _between(self, call: Any) -> None:
        try:
            await asyncio.wrap_future(self.batcher.between(call))
        except BatcherClosed as error:
            raise HTTPException(503, "The server is closing. Ask another one.") from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    def _check(self, inputs: list[Any], tasks: list[str] | None) -> None:
        if not 1 <= len(inputs) <= self.limits.max_batch:
            raise HTTPException(422, f"`inputs` must be 1 to {self.limits.max_batch} inputs, got {len(inputs)}.")
        self._check_known(tasks or [])
        for one in inputs:
            if (count := count_characters(one)) > self.limits.max_characters:
                raise HTTPException(
                    422, f"An input must have at most {self.limits.max_characters} characters, got {count}. Split it."
                )
            try:
                self.predictor.check(one, tasks)
            except ValueError as error:
                raise HTTPException(422, str(error)) from error

    def _check_known(self, tasks: list[str]) -> None:
        known = list(self.predictor.describe_tasks()) if tasks else []
        if unknown := [name for name in tasks if name not in known]:
            raise HTTPException(404, f"`tasks` must be among {known}, got {unknown}.")

    def _root(self) -> Path:
        if self.updates is None:
            raise HTTPException(403, "This server takes no updates. Start it with a directory that they come from.")
        return self.updates


def build_app(
    predictor: Predictor, *, limits: ServingLimits | None = None, allow_updates: Path | None = None
) -> FastAPI:
    """Make the server's application.

    Args:
        predictor: What is served; nothing else may change it meanwhile.
        limits: What the server takes on.
        allow_updates: Directory below which the folders lie that PUT may name; `None` refuses PUT and DELETE.

    Returns:
        An application of POST /predict, GET, PUT and DELETE /tasks, GET /health and GET /metrics.

    Raises:
        OSError: If the directory does not exist.
    """
    service = Service(predictor, limits or ServingLimits(), allow_updates)
    app = FastAPI(title="hf_moebert", docs_url=None, redoc_url=None, openapi_url=None, lifespan=service.lifespan)
    app.add_middleware(Watch, metrics=service.metrics)
    app.add_api_route("/predict", service.predict, methods=["POST"])
    app.add_api_route("/tasks", service.list_tasks, methods=["GET"])
    app.add_api_route("/tasks/{name}", service.put_task, methods=["PUT"])
    app.add_api_route("/tasks/{name}", service.delete_task, methods=["DELETE"])
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.show_metrics, methods=["GET"])
    return app


def run_server(app: FastAPI, *, host: str, port: int, announce: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM, and then answer what was accepted.

    Args:
        app: From `build_app`.
        host: Address to listen on.
        port: Of it; 0 for any that is free.
        announce: Gets the server's address as soon as connections are taken.

    Raises:
        OSError: If the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    config = uvicorn.Config(app, lifespan="on", log_level="warning", access_log=False, server_header=False)
    with socket.create_server((host, port), family=family, backlog=config.backlog) as listener:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # which uvicorn calls again when it is done
        with suppress(KeyboardInterrupt):
            announce(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
            uvicorn.Server(config).run(sockets=[listener])
