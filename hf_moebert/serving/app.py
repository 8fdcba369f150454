"""HTTP server of any `Predictor`, which answers texts."""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from hf_moebert.architectures.protocols import Predictor

from .batching import BatcherClosed, DynamicBatcher, QueueFull
from .limits import ServingLimits
from .monitoring import Metrics, MonitoringMiddleware
from .requests import PredictRequest, UpdateRequest, count_characters, folder_inside, read_body


logger = logging.getLogger(__name__)


class Service:
    """Endpoints of a predictor, and the batcher behind them."""

    def __init__(self, predictor: Predictor, limits: ServingLimits, updates: Path | None) -> None:
        self.predictor, self.limits = predictor, limits
        self.updates = None if updates is None else updates.resolve(strict=True)
        self.batcher = DynamicBatcher(self._run, limits)
        self.metrics = Metrics(lambda: self.batcher.depth)
        self._updating = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """On shutdown, answer all accepted requests."""
        yield
        await asyncio.to_thread(self.batcher.close)

    async def predict(self, request: Request) -> Response:
        """Answer POST /predict: one input or several, by some tasks or all."""
        asked = await read_body(request, PredictRequest, self.limits)
        inputs = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
        self._check(inputs, asked.tasks)
        with self.metrics.latency.time():
            return JSONResponse({"results": await self._answer(inputs, asked.tasks)})

    async def list_tasks(self) -> Response:
        """Answer GET /tasks: a description of each task."""
        return JSONResponse({"tasks": self.predictor.describe_tasks()})

    async def put_task(self, name: str, request: Request) -> Response:
        """Answer PUT /tasks/{name}: load a task while others are answered, and put it between two batches."""
        root = self._root()
        asked = await read_body(request, UpdateRequest, self.limits)
        folder = folder_inside(root, asked.folder)
        async with self._updating:
            try:
                task = await asyncio.to_thread(self.predictor.load_task, folder)
            except Exception as error:
                logger.warning("The folder %r of task %r cannot be loaded.", str(folder), name, exc_info=True)
                raise HTTPException(
                    422, "`folder` must hold a model of one task. The log of the server says why."
                ) from error
            await self._between(partial(self.predictor.put_task, name, task))
            return JSONResponse({"tasks": {name: self.predictor.describe_tasks()[name]}})

    async def delete_task(self, name: str) -> Response:
        """Answer DELETE /tasks/{name}: requests accepted before are still answered."""
        self._root()
        async with self._updating:
            self._check_known([name])
            await self._between(partial(self.predictor.remove_task, name))
        return Response(status_code=204)

    async def health(self) -> Response:
        """Answer GET /health: 200 as long as requests are accepted."""
        alive = self.batcher.alive
        return JSONResponse({"status": "ok" if alive else "closing"}, 200 if alive else 503)

    async def show_metrics(self) -> Response:
        """Answer GET /metrics in the text format of Prometheus."""
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
            self._check(inputs, tasks)  # a task may have been removed meanwhile
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
            raise HTTPException(403, "This server accepts no updates. Start it with `--allow-updates`.")
        return self.updates


def build_app(
    predictor: Predictor, *, limits: ServingLimits | None = None, allow_updates: Path | None = None
) -> FastAPI:
    """Build the application of a server.

    Args:
        predictor: Predictor to serve; nothing else may change it meanwhile.
        limits: Limits of the server, by default `ServingLimits()`.
        allow_updates: Directory of the folders that PUT may name; `None` refuses PUT and DELETE.

    Returns:
        An application with POST /predict, GET, PUT and DELETE /tasks, GET /health and GET /metrics.

    Raises:
        OSError: If the directory does not exist.
    """
    service = Service(predictor, limits or ServingLimits(), allow_updates)
    app = FastAPI(title="hf_moebert", docs_url=None, redoc_url=None, openapi_url=None, lifespan=service.lifespan)
    app.add_middleware(MonitoringMiddleware, metrics=service.metrics)
    app.add_api_route("/predict", service.predict, methods=["POST"])
    app.add_api_route("/tasks", service.list_tasks, methods=["GET"])
    app.add_api_route("/tasks/{name}", service.put_task, methods=["PUT"])
    app.add_api_route("/tasks/{name}", service.delete_task, methods=["DELETE"])
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.show_metrics, methods=["GET"])
    return app


def run_server(app: FastAPI, *, host: str, port: int, announce: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM, then answer all accepted requests and return.

    Args:
        app: Application from `build_app`.
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
        announce: Called with the URL of the server as soon as it accepts connections.

    Raises:
        OSError: If the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    config = uvicorn.Config(app, lifespan="on", log_level="warning", access_log=False, server_header=False)
    with socket.create_server((host, port), family=family, backlog=config.backlog) as listener:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn calls it again at the end
        with suppress(KeyboardInterrupt):
            announce(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
            uvicorn.Server(config).run(sockets=[listener])
