"""Application that answers texts by any `Predictor`."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect

from hf_moebert.architectures.protocols import Predictor

from .batching import BatcherClosed, DynamicBatcher, QueueFull
from .limits import ServingLimits
from .monitoring import Metrics, MonitoringMiddleware
from .requests import (
    BodyReader,
    HeaderLimitMiddleware,
    PredictRequest,
    UpdateRequest,
    count_characters,
    folder_inside,
    wait_for_departure,
)


logger = logging.getLogger(__name__)

PROBES: tuple[Any, ...] = ("a", {"question": "a", "context": "a"})  # inputs that some task can read


class Service:
    """Endpoints of a predictor, and the batcher behind them."""

    def __init__(self, predictor: Predictor, limits: ServingLimits, updates: Path | None) -> None:
        self.predictor, self.limits = predictor, limits
        self.updates = None if updates is None else updates.resolve(strict=True)
        self.batcher = DynamicBatcher(self._run, limits)
        self.metrics = Metrics(lambda: self.batcher.depth)
        self.reader = BodyReader(limits)
        self._updating = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """On shutdown, answer all accepted requests."""
        yield
        await asyncio.to_thread(self.batcher.close)

    def begin_closing(self, linger: float) -> None:
        """Answer what was accepted, refuse the rest with 503, and wait `linger` seconds for the end of a body."""
        self.batcher.stop()
        self.reader.close(linger)

    async def predict(self, request: Request) -> Response:
        """Answer POST /predict: one input or several, by some tasks or all."""
        asked = await self.reader.read(request, PredictRequest)
        inputs = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
        self._check(inputs, asked.tasks)
        with self.metrics.latency.time():
            return JSONResponse({"results": await self._answer(request, inputs, asked.tasks)})

    async def list_tasks(self) -> Response:
        """Answer GET /tasks: a description of each task."""
        return JSONResponse({"tasks": self.predictor.describe_tasks()})

    async def put_task(self, name: str, request: Request) -> Response:
        """Answer PUT /tasks/{name}: load a task while others are answered, and put it between two batches."""
        root = self._root()
        asked = await self.reader.read(request, UpdateRequest)
        folder = folder_inside(root, asked.folder)
        async with self._updating:
            task = await asyncio.to_thread(self._load, name, folder)
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
        alive, stuck = self.batcher.alive, self.batcher.stuck
        return JSONResponse({"status": "ok" if alive else "stuck" if stuck else "closing"}, 200 if alive else 503)

    async def show_metrics(self) -> Response:
        """Answer GET /metrics in the text format of Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _load(self, name: str, folder: Path) -> Any:
        try:
            return self.predictor.load_task(folder)
        except BaseException as error:  # a panic of Rust is no `Exception`
            logger.warning("The folder %r of task %r cannot be loaded.", str(folder), name, exc_info=True)
            raise HTTPException(
                422, "`folder` must hold a model of one task. The log of the server says why."
            ) from error

    def _run(self, requests: list[tuple[list[Any], list[str] | None]]) -> list[list[Any]]:
        flat = [(one, tasks) for inputs, tasks in requests for one in inputs]
        self.metrics.batches.observe(len(flat))
        answers = iter(self.predictor.answer(flat))
        return [[next(answers) for _ in inputs] for inputs, _ in requests]

    async def _answer(self, request: Request, inputs: list[Any], tasks: list[str] | None) -> list[Any]:
        length = max(count_characters(one) for one in inputs)
        if self.batcher.stuck:
            raise HTTPException(503, "A batch takes too long. Ask another server.", {"Retry-After": "1"})
        try:
            future = self.batcher.submit((inputs, tasks), size=len(inputs), length=length)
        except QueueFull as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
        except BatcherClosed as error:
            raise self._closing() from error
        try:
            return await self._wait(request, future)
        except (HTTPException, ClientDisconnect):
            raise
        except BatcherClosed as error:
            raise self._closing() from error
        except Exception:
            self._check(inputs, tasks)  # a task may have been removed meanwhile
            raise

    async def _wait(self, request: Request, future: Future) -> Any:
        """Wait for an answer as long as there is someone to get it; otherwise give its seats in the queue back."""
        answer = asyncio.wrap_future(future)
        departure = asyncio.ensure_future(wait_for_departure(request))
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait({answer, departure}, timeout=self.limits.timeout_s, return_when=first)
            if departure.done():
                raise ClientDisconnect
            if not answer.done():
                raise HTTPException(504, f"No answer within {self.limits.timeout_s} seconds. Try again later.")
            return answer.result()
        finally:
            departure.cancel()
            answer.cancel()
            future.cancel()

    async def _between(self, call: Any) -> None:
        try:
            await asyncio.wait_for(asyncio.wrap_future(self.batcher.between(call)), self.limits.timeout_s)
        except BatcherClosed as error:
            raise self._closing() from error
        except TimeoutError as error:
            raise HTTPException(504, f"No turn within {self.limits.timeout_s} seconds. Try again later.") from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    def _closing(self) -> HTTPException:
        return HTTPException(503, "The server is closing. Ask another one.", {"Connection": "close"})

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


def try_tasks(predictor: Predictor) -> None:
    """Let each task answer a short input, if it reads one of the usual form.

    Raises:
        ValueError: If one fails, or answers with a number that is not finite; the message names the task.
    """
    for name in predictor.describe_tasks():
        for probe in PROBES:
            try:
                predictor.check(probe, [name])
            except ValueError:
                continue  # another form
            try:
                json.dumps(predictor.answer([(probe, [name])]), allow_nan=False)
            except Exception as error:
                raise ValueError(f"The task {name!r} must be able to answer {probe!r}, but: {error}") from error
            break


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
        ValueError: If a task cannot answer a short text, or with numbers that are not finite.
    """
    try_tasks(predictor)
    service = Service(predictor, limits or ServingLimits(), allow_updates)
    app = FastAPI(
        title="hf_moebert",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=service.lifespan,
        redirect_slashes=False,  # a redirect would lead to the Host that the client names
    )
    app.state.service = service
    app.add_middleware(HeaderLimitMiddleware, limit=service.limits.max_header_bytes)
    app.add_middleware(MonitoringMiddleware, metrics=service.metrics)
    app.add_api_route("/predict", service.predict, methods=["POST"])
    app.add_api_route("/tasks", service.list_tasks, methods=["GET", "HEAD"])
    app.add_api_route("/tasks/{name}", service.put_task, methods=["PUT"])
    app.add_api_route("/tasks/{name}", service.delete_task, methods=["DELETE"])
    app.add_api_route("/health", service.health, methods=["GET", "HEAD"])
    app.add_api_route("/metrics", service.show_metrics, methods=["GET", "HEAD"])
    return app
