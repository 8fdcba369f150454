"""Measure how the cost of models of BERT-base's shape grows: with batch, length and experts on a CPU; batch on a GPU.

    python benchmarks/moebert_scale.py --output build/scale
    python benchmarks/moebert_scale.py --device cuda --output build/scale

Models are those of `moebert_queue.py`: random weights, four experts of a quarter of the feed-forward network where
their number is not what grows, hash-random routing. Every token is real.

CPU: one thread, timed by its own CPU time; all models and sizes of a table run in turns. Cost is a ratio to the
dense model of transformers at the smallest size, or where experts grow to one expert. GPU: bfloat16,
elapsed time until the device is done, in turns for each batch size; the dense model is there compiled too, for a fair
comparison with compiled MoEBERT.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from moebert_queue import PLAIN, Point, build, model_names, ratio
from torch import Tensor
from transformers import BertConfig, HfArgumentParser

from hf_moebert.inference.linears import check_precision
from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.measuring.latency import environment, time_rounds
from hf_moebert.reporting.tables import markdown_table


GPU_SEQ = 128
# Models on a GPU: what they are, how experts are multiplied, and the mode of torch.compile
GPU_MODELS: dict[str, tuple[str, str | None, str | None]] = {
    "dense": (PLAIN, None, None),
    "dense, compiled": (PLAIN, None, "default"),
    "dense, CUDA graphs": (PLAIN, None, "reduce-overhead"),
    "moebert, eager": ("moebert, plain", "eager", None),
    "moebert, grouped_mm": ("moebert, plain", "grouped_mm", None),
    "moebert, compiled": ("moebert, plain", "grouped_mm", "default"),
    "moebert, CUDA graphs": ("moebert, plain", "grouped_mm", "reduce-overhead"),
}

Calls = dict[tuple[str, int], Callable[[], object]]


@dataclass
class ScaleArguments:
    """Which sizes to time, and how often."""

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    batches: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32], metadata={"help": "Sequences of 64 tokens, on a CPU."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [16, 32, 64, 128, 256, 512], metadata={"help": "Tokens of one sequence, on a CPU."}
    )
    experts: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "Experts of each layer, at most 16, on a CPU."}
    )
    expert_shapes: list[str] = field(
        default_factory=lambda: ["1x64", "8x64"], metadata={"help": "Sequences x tokens that many experts see."}
    )
    gpu_batches: list[int] = field(
        default_factory=lambda: [64, 128, 256, 512, 1024], metadata={"help": f"Sequences of {GPU_SEQ} tokens."}
    )
    peak_tflops: float = field(default=989.0, metadata={"help": "The GPU's limit in bfloat16; an H100's is 989."})
    precisions: list[str] = field(
        default_factory=lambda: ["float32", "int8"], metadata={"help": "On a CPU: float32, bfloat16, int8."}
    )
    rounds: int = field(default=8, metadata={"help": "Timed rounds."})
    tiny: bool = field(default=False, metadata={"help": "Tiny models, to see whether it runs."})
    seed: int = field(default=0, metadata={"help": "Of weights, token ids and bootstrap."})
    output: Path | None = field(default=None, metadata={"help": "Folder for everything measured, and pictures."})

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"`device` must be cpu or cuda, got {self.device!r}.")
        if self.device == "cpu":
            for precision in self.precisions:
                check_precision(precision)


def random_batch(batch: int, seq: int, seed: int) -> dict[str, Tensor]:
    """Draw token ids uniformly; every token is real, and the mask says so as a tokenizer would."""
    ids = torch.randint(BertConfig().vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # (batch, seq) both


def time_growth(calls: Calls, args: ScaleArguments, reference: str | None = None) -> list[Point]:
    """Time models at all sizes in turns.

    Returns:
        Cost of each model at each size, relative to the reference at the smallest size, or without one to the model
        itself; and its speed-up over the reference at the same size.
    """
    times = time_rounds(calls, rounds=args.rounds, warmup=1, clock="cpu")
    smallest = min(size for _, size in times)
    points = []
    for (name, size), seconds in times.items():
        point = {"model": name, "size": size, "seconds": seconds.tolist()}
        point["cost"] = ratio(times, (name, size), (reference or name, smallest), args.seed)
        if reference:
            point["speed_up"] = ratio(times, (reference, size), (name, size), args.seed)
        points.append(point)
    return points


def grow_inputs(args: ScaleArguments) -> dict[str, list[Point]]:
    """Let batch and length grow."""
    models = {name: build(name, tiny=args.tiny, seed=args.seed) for name in model_names(args.precisions)}
    shapes = {
        "sequences of 64 tokens": {size: (size, 64) for size in args.batches},
        "tokens of one sequence": {size: (1, size) for size in args.lengths},
    }
    return {
        what: time_growth(
            {
                (name, size): partial(model, **random_batch(*shape, args.seed))
                for size, shape in sizes.items()
                for name, model in models.items()
            },
            args,
            reference=PLAIN,
        )
        for what, sizes in shapes.items()
    }


def grow_experts(args: ScaleArguments, precision: str) -> list[Point]:
    """Let the number of experts grow, each of the same size; a token meets one of them."""
    name = f"moebert, {precision}"
    models = {n: build(name, tiny=args.tiny, seed=args.seed, num_experts=n) for n in args.experts}
    batches = {shape: random_batch(*map(int, shape.split("x")), args.seed) for shape in args.expert_shapes}
    calls = {
        (f"{precision}, {shape}", number): partial(models[number], **batches[shape])
        for number, shape in product(models, batches)
    }
    return time_growth(calls, args)


def tabulate(points: list[Point], value: str) -> str:
    """Write a row for each model, and a column for each size."""
    rows: dict[str, dict[str, str]] = {}
    for point in points:
        cell = "{median:.2f} ({low:.2f} to {high:.2f})".format(**point[value])
        rows.setdefault(point["model"], {"model": point["model"]})[str(point["size"])] = cell
    return markdown_table(list(rows.values()))


def plot_growth(points: list[Point], path: Path, *, value: str, xlabel: str, ylabel: str) -> None:
    """Draw a ratio against size, a line with its intervals for each model; logarithmic where it grows much."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(point["model"] for point in points):
        mine = sorted((point for point in points if point["model"] == name), key=lambda point: point["size"])
        sizes = [point["size"] for point in mine]
        (line,) = axes.plot(sizes, [point[value]["median"] for point in mine], marker="o", markersize=4, label=name)
        low, high = ([point[value][end] for point in mine] for end in ("low", "high"))
        axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    heights = [point[value]["median"] for point in points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({point["size"] for point in points}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    if max(heights) > 8 * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, 1.1 * max(heights))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def on_cpu(args: ScaleArguments) -> dict[str, list[Point]]:
    """Measure growth on one thread, and print the tables."""
    torch.set_num_threads(1)
    results = grow_inputs(args)
    for what, points in results.items():
        print(f"\nCost by {what}, over `{PLAIN}` at the smallest\n\n{tabulate(points, 'cost')}")
        print(f"\nSpeed-up over `{PLAIN}` at the same size\n\n{tabulate(points, 'speed_up')}", flush=True)
    results["experts"] = [point for precision in args.precisions for point in grow_experts(args, precision)]
    print(f"\nCost by experts, over one of the same\n\n{tabulate(results['experts'], 'cost')}")
    return results


def gpu_calls(models: dict[str, Any], batch: int, seed: int) -> Calls:
    """Make a call for each model on one batch size, which returns when the device is done; compile anew for it."""
    torch.compiler.reset()  # a function that was compiled for many shapes would fall back to eager
    ids = random_batch(batch, GPU_SEQ, seed)["input_ids"].cuda()  # no mask: nothing is padded

    def run(model: Callable) -> None:
        model(input_ids=ids)
        torch.cuda.synchronize()

    compiled = {
        name: models[name] if mode is None else torch.compile(models[name], mode=mode, dynamic=False)
        for name, (_, _, mode) in GPU_MODELS.items()
    }
    return {(name, batch): partial(run, model) for name, model in compiled.items()}


def on_gpu(args: ScaleArguments) -> dict[str, list[Point]]:
    """Measure throughput by batch, and print the tables."""
    if not torch.cuda.is_available():
        print("\nSkipped: torch sees no CUDA device.")
        return {}
    models, flops = {}, {}
    for name, (source, implementation, _) in GPU_MODELS.items():
        model = build(source, tiny=args.tiny, seed=args.seed)
        flops[name] = measure_footprint(model, seq_len=GPU_SEQ).flops_per_token  # alike in all implementations
        if implementation:
            model.set_experts_implementation(implementation)
        models[name] = model.to("cuda", torch.bfloat16)
    points = []
    for batch in args.gpu_batches:
        # The first calls compile, and record the graphs
        times = time_rounds(gpu_calls(models, batch, args.seed), rounds=args.rounds, warmup=4)
        for (name, _), seconds in times.items():
            shares = flops[name] * batch * GPU_SEQ / (args.peak_tflops * 1e12) / seconds  # (rounds,)
            low, median, high = np.percentile(shares, [0, 50, 100]).tolist()
            point = {"model": name, "size": batch, "seconds": seconds.tolist()}
            point["speed_up"] = ratio(times, ("dense", batch), (name, batch), args.seed)
            points.append(point | {"share": {"median": median, "low": low, "high": high}})
    print(f"\nSentences per second over `dense`, by batch of {GPU_SEQ} tokens each\n\n{tabulate(points, 'speed_up')}")
    print(f"\nShare of {args.peak_tflops:g} TFLOP/s (least to most)\n\n{tabulate(points, 'share')}")
    return {f"sequences of {GPU_SEQ} tokens": points}


@torch.no_grad()
def main(args: ScaleArguments) -> None:
    """Print the tables, and save what was measured."""
    facts = {"command": " ".join(["python", *sys.argv])} | environment()
    print(markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]))
    results = on_gpu(args) if args.device == "cuda" else on_cpu(args)
    if args.output is None or not results:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": facts, "results": results}, indent=2) + "\n"
    (args.output / f"growth_{args.device}.json").write_text(text, encoding="utf-8")
    value, ylabel = ("speed_up", "speed-up over dense") if args.device == "cuda" else ("cost", "cost, ratio")
    for number, (what, points) in enumerate(results.items()):
        path = args.output / f"growth_{args.device}_{number}.png"
        plot_growth(points, path, value=value, xlabel=what, ylabel=ylabel)


if __name__ == "__main__":
    main(HfArgumentParser(ScaleArguments).parse_args_into_dataclasses()[0])
