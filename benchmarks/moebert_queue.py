"""Time models of BERT-base's shape on a queue of real sentences: order, padding, precision, threads and processes.

    python benchmarks/moebert_queue.py --texts train.jsonl --tokenizer folder --output build/queue
    python benchmarks/moebert_queue.py --texts train.jsonl --tokenizer folder --sentences 10000 --slices 10 --rounds 3

All models have random weights: nothing here speaks of quality. `dense, plain` is transformers' BERT as it comes; the
others went through `optimize_for_inference` in the precision they are named after. MoEBERT has four experts of a
quarter of the feed-forward network, and hash-random routing.

Every model has processes of its own, which stay warm. They run one slice of the queue at a time, in turns with all
other models, orders and settings; ratios are paired by slice. A slice is what waits at one time: it is sorted by
itself. Sentences are tokenized and padded beforehand. Time is what elapses until the slowest process is done; two
processes share a slice, each takes every second batch. Memory is the peak of a process, with all that it imports.
"""

import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, count, islice, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BertConfig, BertModel, HfArgumentParser, PreTrainedModel

from hf_moebert import MoEBertConfig, MoEBertModel, optimize_for_inference
from hf_moebert.inference.linears import check_precision
from hf_moebert.measuring.latency import compare_times, environment, time_rounds
from hf_moebert.reporting.tables import markdown_table


PLAIN = "dense, plain"
ORDERS = ("as they come", "length-sorted")
PADDINGS = ("padded", "padding skipped")
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}

Sentences = list[list[int]]
Ratio = dict[str, float]
Point = dict[str, Any]


@dataclass
class QueueArguments:
    """Settings of the benchmark, and its sentences."""

    texts: list[str] = field(metadata={"help": "Files with one JSON object a line."})
    tokenizer: str = field(metadata={"help": "Folder with the tokenizer of a BERT."})
    text_column: str = field(default="text", metadata={"help": "Where the text is in each object."})
    sentences: int = field(default=1024, metadata={"help": "Length of the queue: the first of the texts."})
    slices: int = field(default=4, metadata={"help": "Slices of the queue, each a round of the measurement."})
    rounds: int | None = field(default=None, metadata={"help": "Slices that are timed, if not all."})
    batch_size: int = field(default=32, metadata={"help": "Sentences of a batch."})
    settings: list[str] = field(
        default_factory=lambda: ["1x1", "1x2", "2x1"], metadata={"help": "Processes x threads of each of them."}
    )
    precisions: list[str] = field(
        default_factory=lambda: ["float32", "int8"], metadata={"help": "Any of float32, bfloat16 and int8."}
    )
    tiny: bool = field(default=False, metadata={"help": "Tiny models, to see whether it runs."})
    seed: int = field(default=0, metadata={"help": "Of weights and bootstrap."})
    output: Path | None = field(default=None, metadata={"help": "Folder for everything measured, and a picture."})

    def __post_init__(self) -> None:
        for precision in self.precisions:
            check_precision(precision)
        if wrong := [setting for setting in self.settings if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", setting)]:
            raise ValueError(f"`settings` must be processes x threads, such as 2x1, got {wrong}.")


def model_names(precisions: list[str]) -> list[str]:
    """Name transformers' model, and what is compared with it."""
    return [PLAIN, *(f"{kind}, {precision}" for precision in precisions for kind in ("dense", "moebert"))]


def build(name: str, *, tiny: bool = False, seed: int = 0, num_experts: int = 4) -> PreTrainedModel:
    """Build a model of random weights by its name: kind and precision, of which `plain` leaves it as it is.

    The experts share 13/16 of their neurons, which makes any number up to 16 legal and changes nothing in what they
    compute.
    """
    kind, precision = name.split(", ")
    torch.manual_seed(seed)
    config = BertConfig(**(TINY if tiny else {}))
    if kind == "moebert":
        size = config.intermediate_size // 4
        fields = {"num_experts": num_experts, "expert_size": size, "num_shared_neurons": size * 13 // 16}
        model = MoEBertModel(MoEBertConfig.from_dense(config, **fields))
    else:
        model = BertModel(config)
    return model.eval() if precision == "plain" else optimize_for_inference(model, precision=precision)


def read_queue(args: QueueArguments) -> list[Sentences]:
    """Tokenize the first sentences, and cut them into slices of the same number."""
    lines = (line for file in args.texts for line in Path(file).read_text(encoding="utf-8").splitlines())
    rows = [json.loads(line) for line in islice(lines, args.sentences)]
    if missing := [row for row in rows if args.text_column not in row]:
        raise ValueError(f"`text_column` must be in every object, {args.text_column!r} is not in {missing[0]}.")
    texts = [row[args.text_column] for row in rows]
    size = len(texts) // args.slices
    if not size:
        raise ValueError(f"`texts` must hold a sentence for each of {args.slices} slices, got {len(texts)}.")
    ids = AutoTokenizer.from_pretrained(args.tokenizer)(texts, truncation=True, max_length=128)["input_ids"]
    return [ids[start : start + size] for start in range(0, size * args.slices, size)]


def cut_batches(part: Sentences, order: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a slice into batches, padded to their longest: ids, and a mask that is True at real tokens."""
    ordered = sorted(part, key=len) if order == "length-sorted" else part
    for start in range(0, len(ordered), batch_size):
        rows = [torch.tensor(row) for row in ordered[start : start + batch_size]]
        mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        yield pad_sequence(rows, batch_first=True), mask  # (batch, seq) both


def share_of_padding(queue: list[Sentences], order: str, batch_size: int) -> float:
    """Return the share of the tokens in the batches that is padding."""
    masks = [mask for part in queue for _, mask in cut_batches(part, order, batch_size)]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def keep_padding(mask: Tensor) -> Tensor:
    """Make the mask that attention reads, `(batch, 1, seq, seq)`: given it, an optimised model skips no padding.

    So the batch says whether padding is skipped, and one process can run both.
    """
    return mask if mask.all() else mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)


def ways(name: str) -> list[tuple[str, str]]:
    """Return the orders, with and without padding, in which a model runs the queue."""
    return list(product(ORDERS, PADDINGS[:1] if name == PLAIN else PADDINGS))


def make_slices(name: str, queue: list[Sentences], batch_size: int) -> dict[tuple, list[dict[str, Tensor]]]:
    """Make the batches of every order, padding and slice."""
    slices = {}
    for (order, padding), number in product(ways(name), range(len(queue))):
        keeps = padding == "padded" and name != PLAIN
        slices[order, padding, number] = [
            {"input_ids": ids, "attention_mask": keep_padding(mask) if keeps else mask}
            for ids, mask in cut_batches(queue[number], order, batch_size)
        ]
    return slices


@torch.no_grad()
def serve(connection: Connection, name: str, args: QueueArguments, queue: list[Sentences]) -> None:
    """Hold one model in this process, run slices as they are asked for, and say at last how many MB that took."""
    torch.set_num_threads(1)
    model = build(name, tiny=args.tiny, seed=args.seed)
    slices = make_slices(name, queue, args.batch_size)
    for way in ways(name):
        model(**slices[*way, 0][0])  # warm
    connection.send("ready")
    while (turn := connection.recv()) is not None:
        threads, way, number, part, parts = turn
        torch.set_num_threads(threads)
        for batch in slices[*way, number][part::parts]:
            model(**batch)
        connection.send("done")
    # Not `ru_maxrss`, which a process inherits from the one that started it
    connection.send(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000)


def start(name: str, args: QueueArguments, queue: list[Sentences]) -> Connection:
    """Start a process that serves a model."""
    context = multiprocessing.get_context("spawn")  # shares no memory with others, as the memory it takes would hide
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, name, args, queue), daemon=True).start()
    theirs.close()  # the process then has the only other end: if it dies, we hear of it
    return ours


def in_turns(connections: list[Connection], threads: int, way: tuple[str, str]) -> Callable[[], None]:
    """Make a call that runs the next slice in all processes at once, and returns when the slowest is done."""
    numbers = count()

    def call() -> None:
        number = next(numbers)
        for part, connection in enumerate(connections):
            connection.send((threads, way, number, part, len(connections)))
        for connection in connections:
            connection.recv()

    return call


def time_queue(args: QueueArguments, queue: list[Sentences]) -> tuple[dict[tuple, np.ndarray], dict[str, float]]:
    """Time every model, order, padding and setting on every slice; return the times, and each model's memory."""
    settings = {setting: [int(number) for number in setting.split("x")] for setting in args.settings}
    most = max(processes for processes, _ in settings.values())
    names = model_names(args.precisions)
    workers = {name: [start(name, args, queue) for _ in range(most)] for name in names}
    for connection in chain(*workers.values()):
        connection.recv()  # ready
    calls = {
        (name, *way, setting): in_turns(workers[name][:processes], threads, way)
        for setting, (processes, threads) in settings.items()
        for name in names
        for way in ways(name)
    }
    times = time_rounds(calls, rounds=args.rounds or args.slices, warmup=0)
    for connection in chain(*workers.values()):
        connection.send(None)
    return times, {name: max(connection.recv() for connection in mine) for name, mine in workers.items()}


def ratio(times: dict[tuple, np.ndarray], above: tuple, below: tuple, seed: int) -> Ratio:
    """Divide times round by round: median and 95 % interval."""
    if above == below:
        return dict.fromkeys(("median", "low", "high"), 1.0)
    two = {key: times[key] for key in (above, below)}
    found = asdict(compare_times(two, baseline=above, clock="wall", seed=seed)[below])
    return {name: found[name] for name in ("median", "low", "high")}


def compare(times: dict[tuple, np.ndarray], args: QueueArguments) -> list[Point]:
    """Compare throughputs: with the plain model in the same setting, and with the same model in the first setting."""
    return [
        {
            **dict(zip(("model", "order", "padding", "setting"), key, strict=True)),
            "over_plain": ratio(times, (PLAIN, ORDERS[0], PADDINGS[0], key[-1]), key, args.seed),
            "over_first_setting": ratio(times, (*key[:-1], args.settings[0]), key, args.seed),
            "seconds": seconds.tolist(),
        }
        for key, seconds in times.items()
    ]


def tabulate(points: list[Point], value: str, settings: list[str]) -> str:
    """Write a row for each model, order and padding, and a column for each setting."""
    rows: dict[str, dict[str, str]] = {}
    for point in points:
        if point["setting"] in settings:
            name = "{model}; {order}, {padding}".format(**point)
            cell = "{median:.2f} ({low:.2f} to {high:.2f})".format(**point[value])
            rows.setdefault(name, {"model; queue": name})[point["setting"]] = cell
    return markdown_table(list(rows.values()))


def plot_queue(points: list[Point], settings: list[str], path: Path) -> None:
    """Draw the throughput of every model, order and padding, a panel for each setting."""
    names = list(dict.fromkeys("{model}; {order}, {padding}".format(**point) for point in points))
    figure = Figure(figsize=(4 + 3.2 * len(settings), 1.2 + 0.3 * len(names)), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), sharey=True, squeeze=False)[0], settings, strict=True):
        ratios = [point["over_plain"] for point in points if point["setting"] == setting]
        middle, low, high = (np.array([value[end] for value in ratios]) for end in ("median", "low", "high"))
        axes.barh(names, middle, xerr=[middle - low, high - middle], color="tab:blue", ecolor="black", capsize=2)
        axes.axvline(1, color="grey", linewidth=0.8, linestyle="--")
        axes.set(title=f"processes x threads: {setting}", xlabel="sentences per second, ratio")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=150)


def main(args: QueueArguments) -> None:
    """Print the tables, and save what was measured."""
    queue = read_queue(args)
    facts = {"command": " ".join(["python", *sys.argv])} | environment()
    print(markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]))
    padding = {order: share_of_padding(queue, order, args.batch_size) for order in ORDERS}
    timed = args.rounds or args.slices
    print(
        f"\n{args.slices} slices of {len(queue[0])} sentences, {timed} of them timed, in batches of {args.batch_size};"
    )
    print("padding is", end=" ")
    print(", ".join(f"{share:.0%} {order}" for order, share in padding.items()), flush=True)
    times, memory = time_queue(args, queue)
    points = compare(times, args)
    print(f"\nSentences per second over `{PLAIN}` as they come, by processes x threads\n")
    print(tabulate(points, "over_plain", args.settings))
    if args.settings[1:]:
        print(f"\nSentences per second over {args.settings[0]}, same model and queue\n")
        print(tabulate(points, "over_first_setting", args.settings[1:]))
    peaks = [{"model": name, "peak of a process": f"{mb:.0f} MB"} for name, mb in memory.items()]
    print(f"\n{markdown_table(peaks)}")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        found = {"environment": facts, "padding": padding, "memory_mb": memory, "points": points}
        (args.output / "queue.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        plot_queue(points, args.settings, args.output / "queue.png")


if __name__ == "__main__":
    main(HfArgumentParser(QueueArguments).parse_args_into_dataclasses()[0])
