"""Time MoEBERT against what a user would pick instead: dense BERT in the same stack, and in ONNX Runtime.

    python benchmarks/moebert_inference.py
    python benchmarks/moebert_inference.py --threads 1 --texts texts.jsonl --tokenizer FOLDER --output build/all.json

All models have BERT-base's shape and random weights: nothing here speaks of quality. MoEBERT has four experts of 768
neurons; `half depth` has every second layer, `half units` no more than half of the neurons and heads, and `half
moebert` cuts those into four experts of 384. `stock` is plain torch; `float32`, `bfloat16` and `int8` are
`optimize_for_inference` at that precision, for all; `onnx` is what `export_onnx` wrote and `load_onnx` runs. All run
interleaved in one process; ratios are paired by round. One thread is timed by its own processor time, which others on
the machine disturb less; more threads by elapsed time.

Cases are `batch x tokens` with random ids, or `batch x real`: sentences of the texts given, or of drawn lengths
(lognormal, 37 tokens on average), padded to the longest of their batch; ONNX Runtime also runs them in groups of like
length, `grouped`.
"""

import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BertConfig, BertModel, HfArgumentParser, PreTrainedModel

from hf_moebert import MoEBertConfig, MoEBertModel, export_onnx, load_onnx, optimize_for_inference, shrink
from hf_moebert.data.buckets import run_by_length
from hf_moebert.inference.linears import unsupported_reason
from hf_moebert.measuring.latency import compare_times, environment, time_rounds
from hf_moebert.methods.moebert import from_dense
from hf_moebert.methods.platon.modeling_units import find_unit_groups
from hf_moebert.reporting.tables import markdown_table


Batch = dict[str, Tensor]
FORMS = ("dense", "moebert", "half depth", "half units", "half moebert")
# What MoEBERT should reach over its rivals, by case
TARGETS = {
    ("moebert float32", "dense onnx float32"): {"1x32": 1.5, "1x128": 1.6, "8x128": 1.9},
    ("moebert float32", "dense float32"): {"1x32": 1.35, "1x128": 1.55, "8x128": 1.8, "8xreal": 1.7},
    ("moebert int8", "dense int8"): {"1x32": 1.15, "1x128": 1.3, "8x128": 1.8},
    ("moebert int8", "dense onnx int8"): {"1x32": 1.0, "1x128": 1.3, "8x128": 1.6},
    ("moebert float32", "moebert float32 padded"): {"8xreal": 1.35},
    ("moebert onnx int8", "dense onnx int8"): {"1x32": 1.4, "1x128": 1.65, "8x128": 1.65},
    ("moebert onnx int8 grouped", "dense onnx int8 grouped"): {"8xreal": 2.0},
    ("half moebert onnx int8", "dense onnx int8"): {"1x32": 2.6, "1x128": 3.0, "8x128": 3.2},
    ("half moebert onnx int8 grouped", "dense onnx int8 grouped"): {"8xreal": 3.5},
}


@dataclass
class InferenceArguments:
    """Cases of the benchmark, and how they are timed."""

    cases: list[str] = field(
        default_factory=lambda: ["1x32", "1x128", "8x128", "1xreal", "8xreal"],
        metadata={"help": "Sequences x tokens, or x real."},
    )
    precisions: list[str] = field(
        default_factory=lambda: ["float32", "bfloat16", "int8"], metadata={"help": "Of the optimised models."}
    )
    threads: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Threads to compute with."})
    routing: str = field(default="hash-random", metadata={"help": "See MoEBertConfig."})
    rounds: int = field(default=10, metadata={"help": "Timed passes of every model."})
    onnx: bool = field(default=True, metadata={"help": "Whether to run ONNX Runtime."})
    texts: Path | None = field(default=None, metadata={"help": "JSON lines whose sentences have real lengths."})
    text_column: str = field(default="text", metadata={"help": "Where they are in it."})
    tokenizer: str | None = field(default=None, metadata={"help": "Hub id or folder of a BERT tokenizer for them."})
    batches: int = field(default=4, metadata={"help": "Batches of real sentences, which are timed together."})
    layers: int = field(default=12, metadata={"help": "Layers of each model: fewer are exported sooner."})
    only: str = field(default="", metadata={"help": "Time those alone whose name holds it, such as onnx."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models, to try the benchmark itself."})
    seed: int = field(default=0, metadata={"help": "Of weights, ids, lengths, and bootstrap."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for everything measured."})

    def __post_init__(self) -> None:
        if (self.texts is None) != (self.tokenizer is None):
            raise ValueError("`texts` and `tokenizer` must be given together.")

    def sizes(self) -> dict[str, int]:
        """Return the sizes that may differ from BERT-base's."""
        return {"num_hidden_layers": 1, "hidden_size": 96} if self.smoke else {"num_hidden_layers": self.layers}


def random_batch(batch: int, seq: int, seed: int) -> Batch:
    """Draw token ids uniformly; every token is real, and the mask says so as a tokenizer would."""
    ids = torch.randint(1000, BertConfig().vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def drawn_batch(batch: int, seed: int) -> Batch:
    """Draw sentences of lengths as in real texts, padded to the longest."""
    lengths = np.random.default_rng(seed).lognormal(np.log(37) - 0.5**2 / 2, 0.5, batch).round().clip(4, 128)
    made = random_batch(batch, int(lengths.max()), seed)
    mask = torch.arange(int(lengths.max())) < torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": made["input_ids"] * mask, "attention_mask": mask.long()}


def text_batches(args: InferenceArguments, batch: int) -> list[Batch]:
    """Draw sentences from the texts given."""
    texts = load_dataset("json", data_files=str(args.texts), split="train").shuffle(seed=args.seed)[args.text_column]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    parts = [list(texts[i * batch : (i + 1) * batch]) for i in range(args.batches)]
    return [dict(tokenizer(part, return_token_type_ids=False, **options)) for part in parts]


def make_batches(case: str, args: InferenceArguments) -> list[Batch]:
    """Make the inputs of a case."""
    batch, seq = case.split("x")
    if seq != "real":
        return [random_batch(int(batch), int(seq), args.seed)]
    if args.texts is not None:
        return text_batches(args, int(batch))
    return [drawn_batch(int(batch), args.seed + i) for i in range(args.batches)]


def make_models(args: InferenceArguments) -> dict[str, PreTrainedModel]:
    """Build all models, and optimised copies that share their weights."""
    torch.manual_seed(args.seed)
    dense = BertModel(BertConfig(**args.sizes()))
    moebert = MoEBertModel(MoEBertConfig(routing=args.routing, **args.sizes()))
    depth = BertModel(BertConfig(**args.sizes() | {"num_hidden_layers": max(len(dense.encoder.layer) // 2, 1)}))
    units = half_units(dense)
    importance = torch.rand(len(dense.encoder.layer), dense.config.intermediate_size // 2)
    both = from_dense(units, importance, num_experts=4, routing=args.routing)
    stock = dict(zip(FORMS, (dense, moebert, depth, units, both), strict=True))
    models = {f"{name} stock": model.eval() for name, model in stock.items()}
    for precision in args.precisions:
        if reason := unsupported_reason(precision, True):
            print(f"{precision} is left out: {reason}.")
            continue
        models |= {f"{name} {precision}": optimized(model, precision=precision) for name, model in stock.items()}
    models["moebert float32 padded"] = optimized(stock["moebert"], precision="float32", skip_padding=False)
    return models


@torch.no_grad()
def half_units(dense: BertModel) -> PreTrainedModel:
    """Remove every second neuron and head of a model."""
    model = copy.deepcopy(dense).eval()
    for group in find_unit_groups(model):
        columns = group.writer.weight.view(-1, group.num_units, group.unit_size)
        columns[:, 1::2] = 0
        for parameter in group.reader_parameters:
            parameter.view(group.num_units, -1)[1::2] = 0
    return shrink(model)


def optimized(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Optimise a copy that shares the weights."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return optimize_for_inference(copy.deepcopy(model, shared), **options)


def run_all(calls: list[Callable[[], object]]) -> None:
    """Run the batches of a case one after the other."""
    for call in calls:
        call()


def export_all(models: dict[str, PreTrainedModel], folder: Path, args: InferenceArguments) -> None:
    """Write the stock models for ONNX Runtime."""
    precisions = [precision for precision in args.precisions if precision != "bfloat16"]
    for name, model in models.items():
        if name.endswith(" stock"):
            export_onnx(model, folder / name.removesuffix(" stock"), precisions=precisions)


def make_calls(
    models: dict[str, PreTrainedModel], batches: list[Batch], folder: Path, args: InferenceArguments
) -> dict[str, Callable[[], object]]:
    """Bind every contestant to the batches of a case."""
    calls = {name: partial(run_all, [partial(model, **b) for b in batches]) for name, model in models.items()}
    for name in [name.removesuffix(" stock") for name in models if name.endswith(" stock") and args.onnx]:
        for precision in [p for p in args.precisions if p != "bfloat16"]:
            model = load_onnx(folder / name, precision=precision)
            calls[f"{name} onnx {precision}"] = partial(run_all, [partial(model, **b) for b in batches])
            if any(not b["attention_mask"].all() for b in batches):
                grouped = [partial(run_grouped, model, b) for b in batches]
                calls[f"{name} onnx {precision} grouped"] = partial(run_all, grouped)
    return calls


def run_grouped(model: Any, batch: Batch) -> list[Tensor]:
    """Run the sentences of a batch in groups of like length, from rows without padding on."""
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [ids[:length] for ids, length in zip(batch["input_ids"], lengths, strict=True)]

    def call(part: list[Tensor]) -> Tensor:
        ids = pad_sequence(part, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
        return model(ids, mask)[0]

    return run_by_length(rows, lengths, call, batch_size=len(rows))


def largest_difference(model: PreTrainedModel, stock: PreTrainedModel, batches: list[Batch]) -> float:
    """Compare the hidden states of the real tokens with those of the stock model."""
    differences = [model(**b)[0] - stock(**b)[0] for b in batches]
    return max(float(d[b["attention_mask"].bool()].abs().max()) for d, b in zip(differences, batches, strict=True))


def stock_of(name: str) -> str:
    """Return the name of the stock model that another one is a form of."""
    return f"{next(form for form in FORMS if name.startswith(form))} stock"


def measure(case: str, models: dict[str, PreTrainedModel], folder: Path, args: InferenceArguments) -> dict[str, Any]:
    """Time one case on the current threads, and print its table and the targets."""
    batches, threads = make_batches(case, args), torch.get_num_threads()
    clock = "cpu" if threads == 1 else "wall"
    calls = make_calls(models, batches, folder, args)
    calls = {name: call for name, call in calls.items() if args.only in name}
    times = time_rounds(calls, rounds=args.rounds, clock=clock)
    ratios = {name: compare_times(times, baseline=name, clock=clock, seed=args.seed) for name in times}
    differences = {name: largest_difference(model, models[stock_of(name)], batches) for name, model in models.items()}
    rivals = [name for name in ("dense stock", "dense onnx float32", "dense onnx int8") if name in times]
    rows = [
        {"model": name}
        | {f"over {rival}": f"{ratios[rival][name].median:.2f}x" if name != rival else "–" for rival in rivals}
        | {"difference to stock": f"{differences[name]:.0e}" if name in differences else "–"}
        for name in times
    ]
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    places = sum(b["input_ids"].numel() for b in batches)
    print(f"\n{case}, {threads} thread(s), {clock} clock, {args.rounds} rounds, {tokens} real of {places} tokens\n")
    print(markdown_table(rows), flush=True)
    reached = target_rows(case, ratios)
    if reached:
        print(f"\n{markdown_table(reached)}", flush=True)
    return {
        "case": case,
        "threads": threads,
        "tokens": [tokens, places],
        "seconds": {name: values.tolist() for name, values in times.items()},
        "speed_up_over": {rival: {name: asdict(r) for name, r in of.items()} for rival, of in ratios.items()},
        "differences": differences,
        "targets": reached,
    }


def target_rows(case: str, ratios: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return the targets of a case, and whether each was reached."""
    rows = []
    for (mine, rival), targets in TARGETS.items():
        if case in targets and mine in ratios and rival in ratios:
            ratio = ratios[rival][mine]
            rows.append(
                {
                    "MoEBERT": mine,
                    "against": rival,
                    "speed-up": f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]",
                    "target": f"{targets[case]}x",
                    "reached": "yes" if ratio.median >= targets[case] else "no",
                }
            )
    return rows


@torch.no_grad()
def main(args: InferenceArguments) -> None:
    """Time every case on every number of threads."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")  # what one model needs, for all that are timed
    facts = {"command": " ".join(["python", *sys.argv])} | environment()
    print(markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]))
    models = make_models(args)
    results = []
    with TemporaryDirectory() as folder:
        if args.onnx:
            export_all(models, Path(folder), args)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for case in args.cases:
                results.append(measure(case, models, Path(folder), args))
                if args.output is not None:  # each time: a long run may not come to its end
                    found = {"environment": facts, "results": results}
                    args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(HfArgumentParser(InferenceArguments).parse_args_into_dataclasses()[0])
