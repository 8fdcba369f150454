"""Time one classifier behind this server, and behind a plain FastAPI loop over `pipeline`, with real texts.

    python benchmarks/serving_models.py --model_name_or_path tweets-minilm --texts texts.jsonl
    python benchmarks/serving_models.py --model_name_or_path tweets-minilm --texts texts.jsonl --threads 2 --clients 64

Each server is a process of its own, with one worker. A number of clients ask one after the other, each as soon as it
has its last answer. The servers answer the same requests in turns, and only times of the same round are compared:
ratios above 1 say how many times more requests a second this server answers than the loop, and how many times sooner.
Every answer is compared with the pipeline's; in int8 the share of equal labels is counted. `transformers serve` has no
route for encoders: it serves models that write.
"""

import asyncio
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from serving import MEASURES, Asked, load, written
from transformers import HfArgumentParser, pipeline

from hf_moebert.measuring.latency import compare_times, environment
from hf_moebert.reporting.tables import markdown_table


KEEP_ALIVE = 600  # seconds: connections outlive the turns of the others
TOLERANCE = 1e-4  # of a score in float32: batches are padded otherwise than single texts


@dataclass
class ModelServingArguments:
    """The model, the texts and the load."""

    model_name_or_path: str = field(metadata={"help": "Folder of a classifier."})
    texts: Path = field(metadata={"help": "A .jsonl file."})
    text_column: str = field(default="text", metadata={"help": "Its column."})
    precisions: list[str] = field(default_factory=lambda: ["float32", "int8"], metadata={"help": "Of this server."})
    clients: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "That ask at the same time."})
    requests: int = field(default=128, metadata={"help": "Of a round."})
    rounds: int = field(default=5, metadata={"help": "That are timed, after one that is not."})
    threads: int = field(default=1, metadata={"help": "Threads that torch computes with."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})
    output: Path | None = field(default=None, metadata={"help": "JSON file."})


def serve_here(folder: str, precision: str, threads: int, said: Connection) -> None:
    """Serve by this package until the process is ended."""
    from hf_moebert.serving import ServingLimits, build_app, load_predictor, run_server

    torch.set_num_threads(threads)
    limits = ServingLimits(queue_size=1024, keep_alive_s=KEEP_ALIVE)
    app = build_app(load_predictor(folder, precision=precision), limits=limits)  # type: ignore[arg-type]
    run_server(app, host="127.0.0.1", port=0, announce=said.send)


def serve_plainly(folder: str, precision: str, threads: int, said: Connection) -> None:
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
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def read_texts(args: ModelServingArguments) -> list[str]:
    """Return as many texts as a round has requests; a short file is read again."""
    rows = [json.loads(line)[args.text_column] for line in args.texts.read_text(encoding="utf-8").splitlines()]
    return [rows[number % len(rows)] for number in range(args.requests)]


def check(texts: list[str], answers: list[Any], wanted: dict[str, Any], precision: str) -> float:
    """Return the share of answers with the pipeline's label.

    Raises:
        RuntimeError: If one in float32 is not the pipeline's.
    """
    same = 0
    for text, found in zip(texts, answers, strict=True):
        scores = {one["label"]: one["score"] for one in found}
        same += found[0]["label"] == wanted[text][0]["label"]
        if precision != "int8" and any(abs(scores[one["label"]] - one["score"]) > TOLERANCE for one in wanted[text]):
            raise RuntimeError(f"{text!r} must be answered {wanted[text]}, got {found}.")
    return same / len(texts)


async def take_turns(
    args: ModelServingArguments, urls: dict[str, str], texts: list[str], wanted: dict[str, Any], clients: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """Let the servers answer the same requests, in an order that rotates.

    Returns:
        For each measure and server the seconds of every round, and for each server the share of equal labels.
    """
    found: dict[str, dict[str, list[float]]] = {measure: {name: [] for name in urls} for measure in MEASURES}
    shares: dict[str, float] = {}
    asked = [Asked(text, []) for text in texts]
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        for number in range(args.rounds + 1):
            first = number % len(urls)
            for name in [*urls][first:] + [*urls][:first]:

                async def ask(request: Asked, url: str = f"{urls[name]}/predict") -> dict[str, Any]:
                    answer = await client.post(url, json={"inputs": request.text})
                    return {"answers": answer.raise_for_status().json()}

                start = time.perf_counter()
                seconds, answers = await load(ask, asked, clients)
                times = (time.perf_counter() - start, *np.percentile(seconds, [50, 99]))
                shares[name] = check(texts, answers, wanted, name)  # type: ignore[arg-type]
                for measure, value in zip(MEASURES, times, strict=True):
                    found[measure][name] += [float(value)] if number else []  # the first round warms up
    return found, shares


def main(args: ModelServingArguments) -> None:
    """Print a table of all numbers of clients."""
    torch.set_num_threads(args.threads)
    texts = read_texts(args)
    alone = pipeline("text-classification", model=args.model_name_or_path, device="cpu", top_k=None)
    wanted = {text: alone(text)[0] for text in set(texts)}
    facts = {"command": " ".join(["python", *sys.argv])} | environment() | {"cores": str(len(os.sched_getaffinity(0)))}
    print(markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]))
    rows, raw = [], {}
    with ExitStack() as stack:
        place = (args.model_name_or_path, "float32", args.threads)
        urls = {"plain loop": stack.enter_context(running(serve_plainly, *place))}
        for precision in args.precisions:
            place = (args.model_name_or_path, precision, args.threads)
            urls[precision] = stack.enter_context(running(serve_here, *place))
        for clients in args.clients:
            found, shares = asyncio.run(take_turns(args, urls, texts, wanted, clients))
            raw[clients] = found
            print(f"{clients} clients are done", file=sys.stderr, flush=True)
            for name in args.precisions:
                row = {"clients": str(clients), "this server in": name, "same label": f"{shares[name]:.3f}"}
                for measure, times in found.items():
                    pair = {one: np.array(times[one]) for one in ("plain loop", name)}
                    row[measure] = written(
                        compare_times(pair, baseline="plain loop", clock="wall", seed=args.seed)[name]
                    )
                rows.append(row)
    print(f"\n{markdown_table(rows)}")
    if args.output is not None:
        args.output.write_text(json.dumps({"environment": facts, "rows": rows, "seconds": raw}, indent=2) + "\n")


if __name__ == "__main__":
    main(HfArgumentParser(ModelServingArguments).parse_args_into_dataclasses()[0])
