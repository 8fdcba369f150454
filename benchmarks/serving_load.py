"""Put a server under load, and under clients that are slow, leave or never end; check every answer.

    python benchmarks/serving_load.py
    python benchmarks/serving_load.py --only sigterm --stops 3 --output build/serving_load.json

The server is `hf-moebert serve` in a process of its own, with a tiny merged model of random weights: what is measured
is the server, not the model. Every answer is compared with what the model answers to the text alone. The clients run
in this process, over plain sockets. A wrong or a lost answer is an error.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer, HfArgumentParser

from hf_moebert.measuring.latency import environment
from hf_moebert.methods.multitask.modeling_multitask import MultiTaskBertModel
from hf_moebert.methods.multitask.pipeline import MultiTaskPipeline
from hf_moebert.reporting.tables import markdown_table


TOLERANCE = 1e-3  # of a score: batches are padded otherwise than single texts
ENDINGS = (OSError, asyncio.IncompleteReadError)  # of a connection, before the answer was whole
Expected = dict[str, Any]  # the answers to each text


@dataclass
class LoadArguments:
    """Sizes of the load."""

    only: list[str] = field(default_factory=lambda: list(SCENARIOS), metadata={"help": "Scenarios to run."})
    clients: int = field(default=1000, metadata={"help": "That ask at once in `crowd`."})
    half_open: int = field(default=400, metadata={"help": "Connections with half-sent headers."})
    honest: int = field(default=50, metadata={"help": "Clients beside them, and in `sigterm` and `growth`."})
    asks: int = field(default=40, metadata={"help": "Requests of each of them in a round of `half_open`."})
    rounds: int = field(default=7, metadata={"help": "Pairs of rounds of `half_open`, with and without."})
    leaving: int = field(default=300, metadata={"help": "Clients that leave before their answer."})
    stops: int = field(default=10, metadata={"help": "Servers that get SIGTERM under load."})
    requests: int = field(default=20_000, metadata={"help": "Of `growth`."})
    seed: int = field(default=0, metadata={"help": "Of weights, texts and moments."})
    output: Path | None = field(default=None, metadata={"help": "JSON file."})


class Server(NamedTuple):
    """A running server and what it must answer."""

    process: subprocess.Popen
    port: int
    expected: Expected


def save_model(folder: Path, seed: int) -> Expected:
    """Save a tiny merged model of two tasks, and return its answers to texts of many lengths."""
    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(100))]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=64,
        initializer_range=0.5,  # so that answers differ from text to text
    )
    trunk, models = BertModel(config), {}
    for name in ("mood", "topic"):
        models[name] = BertForSequenceClassification(config).eval()
        models[name].bert.load_state_dict(trunk.state_dict(), strict=False)
        models[name].config.frozen_layers = 1
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=64)
    pipe = MultiTaskPipeline(
        model=MultiTaskBertModel.from_tasks(models), tokenizer=tokenizer, task="multitask", device="cpu"
    )
    pipe.save_pretrained(folder)
    generator = np.random.default_rng(seed)
    texts = [" ".join(f"w{n}" for n in generator.integers(0, 100, 1 + number % 40)) for number in range(64)]
    return {text: pipe.answer([(text, None)])[0] for text in texts}


@contextmanager
def serving(folder: Path, expected: Expected) -> Iterator[Server]:
    """Start a server, and end it if it still runs."""
    command = [sys.executable, "-m", "hf_moebert", "serve", str(folder), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # no shell  # nosec B603
        line = process.stdout.readline() if process.stdout else ""
        try:
            yield Server(process, int(line.rpartition(":")[2]), expected)
        finally:
            if process.poll() is None:
                process.terminate()


def matches(found: Any, expected: Any) -> bool:
    """Compare answers, and scores within a tolerance."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(matches(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(matches, found, expected))
    if isinstance(expected, float):
        return abs(found - expected) < TOLERANCE
    return found == expected


class Client:
    """A client with one connection, which it opens anew when it was closed."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.reader: asyncio.StreamReader | None = None

    async def open(self) -> None:
        """Connect."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.server.port)

    def close(self) -> None:
        """Leave."""
        if self.reader is not None:
            self.writer.close()
        self.reader = None

    def send(self, text: str) -> None:
        """Send a request, and wait for nothing."""
        body = json.dumps({"inputs": text})
        head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write((head + body).encode())

    async def ask(self, text: str) -> int:
        """Ask, and return the status of the answer.

        Raises:
            RuntimeError: If the answer is not the one of this text.
        """
        if self.reader is None:
            await self.open()
        assert self.reader is not None
        self.send(text)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        found = re.search(rb"content-length: (\d+)", head)
        answer = json.loads(await self.reader.readexactly(int(found[1]) if found else 0))
        status = int(head.split()[1])
        if status == 200 and not matches(answer["results"], [self.server.expected[text]]):
            raise RuntimeError(f"{text!r} must be answered {self.server.expected[text]}, got {answer}.")
        if b"connection: close" in head:
            self.close()
        return status


async def read_metrics(server: Server) -> dict[str, float]:
    """Return the metrics of a server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return {name: float(value) for name, value in re.findall(r"^(\w\S*) (\S+)$", text, re.MULTILINE)}


async def ask_until_answered(server: Server, text: str) -> Counter:
    """Ask with a new connection until the queue has room; a refusal says to come again."""
    statuses: Counter = Counter()
    client = Client(server)
    while not statuses[200]:
        status = await client.ask(text)
        statuses[status] += 1
        if status not in {200, 429}:
            raise RuntimeError(f"A request must be answered 200 or 429, got {status}.")
        if status == 429:
            await asyncio.sleep(1)
    client.close()
    return statuses


async def crowd(server: Server, clients: int) -> dict[str, Any]:
    """Let all clients ask at once, each until it has its answer."""
    texts, start = list(server.expected), time.perf_counter()
    found = await asyncio.gather(*(ask_until_answered(server, texts[n % len(texts)]) for n in range(clients)))
    total = sum(found, Counter())
    seconds = round(time.perf_counter() - start, 1)
    return {"clients": clients, "right answers": total[200], "asked to come again": total[429], "seconds": seconds}


async def ask_steadily(server: Server, clients: int, asks: int) -> list[float]:
    """Let clients ask one request after the other, and return the seconds of each."""
    texts, seconds = list(server.expected), []

    async def one(number: int) -> None:
        client = Client(server)
        for turn in range(asks):
            start = time.perf_counter()
            status = await client.ask(texts[(number + turn) % len(texts)])
            seconds.append(time.perf_counter() - start)
            if status != 200:
                raise RuntimeError(f"An honest client must be answered 200, got {status}.")
        client.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return seconds


async def open_halfway(server: Server, count: int) -> list[Client]:
    """Open connections that send a part of their headers."""
    clients = [Client(server) for _ in range(count)]
    for client in clients:
        await client.open()
        client.writer.write(b"POST /predict HTTP/1.1\r\nHost: a\r\nX-Slow: ")
    return clients


async def half_open(server: Server, count: int, honest: int, asks: int, rounds: int) -> dict[str, Any]:
    """Compare what honest clients wait beside half-open connections and without them, in turns."""
    found: dict[bool, list[float]] = {False: [], True: []}
    await ask_steadily(server, honest, asks)  # warms up
    for number in range(rounds):
        for beside in (False, True) if number % 2 else (True, False):
            slow = await open_halfway(server, count if beside else 0)
            await asyncio.sleep(0.3)  # until the server has taken them, and closed those of the round before
            found[beside].append(float(np.percentile(await ask_steadily(server, honest, asks), 99)))
            for client in slow:
                client.close()
    slow, start = await open_halfway(server, count), time.perf_counter()
    closed = await asyncio.gather(*(client.reader.read() for client in slow if client.reader), return_exceptions=True)
    ratios = np.divide(found[True], found[False])
    return {
        "half-open": count,
        "honest clients": honest,
        "p99 without, ms": round(1000 * float(np.median(found[False])), 1),
        "p99 beside, ms": round(1000 * float(np.median(found[True])), 1),
        "ratio of a pair": f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
        "closed by the server": len(closed),
        "after seconds": round(time.perf_counter() - start, 1),
    }


async def leave(server: Server, leaving: int) -> dict[str, Any]:
    """Let clients send a request and leave, and see what the server did with it."""
    before, texts = await read_metrics(server), list(server.expected)
    clients = [Client(server) for _ in range(leaving)]
    for number, client in enumerate(clients):
        await client.open()
        client.send(texts[number % len(texts)])
        client.close()
    await ask_steadily(server, 1, 1)
    for _ in range(500):  # until the last of them was noticed
        after = await read_metrics(server)
        changes = {name: after[name] - before.get(name, 0) for name in after}
        ended = sum(changes.get(f'http_answers_total{{status="{code}"}}', 0) for code in (200, 429, 499))
        if ended >= leaving + 1:
            break
        await asyncio.sleep(0.01)
    return {
        "left": leaving,
        "noticed (499)": int(changes.get('http_answers_total{status="499"}', 0)),
        "computed": int(changes["batch_inputs_sum"]) - 1,  # one was honest
        "waiting afterwards": int(after["queue_inputs"]),
    }


async def stop(server: Server, honest: int, delay: float) -> Counter:
    """Send SIGTERM while clients ask, some over new connections, and one never ends its body and one its headers.

    Returns:
        Statuses of the answers; connections `refused`, ones `closed` while idle, and requests `lost`, which were sent
        over a new connection and not answered.
    """
    outcomes: Counter = Counter()
    texts = list(server.expected)
    endless = await open_halfway(server, 2)
    endless[0].writer.write(b"a\r\nContent-Length: 100\r\n\r\n{")

    async def one(number: int) -> None:
        client, turn = Client(server), 0
        while True:
            turn += 1
            fresh = client.reader is None
            try:
                if fresh:
                    await client.open()
            except ConnectionError:
                outcomes["refused"] += 1
                return
            try:
                outcomes[await client.ask(texts[(number + turn) % len(texts)])] += 1
            except ENDINGS:  # an idle connection may be closed as the client sends
                outcomes["lost" if fresh else "closed"] += 1
                client.close()
            if number % 2:  # every other client comes anew each time
                client.close()

    asking = asyncio.gather(*(one(number) for number in range(honest)))
    await asyncio.sleep(delay)
    server.process.send_signal(signal.SIGTERM)
    await asking
    for client in endless:
        client.close()
    return outcomes


def run_stops(start: Callable[[], Any], args: LoadArguments) -> dict[str, Any]:
    """Stop servers under load."""
    outcomes: Counter = Counter()
    codes, seconds = Counter[int](), []
    delays = np.random.default_rng(args.seed).uniform(0.3, 1.0, args.stops)
    for delay in delays:
        with start() as server:
            began = time.perf_counter()
            outcomes += asyncio.run(stop(server, args.honest, float(delay)))
            codes[server.process.wait(60)] += 1
            seconds.append(time.perf_counter() - began - delay)
    said = {"stops": args.stops, "exit codes": dict(codes), "seconds to end, at most": round(max(seconds), 1)}
    return said | {str(name): outcomes[name] for name in (200, 429, 503, "refused", "closed", "lost")}


async def grow(server: Server, honest: int, requests: int) -> dict[str, Any]:
    """Ask many requests, and watch the memory of the server."""
    process = psutil.Process(server.process.pid)
    sizes = []
    for _ in range(5):
        await ask_steadily(server, honest, requests // 5 // honest)
        sizes.append(round(process.memory_info().rss / 2**20, 1))
    return {"requests": requests, "MiB after each fifth": sizes, "open files": process.num_fds()}


SCENARIOS: dict[str, Callable[[Callable[[], Any], LoadArguments], dict[str, Any]]] = {
    "crowd": lambda start, args: with_server(start, lambda server: crowd(server, args.clients)),
    "half_open": lambda start, args: with_server(
        start, lambda server: half_open(server, args.half_open, args.honest, args.asks, args.rounds)
    ),
    "leave": lambda start, args: with_server(start, lambda server: leave(server, args.leaving)),
    "sigterm": run_stops,
    "growth": lambda start, args: with_server(start, lambda server: grow(server, args.honest, args.requests)),
}


def with_server(start: Callable[[], Any], scenario: Callable[[Server], Any]) -> dict[str, Any]:
    """Run a scenario with a server of its own."""
    with start() as server:
        return asyncio.run(scenario(server))


def main(args: LoadArguments) -> None:
    """Run the scenarios, and print what was found."""
    facts = {"command": " ".join(["python", *sys.argv])} | environment() | {"cores": os.cpu_count()}
    found: dict[str, Any] = {"arguments": asdict(args), "environment": facts}
    with tempfile.TemporaryDirectory() as folder:
        expected = save_model(Path(folder), args.seed)
        for name in args.only:
            found[name] = SCENARIOS[name](lambda: serving(Path(folder), expected), args)
            print(f"\n{name}\n")
            print(
                markdown_table([{"what": key, "value": str(value)} for key, value in found[name].items()]), flush=True
            )
            if args.output is not None:
                args.output.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    if lost := found.get("sigterm", {}).get("lost"):
        raise RuntimeError(f"No request may be lost, {lost} were.")


if __name__ == "__main__":
    main(HfArgumentParser(LoadArguments).parse_args_into_dataclasses()[0])
