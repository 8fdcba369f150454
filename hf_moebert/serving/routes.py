"""Routes: the shapes in which clients ask and are answered, those of other servers where they fit."""

import base64
import math
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from hf_moebert.architectures.protocols import AnswerOptions

from .bodies import (
    Body,
    EmbeddingsRequest,
    EmbedRequest,
    HubRequest,
    PredictRequest,
    RerankRequest,
    SimilarityRequest,
    UpdateRequest,
)
from .requests import folder_inside
from .service import Service


Form = TypeVar("Form", bound=Body)
CLASSIFIERS = ("classification", "multi-label", "regression", "reranking")
ONE_SCORE = ("reranking", "regression")
PREDICTED = (*CLASSIFIERS, "tagging", "question-answering", "multi-task")
EMBEDDED = ("embedding",)
# Pages load nothing from elsewhere, and the browser sees to it
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Routes:
    """Endpoints of a service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def predict(self, request: Request) -> Response:
        """Answer one input or several by a classifier, tagger, question answering or multi-task model."""
        asked = await self.service.reader.read(request, PredictRequest)
        return JSONResponse(await self._predict(request, asked))

    async def _predict(self, request: Request, asked: PredictRequest) -> Any:
        model = self.service.pick(asked.model, PREDICTED)
        kind = self.service.kinds[model]
        if asked.tasks is not None and kind != "multi-task":
            raise HTTPException(422, f"`tasks` must be left out for a model for {kind}.")
        inputs, single = read_inputs(asked.inputs, kind)
        answers = await self.service.ask(request, model, inputs, asked.options)
        if kind == "multi-task":
            return {"results": answers}
        return answers[0] if single else answers

    async def embed(self, request: Request) -> Response:
        """Embed one text or several: a list of vectors, as text-embeddings-inference answers."""
        asked = await self.service.reader.read(request, EmbedRequest)
        return JSONResponse(await self._embed(request, asked))

    async def _embed(self, request: Request, asked: EmbedRequest) -> Any:
        model = self.service.pick(asked.model, EMBEDDED)
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        found = await self.service.ask(request, model, texts, asked.options)
        return [vector.tolist() for vector in cut([one.vector for one in found], asked.dimensions, asked.normalize)]

    async def embeddings(self, request: Request) -> Response:
        """Embed one text or several, as OpenAI's client asks for it."""
        asked = await self.service.reader.read(request, EmbeddingsRequest)
        model = self.service.pick(asked.model, EMBEDDED)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        found = await self.service.ask(request, model, texts, AnswerOptions())
        vectors = cut([one.vector for one in found], asked.dimensions, None)
        write: Callable[[Any], Any] = encode_base64 if asked.encoding_format == "base64" else list_numbers
        data = [
            {"object": "embedding", "index": index, "embedding": write(vector)} for index, vector in enumerate(vectors)
        ]
        tokens = sum(one.tokens for one in found)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})

    async def similarity(self, request: Request) -> Response:
        """Compare one sentence with others: the cosine of each."""
        asked = await self.service.reader.read(request, SimilarityRequest)
        return JSONResponse(await self._compare(request, asked))

    async def _compare(self, request: Request, asked: SimilarityRequest) -> list[float]:
        model = self.service.pick(asked.model, EMBEDDED)
        texts = [asked.inputs.source_sentence, *asked.inputs.sentences]
        options = AnswerOptions(truncate=asked.truncate, normalize=True)
        first, *others = [one.vector for one in await self.service.ask(request, model, texts, options)]
        return [float(other @ first) for other in others]

    async def rerank(self, request: Request) -> Response:
        """Order texts by how well they answer a query, the best first."""
        asked = await self.service.reader.read(request, RerankRequest)
        model = self.service.pick(asked.model, ONE_SCORE)
        pairs = [{"text": asked.query, "text_pair": text} for text in asked.texts]
        options = AnswerOptions(truncate=asked.truncate, raw_scores=True)
        logits = [one[0]["score"] for one in await self.service.ask(request, model, pairs, options)]
        scores = logits if asked.raw_scores else [1 / (1 + math.exp(-max(logit, -700.0))) for logit in logits]
        ranks = [
            {"index": index, "score": scores[index]} | ({"text": asked.texts[index]} if asked.return_text else {})
            for index in sorted(range(len(logits)), key=lambda index: -logits[index])
        ]
        return JSONResponse(ranks)

    async def ask_as_hub(self, request: Request) -> Response:
        """Answer `huggingface_hub.InferenceClient(base_url)`: what the model is for."""
        asked = await self.service.reader.read(request, HubRequest)
        model = self.service.pick(asked.model, (*PREDICTED, *EMBEDDED))
        kind = self.service.kinds[model]
        given = asked.model_dump(exclude={"parameters", "inputs"}, exclude_defaults=True) | {"model": model}
        if kind != "embedding":
            raw = asked.parameters.function_to_apply == "none"
            predicted = convert(PredictRequest, given | {"inputs": asked.inputs, "raw_scores": raw})
            answers = await self._predict(request, predicted)
            if kind in CLASSIFIERS:  # one list for each input, also if there is one
                lists = answers if answers and isinstance(answers[0], list) else [answers]
                answers = [one[: asked.parameters.top_k] for one in lists]
            return JSONResponse(answers)
        if isinstance(asked.inputs, dict):
            return JSONResponse(
                await self._compare(request, convert(SimilarityRequest, given | {"inputs": asked.inputs}))
            )
        return JSONResponse(await self._embed(request, convert(EmbedRequest, given | {"inputs": asked.inputs})))

    async def list_tasks(self) -> Response:
        """Return a description of each task of the multi-task model."""
        return JSONResponse({"tasks": self.service.updatable().describe_tasks()})

    async def put_task(self, name: str, request: Request) -> Response:
        """Load a task while others are answered, and put it between two batches."""
        root = self._root()
        asked = await self.service.reader.read(request, UpdateRequest)
        return JSONResponse({"tasks": {name: await self.service.update(name, folder_inside(root, asked.folder))}})

    async def delete_task(self, name: str) -> Response:
        """Remove a task; requests accepted before are still answered."""
        self._root()
        await self.service.remove(name)
        return Response(status_code=204)

    def _root(self) -> Path:
        if self.service.updates is None:
            raise HTTPException(403, "This server accepts no updates. Start it with `--allow-updates`.")
        return self.service.updates

    async def info(self) -> Response:
        """Return the version, the limits, and what each model is."""
        limits = self.service.limits
        models = {name: dict(predictor.describe()) for name, predictor in self.service.models.items()}
        first = next(iter(models))
        return JSONResponse(
            {
                "model_id": first,
                "max_input_length": models[first].get("max_length"),
                "max_client_batch_size": limits.max_batch,
                "max_batch_requests": limits.max_batch,
                "auto_truncate": False,
                "version": metadata.version("hf_moebert"),
                "models": models,
            }
        )

    async def list_models(self) -> Response:
        """List the models, as OpenAI's client asks for it."""
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "here"} for name in self.service.models]
        return JSONResponse({"object": "list", "data": data})

    async def health(self) -> Response:
        """Answer 200 as long as requests are accepted."""
        alive, stuck = self.service.batcher.alive, self.service.batcher.stuck
        return JSONResponse({"status": "ok" if alive else "stuck" if stuck else "closing"}, 200 if alive else 503)

    async def show_metrics(self) -> Response:
        """Return the metrics in the text format of Prometheus."""
        return Response(self.service.metrics.write(), media_type=CONTENT_TYPE_LATEST)


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the endpoints of a service to an application, and describe their bodies for OpenAPI."""
    routes = Routes(service)
    for path, endpoint, body in (
        ("/predict", routes.predict, PredictRequest),
        ("/embed", routes.embed, EmbedRequest),
        ("/rerank", routes.rerank, RerankRequest),
        ("/similarity", routes.similarity, SimilarityRequest),
        ("/v1/embeddings", routes.embeddings, EmbeddingsRequest),
        ("/", routes.ask_as_hub, HubRequest),
    ):
        app.add_api_route(path, endpoint, methods=["POST"], openapi_extra=describe_body(body))
    app.add_api_route("/tasks/{name}", routes.put_task, methods=["PUT"], openapi_extra=describe_body(UpdateRequest))
    app.add_api_route("/tasks/{name}", routes.delete_task, methods=["DELETE"], status_code=204)
    for path, answer in (
        ("/tasks", routes.list_tasks),
        ("/info", routes.info),
        ("/v1/models", routes.list_models),
        ("/health", routes.health),
        ("/metrics", routes.show_metrics),
    ):
        app.add_api_route(path, answer, methods=["GET"])
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
    for path, file in (("/", "page.html"), ("/docs", "docs.html")):
        app.add_api_route(path, page(file), methods=["GET"], include_in_schema=False)


def page(file: str) -> Callable[[], Any]:
    """Return the endpoint of a page, a file beside this one."""
    content = (Path(__file__).parent / file).read_text(encoding="utf-8")

    async def show() -> Response:
        return HTMLResponse(content, headers=PAGE_HEADERS)

    return show


def describe_body(form: type[Body]) -> dict[str, Any]:
    """Describe a body for OpenAPI; the application reads it by itself, within its limits."""
    schema = form.model_json_schema()
    known = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).rpartition("/")[2]
            return inline(known[name]) if name else {key: inline(inner) for key, inner in value.items()}
        return [inline(inner) for inner in value] if isinstance(value, list) else value

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inline(schema)}}}}


def read_inputs(given: Any, kind: str) -> tuple[list[Any], bool]:
    """Return the inputs of a body, and whether it is one that was not in a list.

    A classifier reads lists as text-embeddings-inference does, for which a list of strings is one text or one pair.

    Raises:
        HTTPException: With status 422 if a list is neither.
    """
    if not isinstance(given, list):
        return [given], True
    if kind not in CLASSIFIERS:
        return given, False
    if given and all(isinstance(one, str) for one in given):
        return [read_pair(given)], True
    return [read_pair(one) if isinstance(one, list) else one for one in given], False


def read_pair(texts: Sequence[str]) -> Any:
    """Return the text or pair of a list of strings.

    Raises:
        HTTPException: With status 422 if there are more or fewer.
    """
    if len(texts) not in (1, 2):
        raise HTTPException(
            422,
            f"`inputs` must be one text, or one pair of them as a list of two, got a list of {len(texts)}. Send "
            'several texts as [["a text"], ["another"]].',
        )
    return texts[0] if len(texts) == 1 else {"text": texts[0], "text_pair": texts[1]}


def convert(form: type[Form], given: dict[str, Any]) -> Form:
    """Return a body in another form.

    Raises:
        HTTPException: With status 422 if the model that was asked cannot be asked that.
    """
    known = {name: value for name, value in given.items() if name in form.model_fields}
    try:
        return form.model_validate(known)
    except ValueError as error:
        raise HTTPException(422, "`inputs` must be what the model reads: GET /info says its kind.") from error


def cut(vectors: list[np.ndarray], dimensions: int | None, normalize: bool | None) -> list[np.ndarray]:
    """Return the first numbers of vectors, of the length 1 unless a client wants none.

    Raises:
        HTTPException: With status 422 if they have fewer.
    """
    if dimensions is None:
        return vectors
    if dimensions > len(vectors[0]):
        raise HTTPException(422, f"`dimensions` must be at most {len(vectors[0])}, got {dimensions}.")
    parts = [vector[:dimensions] for vector in vectors]
    if normalize is False:
        return parts
    return [part / max(float(np.linalg.norm(part)), 1e-12) for part in parts]


def list_numbers(vector: np.ndarray) -> list[float]:
    """Write a vector as JSON holds it."""
    return vector.tolist()


def encode_base64(vector: np.ndarray) -> str:
    """Write a vector as OpenAI's client reads it: the bytes of little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
