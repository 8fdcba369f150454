"""Time many tasks served by one merged model, by separate models, and by plain pipelines called in turn.

    python benchmarks/serving.py
    python benchmarks/serving.py --http --threads 2 --output build/serving.json
    python benchmarks/serving.py --layers 12 --hidden 768 --frozen 7 --task_layers 3 --tasks 8

Weights are random: nothing here speaks of quality. A number of clients ask one after the other, each as soon as it has
its last answer. Merged and separate models stand behind the same batcher (with `--http`, behind the same server, whose
clients are in the same process); a pipeline answers one request at a time, as a script would. All rivals answer the
same requests in turns, and only times of the same round are compared: ratios above 1 say how many times more requests
a second the merged model answers, and how many times sooner. The separate models are the very models that were merged,
of `frozen` + `task_layers` layers each: the ratio is what merging brings, not what distillation did before. Every
answer is compared with that of its single-task model.
"""

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    HfArgumentParser,
    TextClassificationPipeline,
)

from hf_moebert.architectures.protocols import AnswerOptions
from hf_moebert.measuring.latency import SpeedUp, compare_times, environment
from hf_moebert.methods.multitask.functional import layers_run
from hf_moebert.methods.multitask.modeling_multitask import MultiTaskBertModel
from hf_moebert.methods.multitask.pipeline import MultiTaskPipeline, group_by_length
from hf_moebert.reporting.tables import markdown_table
from hf_moebert.serving import DynamicBatcher, ServingLimits, build_app
from hf_moebert.serving.many_tasks import ManyTasks
from hf_moebert.serving.server import LimitedServer


MEASURES = ("requests/s", "p50", "p99")
TOLERANCE = 1e-3  # of a score: batches are padded otherwise than single texts


@dataclass
class ServingArguments:
    """Sizes of the models and of the load."""

    tasks: list[int] = field(default_factory=lambda: [1, 4, 8], metadata={"help": "Numbers of tasks."})
    layers: int = field(default=6, metadata={"help": "Of the encoder that the tasks are fine-tuned from."})
    hidden: int = field(default=384, metadata={"help": "Its width; the default is MiniLM's."})
    frozen: int = field(default=4, metadata={"help": "Layers that all tasks share."})
    task_layers: int = field(default=2, metadata={"help": "Layers of each task's own."})
    shortest: int = field(default=8, metadata={"help": "Tokens of the shortest text."})
    longest: int = field(default=128, metadata={"help": "Tokens of the longest."})
    texts: int = field(default=32, metadata={"help": "Different ones."})
    clients: int = field(default=32, metadata={"help": "That ask at the same time."})
    requests: int = field(default=96, metadata={"help": "Of a round."})
    rounds: int = field(default=7, metadata={"help": "That are timed, after one that is not."})
    max_batch: int = field(default=32, metadata={"help": "Inputs of a batch."})
    max_wait_ms: float = field(default=5.0, metadata={"help": "Wait of a request for company."})
    threads: int = field(default=1, metadata={"help": "Threads that torch computes with."})
    http: bool = field(default=False, metadata={"help": "Ask a server, not the batcher."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and few requests, to see that everything runs."})
    seed: int = field(default=0, metadata={"help": "Of weights, texts, requests and bootstrap."})
    output: Path | None = field(default=None, metadata={"help": "JSON file, written anew after every setting."})

    def __post_init__(self) -> None:
        if self.smoke:
            self.hidden, self.longest, self.texts, self.clients, self.requests, self.rounds = 32, 16, 4, 4, 6, 2
        if not 0 < self.frozen < self.frozen + self.task_layers <= self.layers:
            raise ValueError(
                f"`frozen` and `task_layers` must be above 0 and at most `layers` = {self.layers} together, got "
                f"{self.frozen} and {self.task_layers}. Use 4 and 2 of 6."
            )

    @property
    def config(self) -> BertConfig:
        """Of a single-task model."""
        return BertConfig(
            vocab_size=5 + 1000,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_attention_heads=max(1, self.hidden // 32),
            num_hidden_layers=self.frozen + self.task_layers,
            initializer_range=0.1,  # so that answers differ from text to text
        )


class Asked(NamedTuple):
    """A request: a text and the tasks that shall answer it."""

    text: str
    tasks: list[str]


Ask = Callable[[Asked], Awaitable[dict[str, Any]]]


class SeparateModels:
    """A predictor of whole models, each of which runs on the texts that ask for it; texts are encoded once for all."""

    def __init__(self, models: dict[str, BertForSequenceClassification], tokenizer: BertTokenizer) -> None:
        self.models, self.tokenizer = models, tokenizer

    def describe(self) -> dict[str, Any]:
        """Return the kind of model that this stands in for."""
        return {"kind": "multi-task"}

    def check(self, inputs: Any, options: AnswerOptions) -> None:
        """Refuse nothing: the requests are our own."""

    @torch.no_grad()
    def answer(self, requests: Sequence[tuple[str, AnswerOptions]]) -> list[dict[str, Any]]:
        """Run every model on the texts that ask for it, grouped by length as the merged model does."""
        lengths = [len(ids) for ids in self.tokenizer([text for text, _ in requests])["input_ids"]]
        results: dict[int, dict[str, Any]] = {}
        for group in group_by_length(lengths):
            results |= zip(group, self._answer([requests[place] for place in group]), strict=True)
        return [results[place] for place in range(len(requests))]

    def _answer(self, requests: list[tuple[str, AnswerOptions]]) -> list[dict[str, Any]]:
        encoded = self.tokenizer([text for text, _ in requests], padding=True, return_tensors="pt")
        results: list[dict[str, Any]] = [{"answers": {}} for _ in requests]
        for name, model in self.models.items():
            rows = [row for row, (_, asked) in enumerate(requests) if asked.tasks is None or name in asked.tasks]
            if not rows:
                continue
            index = slice(None) if len(rows) == len(requests) else torch.tensor(rows)
            scores, best = model(**{key: value[index] for key, value in encoded.items()}).logits.softmax(-1).max(-1)
            for row, score, label in zip(rows, scores.tolist(), best.tolist(), strict=True):
                results[row]["answers"][name] = {"label": model.config.id2label[label], "score": score}
        return results


class PlainPipelines(SeparateModels):
    """A predictor that calls the pipelines of transformers in turn, text by text."""

    def __init__(self, models: dict[str, BertForSequenceClassification], tokenizer: BertTokenizer) -> None:
        super().__init__(models, tokenizer)
        self.pipelines = {
            name: TextClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")
            for name, model in models.items()
        }

    def answer(self, requests: Sequence[tuple[str, AnswerOptions]]) -> list[dict[str, Any]]:
        """Call them."""
        return [
            {"answers": {name: self.pipelines[name](text)[0] for name in asked.tasks or self.pipelines}}
            for text, asked in requests
        ]


def make_models(args: ServingArguments, count: int) -> dict[str, BertForSequenceClassification]:
    """Draw single-task models that share their embeddings and first layers."""
    trunk = BertModel(args.config)
    models = {}
    for number in range(count):
        model = BertForSequenceClassification(args.config).eval()
        model.config.frozen_layers = args.frozen
        model.bert.embeddings.load_state_dict(trunk.embeddings.state_dict())
        for own, shared in zip(model.bert.encoder.layer[: args.frozen], trunk.encoder.layer, strict=False):
            own.load_state_dict(shared.state_dict())
        models[f"task{number}"] = model
    return models


def make_rivals(args: ServingArguments, models: dict[str, BertForSequenceClassification]) -> dict[str, Any]:
    """Return the predictors, by name."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(1000))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    merged = MultiTaskBertModel.from_tasks(models)
    return {
        "merged": ManyTasks(MultiTaskPipeline(model=merged, tokenizer=tokenizer, task="multitask", device="cpu")),
        "separate": SeparateModels(models, tokenizer),
        "pipelines": PlainPipelines(models, tokenizer),
    }


def make_requests(args: ServingArguments, names: list[str], setting: str) -> list[Asked]:
    """Draw requests for texts of random lengths, for all tasks or for one at random."""
    generator = np.random.default_rng(args.seed)
    lengths = generator.integers(args.shortest, args.longest, args.texts, endpoint=True) - 2  # of [CLS] and [SEP]
    texts = [" ".join(f"w{number}" for number in generator.integers(0, 1000, length)) for length in lengths]
    return [
        Asked(texts[number % len(texts)], names if setting == "all" else [names[generator.integers(len(names))]])
        for number in range(args.requests)
    ]


@asynccontextmanager
async def behind_batcher(predictor: Any, limits: ServingLimits) -> AsyncIterator[Ask]:
    """Yield a function that asks the batcher."""
    with DynamicBatcher(predictor.answer, limits) as batcher:

        async def ask(request: Asked) -> dict[str, Any]:
            asked = (request.text, AnswerOptions(tasks=tuple(request.tasks)))
            return await asyncio.wrap_future(batcher.submit(asked, length=len(request.text)))

        yield ask


@asynccontextmanager
async def behind_server(predictor: Any, limits: ServingLimits) -> AsyncIterator[Ask]:
    """Yield a function that asks a server in a thread."""
    server = LimitedServer(build_app(predictor, limits=limits), port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/predict"
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def ask(request: Asked) -> dict[str, Any]:
            answer = await client.post(url, json={"inputs": request.text, "tasks": request.tasks})
            return answer.raise_for_status().json()["results"][0]

        yield ask
    server.should_exit = True
    thread.join()


async def load(ask: Ask, requests: list[Asked], clients: int) -> tuple[list[float], list[dict[str, Any]]]:
    """Let clients ask until nothing is left.

    Returns:
        Seconds of every request, and its answers.
    """
    seconds = [0.0] * len(requests)
    answers: list[dict[str, Any]] = [{}] * len(requests)
    left = iter(enumerate(requests))

    async def client() -> None:
        for number, request in left:
            start = time.perf_counter()
            answers[number] = (await ask(request))["answers"]
            seconds[number] = time.perf_counter() - start

    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds, answers


def check_answers(requests: list[Asked], answers: list[dict[str, Any]], expected: dict[tuple[str, str], Any]) -> None:
    """Refuse answers that are not those of the single-task models.

    Raises:
        RuntimeError: If one is not.
    """
    for request, found in zip(requests, answers, strict=True):
        for task in request.tasks:
            label, score = expected[request.text, task]
            close = abs(found[task]["score"] - score) < TOLERANCE
            if found.keys() != set(request.tasks) or not close or (found[task]["label"] != label and score > 0.51):
                raise RuntimeError(f"{task} must answer {label} with {score}, got {found}.")


async def take_turns(
    args: ServingArguments, rivals: dict[str, Any], requests: list[Asked], expected: dict[tuple[str, str], Any]
) -> dict[str, dict[str, list[float]]]:
    """Let the rivals answer the same requests, in an order that rotates from round to round.

    Returns:
        For each measure and rival the seconds of every round.
    """
    batched = ServingLimits(args.max_batch, args.max_wait_ms, max(args.clients, args.max_batch), timeout_s=600)
    single = ServingLimits(1, 0, args.clients, timeout_s=600)
    behind = behind_server if args.http else behind_batcher
    found: dict[str, dict[str, list[float]]] = {measure: {name: [] for name in rivals} for measure in MEASURES}
    async with AsyncExitStack() as stack:
        asks = {
            name: await stack.enter_async_context(behind(predictor, single if name == "pipelines" else batched))
            for name, predictor in rivals.items()
        }
        for number in range(args.rounds + 1):
            first = number % len(asks)
            for name in [*asks][first:] + [*asks][:first]:
                start = time.perf_counter()
                seconds, answers = await load(asks[name], requests, args.clients)
                times = (time.perf_counter() - start, *np.percentile(seconds, [50, 99]))
                check_answers(requests, answers, expected)
                for measure, value in zip(MEASURES, times, strict=True):
                    found[measure][name] += [float(value)] if number else []  # the first round warms up
    return found


def run_setting(args: ServingArguments, count: int, setting: str) -> dict[str, Any]:
    """Build the rivals, let them take turns, and compare them."""
    torch.manual_seed(args.seed)
    models = make_models(args, count)
    rivals = make_rivals(args, models)
    requests = make_requests(args, list(models), setting)
    alone = rivals["pipelines"].pipelines
    expected = {(text, name): alone[name](text)[0] for text in {one.text for one in requests} for name in models}
    expected = {key: (said["label"], said["score"]) for key, said in expected.items()}
    return compare(args, count, setting, asyncio.run(take_turns(args, rivals, requests, expected)))


def compare(
    args: ServingArguments, count: int, setting: str, found: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    """Pair the times of the rounds: how many times better the merged model is than each rival."""
    asked = count if setting == "all" else 1
    merged = layers_run({f"task{number}": (args.frozen, args.task_layers) for number in range(asked)})
    ratios = {
        rival: {
            measure: compare_times(
                {name: np.array(times[name]) for name in (rival, "merged")},
                baseline=rival,
                clock="wall",
                seed=args.seed,
            )["merged"]
            for measure, times in found.items()
        }
        for rival in ("separate", "pipelines")
    }
    layers = {"merged": merged, "separate": asked * (args.frozen + args.task_layers)}
    return {"tasks": count, "asks for": setting, "layers run": layers, "merged over": ratios, "seconds": found}


def written(ratio: SpeedUp) -> str:
    """Write a ratio with its 95 % interval and its spread."""
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}), spread {ratio.spread:.2f}"


def rows_of(result: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the table, one for each rival."""
    layers = result["layers run"]
    shape = {"tasks": str(result["tasks"]), "a request asks for": result["asks for"]}
    shape["fewer layers"] = f"{layers['separate'] / layers['merged']:.2f} times"
    return [
        shape | {"merged over": rival} | {measure: written(ratio) for measure, ratio in ratios.items()}
        for rival, ratios in result["merged over"].items()
    ]


def main(args: ServingArguments) -> None:
    """Print a table of all settings."""
    torch.set_num_threads(args.threads)
    facts = {"command": " ".join(["python", *sys.argv])} | environment() | {"dtype": "float32"}
    facts["asked"] = "over HTTP, clients in the server's process" if args.http else "the batcher, in process"
    print(markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]))
    results: list[dict[str, Any]] = []
    for count in args.tasks:
        for setting in ("all", "one") if count > 1 else ("all",):
            results.append(run_setting(args, count, setting))
            print(f"\n{markdown_table(rows_of(results[-1]))}", flush=True)
            if args.output is not None:
                settings = {name: str(value) for name, value in vars(args).items()}
                said = {"environment": facts, "settings": settings, "results": results}
                args.output.write_text(json.dumps(said, indent=2, default=asdict) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(HfArgumentParser(ServingArguments).parse_args_into_dataclasses()[0])
