"""Application that answers texts by any `Predictor`, or by several."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from hf_moebert.architectures.protocols import AnswerOptions, Predictor, UpdatablePredictor

from .keys import KeyMiddleware
from .limits import ServingLimits
from .monitoring import MonitoringMiddleware
from .requests import HeaderLimitMiddleware, answer_refusal
from .routes import add_routes
from .service import Service


PROBES: tuple[Any, ...] = ("a", {"question": "a", "context": "a"})  # inputs that some task can read


def try_model(name: str, predictor: Predictor) -> None:
    """Let a model, and each of its tasks, answer a short input, if it reads one of the usual form.

    Raises:
        ValueError: If one fails, or answers with a number that is not finite; the message names it.
    """
    kind, wishes = "model", {name: AnswerOptions()}
    if isinstance(predictor, UpdatablePredictor):
        kind, wishes = "task", {task: AnswerOptions(tasks=(task,)) for task in predictor.describe_tasks()}
    for asked, options in wishes.items():
        for probe in PROBES:
            try:
                predictor.check(probe, options)
            except ValueError:
                continue  # another form
            try:
                (answer,) = predictor.answer([(probe, options)])
                if isinstance(answer, Exception):
                    raise answer
                json.dumps(answer, allow_nan=False, default=lambda array: array.tolist())
            except Exception as error:
                raise ValueError(f"The {kind} {asked!r} must be able to answer {probe!r}, but: {error}") from error
            break


def build_app(
    models: Predictor | Mapping[str, Predictor],
    *,
    limits: ServingLimits | None = None,
    allow_updates: Path | None = None,
    keys: Sequence[str] = (),
) -> FastAPI:
    """Build the application of a server.

    Args:
        models: Predictors to serve, by name, or one; nothing else may change them meanwhile.
        limits: Limits of the server, by default `ServingLimits()`.
        allow_updates: Directory of the folders that PUT may name; `None` refuses PUT and DELETE.
        keys: Clients must send one of them, as `Authorization: Bearer KEY`; without any, everybody is answered.

    Returns:
        An application with the routes of the README.

    Raises:
        OSError: If the directory does not exist.
        ValueError: If a model cannot answer a short text, or with numbers that are not finite.
    """
    named = models if isinstance(models, Mapping) else {"model": models}
    for name, predictor in named.items():
        try_model(name, predictor)
    service = Service(named, limits or ServingLimits(), allow_updates)
    app = FastAPI(
        title="hf_moebert",
        docs_url=None,  # it would load its scripts from elsewhere
        redoc_url=None,
        lifespan=service.lifespan,
        redirect_slashes=False,  # a redirect would lead to the Host that the client names
    )
    app.state.service = service
    app.add_exception_handler(HTTPException, answer_refusal)
    if keys:
        app.add_middleware(KeyMiddleware, keys=keys)
    app.add_middleware(HeaderLimitMiddleware, limit=service.limits.max_header_bytes)
    app.add_middleware(MonitoringMiddleware, metrics=service.metrics)
    add_routes(app, service)
    return app
