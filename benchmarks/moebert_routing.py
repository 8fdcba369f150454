"""Time MoEBERT's routing against dense BERT in plain torch, and against the limit that no routing can beat.

    python benchmarks/moebert_routing.py
    python benchmarks/moebert_routing.py --precision medium --threads 1 --shapes 1x128 --output build/routing.json

All models have BERT-base's shape and random weights: nothing here speaks of quality. `limit` is the same BERT with one
feed-forward network of an expert's size and no routing. All models run interleaved in one process on one stack; ratios
are paired by round. One thread is timed by its own CPU time, which others on the machine disturb less; more threads by
elapsed time.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, HfArgumentParser, PreTrainedModel

from hf_moebert import MoEBertConfig, MoEBertModel
from hf_moebert.measuring.latency import SpeedUp, compare_times, environment, time_rounds
from hf_moebert.reporting.tables import markdown_table


VOCAB_SIZE = BertConfig().vocab_size


def moebert(routing: str, implementation: str = "sorted_mm") -> PreTrainedModel:
    """Build four experts of 768 neurons, 512 of them shared."""
    model = MoEBertModel(MoEBertConfig(routing=routing))
    model.set_experts_implementation(implementation)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "dense": lambda: BertModel(BertConfig()),
    "limit": lambda: BertModel(BertConfig(intermediate_size=MoEBertConfig().expert_size)),
    "6 layers": lambda: BertModel(BertConfig(num_hidden_layers=6)),
    "hash-random": partial(moebert, "hash-random"),
    "hash-balanced": partial(moebert, "hash-balanced"),
    "gate-token": partial(moebert, "gate-token"),
    "gate-sentence": partial(moebert, "gate-sentence"),
    "hash-random, eager": partial(moebert, "hash-random", "eager"),
    "hash-random, grouped_mm": partial(moebert, "hash-random", "grouped_mm"),
    "hash-random, batched_mm": partial(moebert, "hash-random", "batched_mm"),
}
SLOW = "hash-random, batched_mm"  # copies an expert for every token


@dataclass
class RoutingArguments:
    """Shapes and models of the benchmark, and how they are timed."""

    shapes: list[str] = field(
        default_factory=lambda: ["1x32", "1x128", "8x32", "8x128"], metadata={"help": "Sequences x tokens."}
    )
    dtypes: list[str] = field(
        default_factory=lambda: ["float32", "bfloat16"], metadata={"help": "Of weights and activations."}
    )
    threads: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Threads that torch computes with."})
    models: list[str] = field(
        default_factory=lambda: [name for name in MODELS if name != SLOW],
        metadata={"help": f"Any of {list(MODELS)}; `dense` and `limit` always run."},
    )
    rounds: int = field(default=10, metadata={"help": "Timed passes of every model."})
    precision: str = field(default="highest", metadata={"help": "See torch.set_float32_matmul_precision."})
    seed: int = field(default=0, metadata={"help": "Of weights, token ids and bootstrap."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for everything measured."})

    def __post_init__(self) -> None:
        if unknown := set(self.models) - MODELS.keys():
            raise ValueError(f"`models` must be among {list(MODELS)}, got {sorted(unknown)}.")


def make_batch(shape: str, seed: int) -> dict[str, Tensor]:
    """Draw token ids uniformly; every token is real, and the mask says so as a tokenizer would."""
    batch, seq = (int(size) for size in shape.split("x"))
    ids = torch.randint(VOCAB_SIZE, (batch, seq), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fullest_expert(model: PreTrainedModel, batch: dict[str, Tensor]) -> str:
    """Return the share of the tokens that the fullest expert gets, mean over the layers."""
    load = model(**batch, output_expert_load=True).get("expert_load")
    if load is None:
        return "-"
    counts = torch.stack(load).double()  # (layers, experts)
    return f"{(counts.amax(dim=1) / counts.sum(dim=1)).mean():.0%}"


def with_interval(name: str, speed_ups: Mapping[str, SpeedUp]) -> str:
    """Write a ratio and its 95 % interval."""
    if name not in speed_ups:
        return "baseline"
    ratio = speed_ups[name]
    return f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def measure(models: dict[str, PreTrainedModel], shape: str, args: RoutingArguments) -> dict[str, Any]:
    """Time one shape on the current threads and dtype, and print its table."""
    batch, threads = make_batch(shape, args.seed), torch.get_num_threads()
    clock = "cpu" if threads == 1 else "wall"
    loads = {name: fullest_expert(model, batch) for name, model in models.items()}
    times = time_rounds(
        {name: partial(model, **batch) for name, model in models.items()}, rounds=args.rounds, clock=clock
    )
    over = {name: compare_times(times, baseline=name, clock=clock, seed=args.seed) for name in ("dense", "limit")}
    rows = [
        {
            "model": name,
            "speed-up over dense": with_interval(name, over["dense"]),
            "share of the limit": with_interval(name, over["limit"]),
            "fullest expert": loads[name],
        }
        for name in models
    ]
    dtype = str(models["dense"].dtype).removeprefix("torch.")
    print(
        f"\n{shape}, {dtype}, {threads} thread(s), {clock} clock, {args.rounds} rounds\n\n{markdown_table(rows)}",
        flush=True,
    )
    ratios = {base: {name: asdict(ratio) for name, ratio in found.items()} for base, found in over.items()}
    seconds = {name: values.tolist() for name, values in times.items()}
    return {"shape": shape, "dtype": dtype, "seconds": seconds, "fullest_expert": loads, "speed_up_over": ratios}


@torch.no_grad()
def main(args: RoutingArguments) -> None:
    """Time every shape in every dtype on every number of threads."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision(args.precision)
    chosen = [name for name in MODELS if name in {"dense", "limit", *args.models}]
    models = {name: MODELS[name]().eval() for name in chosen}
    command = " ".join(["python", *sys.argv])
    facts = {"command": command} | environment()
    print(markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]))
    results = []
    for dtype in args.dtypes:
        for model in models.values():
            model.to(getattr(torch, dtype))
        for threads in args.threads:
            torch.set_num_threads(threads)
            results += [measure(models, shape, args) for shape in args.shapes]
    if args.output is not None:
        args.output.write_text(
            json.dumps({"environment": facts, "results": results}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main(HfArgumentParser(RoutingArguments).parse_args_into_dataclasses()[0])
