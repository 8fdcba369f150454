"""The models of a server, and the batcher before them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from starlette.requests import ClientDisconnect

from hf_moebert.architectures.protocols import AnswerOptions, Predictor, UpdatablePredictor

from .batching import BatcherClosed, DynamicBatcher, QueueFull
from .limits import ServingLimits
from .monitoring import Metrics
from .requests import BodyReader, count_characters, wait_for_departure


logger = logging.getLogger(__name__)


class Refusal(ValueError):
    """An input cannot be answered, which its tokens alone tell."""


class Service:
    """Models by name, and the batcher before them.

    Args:
        models: Predictors by name.
        limits: Limits of the server.
        updates: Directory of the folders that tasks may be loaded from.
    """

    def __init__(self, models: Mapping[str, Predictor], limits: ServingLimits, updates: Path | None) -> None:
        self.models, self.limits = dict(models), limits
        self.kinds = {name: str(predictor.describe()["kind"]) for name, predictor in models.items()}
        self.updates = None if updates is None else updates.resolve(strict=True)
        self.batcher = DynamicBatcher(self._run, limits)
        self.metrics = Metrics(lambda: self.batcher.depth)
        self.reader = BodyReader(limits)
        self.updating = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """On shutdown, answer all accepted requests."""
        yield
        await asyncio.to_thread(self.batcher.close)

    def begin_closing(self, linger: float) -> None:
        """Answer what was accepted, refuse the rest with 503, and wait `linger` seconds for the end of a body."""
        self.batcher.stop()
        self.reader.close(linger)

    def pick(self, wanted: str | None, kinds: Sequence[str]) -> str:
        """Return the model that a client named, or the only one that can answer.

        Args:
            wanted: Name of a model.
            kinds: Kinds of models that can answer.

        Raises:
            HTTPException: With status 404 if there is none, 422 if it cannot answer or there are several.
        """
        able = [name for name, kind in self.kinds.items() if kind in kinds]
        if wanted is not None and wanted not in self.models:
            raise HTTPException(404, f"`model` must be among {list(self.models)}, got {wanted!r}.")
        if wanted is not None and wanted not in able:
            raise HTTPException(
                422, f"`model` must be one for {' or '.join(kinds)}, got {wanted!r} for {self.kinds[wanted]}."
            )
        if not able:
            raise HTTPException(404, f"No model here is one for {' or '.join(kinds)}, but {self.kinds}.")
        if wanted is None and len(able) > 1:
            raise HTTPException(422, f"`model` must be given: it may be one of {able}.")
        return wanted or able[0]

    async def ask(self, request: Request, model: str, inputs: list[Any], options: AnswerOptions) -> list[Any]:
        """Answer the inputs of a request, in one batch with those of others.

        Raises:
            HTTPException: If they are refused, or there is no answer in time.
            ClientDisconnect: If the client left.
        """
        self._check(model, inputs, options)
        with self.metrics.latency.time():
            return await self._answer(request, model, inputs, options)

    def updatable(self) -> UpdatablePredictor:
        """Return the multi-task model.

        Raises:
            HTTPException: With status 404 or 422 if there is none or there are several.
        """
        found = self.models[self.pick(None, ("multi-task",))]
        assert isinstance(found, UpdatablePredictor)  # its kind says so
        return found

    async def update(self, name: str, folder: Path) -> dict[str, Any]:
        """Load a task while others are answered, put it between two batches, and describe it."""
        predictor = self.updatable()
        async with self.updating:
            task = await asyncio.to_thread(self._load, predictor, name, folder)
            await self._between(partial(predictor.put_task, name, task))
            return dict(predictor.describe_tasks()[name])

    async def remove(self, name: str) -> None:
        """Remove a task between two batches; requests accepted before are still answered."""
        predictor = self.updatable()
        async with self.updating:
            check_known(predictor, [name])
            await self._between(partial(predictor.remove_task, name))

    def _load(self, predictor: UpdatablePredictor, name: str, folder: Path) -> Any:
        try:
            return predictor.load_task(folder)
        except BaseException as error:  # a panic of Rust is no `Exception`
            logger.warning("The folder %r of task %r cannot be loaded.", str(folder), name, exc_info=True)
            raise HTTPException(
                422, "`folder` must hold a model of one task. The log of the server says why."
            ) from error

    def _run(self, requests: list[tuple[str, list[Any], AnswerOptions]]) -> list[Any]:
        flat = [(one, options) for _, inputs, options in requests for one in inputs]
        self.metrics.batches.observe(len(flat))
        self.metrics.note_depth()
        answers = iter(self.models[requests[0][0]].answer(flat))  # a batch is of one model
        return [_together([next(answers) for _ in inputs]) for _, inputs, _ in requests]

    async def _answer(self, request: Request, model: str, inputs: list[Any], options: AnswerOptions) -> list[Any]:
        length = max(count_characters(one) for one in inputs)
        if self.batcher.stuck:
            raise HTTPException(503, "A batch takes too long. Ask another server.", {"Retry-After": "1"})
        try:
            future = self.batcher.submit((model, inputs, options), size=len(inputs), length=length, group=model)
        except QueueFull as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
        except BatcherClosed as error:
            raise self._closing() from error
        self.metrics.note_depth()
        try:
            return await self._wait(request, future)
        except (HTTPException, ClientDisconnect):
            raise
        except BatcherClosed as error:
            raise self._closing() from error
        except Refusal as error:
            raise HTTPException(422, str(error)) from error
        except Exception:
            self._check(model, inputs, options)  # a task may have been removed meanwhile
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

    def _check(self, model: str, inputs: list[Any], options: AnswerOptions) -> None:
        if not 1 <= len(inputs) <= self.limits.max_batch:
            raise HTTPException(422, f"`inputs` must be 1 to {self.limits.max_batch} inputs, got {len(inputs)}.")
        predictor = self.models[model]
        if options.tasks is not None and isinstance(predictor, UpdatablePredictor):
            check_known(predictor, options.tasks)
        for one in inputs:
            if (count := count_characters(one)) > self.limits.max_characters:
                raise HTTPException(
                    422, f"An input must have at most {self.limits.max_characters} characters, got {count}. Split it."
                )
            try:
                predictor.check(one, options)
            except ValueError as error:
                raise HTTPException(422, str(error)) from error


def check_known(predictor: UpdatablePredictor, tasks: Sequence[str]) -> None:
    """Refuse tasks that a model does not have.

    Raises:
        HTTPException: With status 404 if there is one.
    """
    known = list(predictor.describe_tasks())
    if unknown := [name for name in tasks if name not in known]:
        raise HTTPException(404, f"`tasks` must be among {known}, got {unknown}.")


def _together(answers: list[Any]) -> Any:
    """Return the answers of a request, or the error of one of them: a ValueError is its client's fault."""
    error = next((one for one in answers if isinstance(one, Exception)), None)
    if error is None:
        return answers
    return Refusal(str(error)) if isinstance(error, ValueError) else error
