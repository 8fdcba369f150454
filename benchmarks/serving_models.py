"""Time classifiers behind this server, and one behind a plain FastAPI loop over `pipeline` and LitServe's batching.

    python benchmarks/serving_models.py --model_name_or_path tweets-minilm --texts texts.jsonl
    python benchmarks/serving_models.py --model_name_or_path tweets-minilm --texts texts.jsonl --students stack \
        --workers 1 2 --clients 64

Each server is a process of its own, or several with `--workers`. A number of clients ask one after the other, each as
soon as it has its last answer. The servers answer the same requests in turns, and only times of the same round are
compared: ratios above 1 say how many times more requests a second a server answers than the loop, and how many times
sooner. Every answer is compared with that of the model's own pipeline; in int8 the share of equal labels is counted.
LitServe takes part if it is installed. `transformers serve` has no route for encoders: it serves models that write.
"""

import asyncio
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from serving import MEASURES, Asked, load, written
from transformers import HfArgumentParser, pipeline

from hf_moebert.measuring.latency import compare_times, environment
from hf_moebert.reporting.tables import markdown_table


KEEP_ALIVE = 600  # seconds: connections outlive the turns of the others
MAX_BATCH, MAX_WAIT_S = 32, 0.005  # the defaults of this server
BASELINE = "plain loop"
TOLERANCE = 1e-4  # of a score in float32: batches are padded otherwise than single texts


@dataclass
class ModelServingArguments:
    """The model, the texts and the load."""

    model_name_or_path: str = field(metadata={"help": "Folder of a classifier."})
    texts: Path = field(metadata={"help": "A .jsonl file."})
    students: list[str] = field(
        default_factory=list, metadata={"help": "Folders of smaller ones that this server answers by."}
    )
    text_column: str = field(default="text", metadata={"help": "Its column."})
    precisions: list[str] = field(default_factory=lambda: ["float32", "int8"], metadata={"help": "Of this server."})
    workers: list[int] = field(default_factory=lambda: [1], metadata={"help": "Of this server."})
    clients: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "That ask at the same time."})
    requests: int = field(default=128, metadata={"help": "Of a round."})
    rounds: int = field(default=5, metadata={"help": "That are timed, after one that is not."})
    threads: int = field(default=1, metadata={"help": "Threads that torch computes with."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})
    output: Path | None = field(default=None, metadata={"help": "JSON file."})


def serve_here(folder: str, threads: int, precision: str, workers: int, said: Connection) -> None:
    """Serve by this package until the process is ended."""
    from hf_moebert.serving import ServingLimits, build_app, load_predictor, run_server
    from hf_moebert.serving.workers import run_workers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    limits = ServingLimits(queue_size=1024, keep_alive_s=KEEP_ALIVE)
    app = build_app(load_predictor(folder, precision=precision, threads=threads), limits=limits)  # type: ignore[arg-type]
    place: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "announce": said.send}
    run_server(app, **place) if workers == 1 else run_workers(app, workers=workers, **place)


def serve_by_litserve(folder: str, threads: int, said: Connection) -> None:
    """Serve by LitServe, whose batches a pipeline answers, in as large batches and after as long a wait as here."""
    from serving_litserve import serve

    serve(folder, threads, said, keep_alive_s=KEEP_ALIVE, max_batch_size=MAX_BATCH, batch_timeout=MAX_WAIT_S)


def serve_plainly(folder: str, threads: int, said: Connection) -> None:
    """Serve by a pipeline that is called once for each request, as many do."""
    import socket

    import uvicorn
    from fastapi import FastAPI

    torch.set_num_threads(threads)
    pipe = pipeline("text-classification", model=folder, device="cpu", top_k=None)
    app = FastAPI()

    @app.post("/predict")
    def predict(body: dict[str, str]) -> list[dict[str, Any]]:
        return pipe(body["inputs"])[0]

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    said.send(f"http://127.0.0.1:{listener.getsockname()[1]}")
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_keep_alive=KEEP_ALIVE)).run(sockets=[listener])


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Any:
    """Run a server in a process of its own, and yield its URL."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*arguments, there))
    process.start()
    try:
        url = here.recv()
        while True:
            with suppress(httpx.HTTPError):
                if httpx.post(f"{url}/predict", json={"inputs": "a"}, timeout=60).is_success:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.join()


class Server(NamedTuple):
    """A server that runs: its address, the answers of its model's pipeline, and whether they must be equal."""

    url: str
    wanted: dict[str, Any]
    exact: bool


def start(args: ModelServingArguments, texts: list[str], stack: ExitStack) -> dict[str, Server]:
    """Start all servers, the loop first."""
    servers: dict[str, Server] = {}
    for folder in (args.model_name_or_path, *args.students):
        source = str(folder)
        alone = pipeline("text-classification", model=source, device="cpu", top_k=None)
        wanted = {text: alone(text)[0] for text in set(texts)}
        if folder == args.model_name_or_path:
            rivals = {BASELINE: serve_plainly} | ({"LitServe": serve_by_litserve} if find_spec("litserve") else {})
            for name, target in rivals.items():
                servers[name] = Server(stack.enter_context(running(target, source, args.threads)), wanted, exact=True)
        for precision, workers in product(args.precisions, args.workers):
            url = stack.enter_context(running(serve_here, source, args.threads, precision, workers))
            name = f"{Path(source).name}, {precision}, {workers} worker{'s' if workers > 1 else ''}"
            servers[name] = Server(url, wanted, exact=precision == "float32")
    return servers


def read_texts(args: ModelServingArguments) -> list[str]:
    """Return as many texts as a round has requests; a short file is read again."""
    rows = [json.loads(line)[args.text_column] for line in args.texts.read_text(encoding="utf-8").splitlines()]
    return [rows[number % len(rows)] for number in range(args.requests)]


def check(texts: list[str], answers: list[Any], wanted: dict[str, Any], exact: bool) -> float:
    """Return the share of answers with the pipeline's label.

    Raises:
        RuntimeError: If one that should be is not the pipeline's.
    """
    same = 0
    for text, found in zip(texts, answers, strict=True):
        scores = {one["label"]: one["score"] for one in found}
        same += found[0]["label"] == wanted[text][0]["label"]
        if exact and any(abs(scores[one["label"]] - one["score"]) > TOLERANCE for one in wanted[text]):
            raise RuntimeError(f"{text!r} must be answered {wanted[text]}, got {found}.")
    return same / len(texts)


async def take_turns(
    args: ModelServingArguments, servers: dict[str, Server], texts: list[str], clients: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """Let the servers answer the same requests, in an order that rotates.

    Returns:
        For each measure and server the seconds of every round, and for each server the share of equal labels.
    """
    found: dict[str, dict[str, list[float]]] = {measure: {name: [] for name in servers} for measure in MEASURES}
    shares: dict[str, float] = {}
    asked = [Asked(text, []) for text in texts]
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        for number in range(args.rounds + 1):
            first = number % len(servers)
            for name in [*servers][first:] + [*servers][:first]:

                async def ask(request: Asked, url: str = f"{servers[name].url}/predict") -> dict[str, Any]:
                    answer = await client.post(url, json={"inputs": request.text})
                    return {"answers": answer.raise_for_status().json()}

                start = time.perf_counter()
                seconds, answers = await load(ask, asked, clients)
                times = (time.perf_counter() - start, *np.percentile(seconds, [50, 99]))
                shares[name] = check(texts, answers, servers[name].wanted, servers[name].exact)
                for measure, value in zip(MEASURES, times, strict=True):
                    found[measure][name] += [float(value)] if number else []  # the first round warms up
    return found, shares


def main(args: ModelServingArguments) -> None:
    """Print a table of all numbers of clients."""
    torch.set_num_threads(args.threads)
    texts = read_texts(args)
    facts = {"command": " ".join(["python", *sys.argv])} | environment() | {"cores": str(len(os.sched_getaffinity(0)))}
    print(markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]))
    rows, raw = [], {}
    with ExitStack() as stack:
        servers = start(args, texts, stack)
        for clients in args.clients:
            found, shares = asyncio.run(take_turns(args, servers, texts, clients))
            raw[clients] = found
            print(f"{clients} clients are done", file=sys.stderr, flush=True)
            for name in [*servers][1:]:
                row = {"clients": str(clients), "server": name, "same label": f"{shares[name]:.3f}"}
                for measure, times in found.items():
                    pair = {one: np.array(times[one]) for one in (BASELINE, name)}
                    row[measure] = written(compare_times(pair, baseline=BASELINE, clock="wall", seed=args.seed)[name])
                rows.append(row)
    print(f"\n{markdown_table(rows)}")
    if args.output is not None:
        args.output.write_text(json.dumps({"environment": facts, "rows": rows, "seconds": raw}, indent=2) + "\n")


if __name__ == "__main__":
    main(HfArgumentParser(ModelServingArguments).parse_args_into_dataclasses()[0])
