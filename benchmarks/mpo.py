"""Time matrix product operators against dense layers, and rebuilding a matrix against the straightforward way.

    python benchmarks/mpo.py
    python benchmarks/mpo.py --cases rebuild chain --rounds 30 --output build/mpo.json
    python benchmarks/mpo.py --cases training --layers 12

Weights are random: nothing here speaks of quality. What is compared runs interleaved in one process; ratios are paired
by round. One thread is timed by its own CPU time, which others on the machine disturb less; more threads by elapsed
time. The training step is that of a model of BERT-base's width with two layers, unless more are asked for: embeddings
and head weigh more in it than in the whole model, which brings its ratio nearer to 1.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, HfArgumentParser, PreTrainedModel

from hf_moebert.measuring.latency import CLOCKS, SpeedUp, compare_latency, environment
from hf_moebert.methods.mpo import compress_mpo
from hf_moebert.methods.mpo.functional import contract, contract_activation, merge
from hf_moebert.methods.mpo.functional_shapes import count_parameters, factor_matrix, full_bonds, plan_chain
from hf_moebert.methods.mpo.modeling_matrix import MPOMatrix
from hf_moebert.methods.mpo.modeling_mpo import decompose_layer
from hf_moebert.reporting.tables import markdown_table


Row = dict[str, Any]
FFN = r".*layer\.\d+\.(intermediate|output)\.dense"
COMPRESSION_TARGET = 90.0  # seconds for all matrices of BERT-base


@dataclass
class MPOBenchmarkArguments:
    """Cases of the benchmark, and their rounds."""

    cases: list[str] = field(default_factory=lambda: list(CASES), metadata={"help": "Any of the tables."})
    threads: int = field(default=1, metadata={"help": "Threads that torch computes with."})
    rounds: int = field(default=15, metadata={"help": "Timed passes of a layer."})
    step_rounds: int = field(default=3, metadata={"help": "Timed training steps."})
    layers: int = field(default=2, metadata={"help": "Of the model that is trained; BERT-base has 12."})
    batch: int = field(default=32, metadata={"help": "Sequences of a training step."})
    seq: int = field(default=128, metadata={"help": "Tokens of each of them."})
    smoke: bool = field(default=False, metadata={"help": "Tiny layers and models, to see that everything runs."})
    seed: int = field(default=0, metadata={"help": "Of weights, activations, ids and bootstrap."})
    output: Path | None = field(default=None, metadata={"help": "JSON file, written anew after every table."})

    def __post_init__(self) -> None:
        if unknown := set(self.cases) - CASES.keys():
            raise ValueError(f"`cases` must be among {list(CASES)}, got {sorted(unknown)}.")

    @property
    def clock(self) -> str:
        """The clock of this number of threads."""
        return "cpu" if self.threads == 1 else "wall"

    @property
    def config(self) -> BertConfig:
        """Of BERT-base, or of something tiny."""
        tiny = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 60}
        return BertConfig(**(tiny if self.smoke else {}))

    def compare(self, baseline: Callable, other: Callable, rounds: int | None = None) -> SpeedUp:
        """Return how many times faster `other` is."""
        calls = {"baseline": baseline, "other": other}
        warmup = 3 if rounds is None else 1
        settings = {"rounds": rounds or self.rounds, "warmup": warmup, "clock": self.clock, "seed": self.seed}
        return compare_latency(calls, baseline="baseline", **settings)["other"]


def random_cores(rows: int, columns: int, num_cores: int, cap: int | None) -> list[Tensor]:
    """Draw a chain whose bonds are capped."""
    factors = factor_matrix(rows, columns, num_cores)
    bonds = [min(cap or bond, bond) for bond in full_bonds(*factors)]
    shapes = zip((1, *bonds), *factors, (*bonds, 1), strict=True)
    return [torch.randn(shape) / math.sqrt(math.prod(shape[:3])) for shape in shapes]


def left_to_right(cores: list[Tensor]) -> Tensor:
    """Rebuild the matrix as one writes it down first: core by core, and one reordering of all digits at the end."""
    digits = cores[0].squeeze(0)
    for core in cores[1:]:
        digits = torch.tensordot(digits, core, dims=1)
    count = len(cores)
    order = (*range(0, 2 * count, 2), *range(1, 2 * count, 2))
    return digits.squeeze(-1).permute(order).reshape(math.prod(core.shape[1] for core in cores), -1)


@torch.no_grad()
def time_evaluation(args: MPOBenchmarkArguments) -> list[Row]:
    """Time a layer at full bonds, whose matrix is kept between calls, against the dense layer."""
    hidden, intermediate = args.config.hidden_size, args.config.intermediate_size
    rows = []
    for inputs, outputs in ((hidden, intermediate), (intermediate, hidden)):
        dense = nn.Linear(inputs, outputs).eval()
        layer = decompose_layer(dense)
        for tokens in (32, 1024):
            x = torch.randn(tokens, inputs)
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)
            ratio = args.compare(partial(dense, x), partial(layer, x))
            rows.append({"layer": f"{inputs} to {outputs}", "tokens": tokens, "over dense": ratio, "target": 0.97})
    return rows


@torch.no_grad()
def time_rebuild(args: MPOBenchmarkArguments) -> list[Row]:
    """Time `contract` against a contraction from left to right."""
    hidden, intermediate = args.config.hidden_size, args.config.intermediate_size
    rows = []
    for size in ((hidden, hidden), (hidden, intermediate), (intermediate, hidden)):
        for cap in (None, 128, 64, 32):
            cores = random_cores(*size, 5, cap)
            torch.testing.assert_close(contract(cores), left_to_right(cores), rtol=1e-3, atol=1e-4)
            ratio = args.compare(partial(left_to_right, cores), partial(contract, cores))
            row = {"matrix": f"{size[0]} x {size[1]}", "bonds": cap or "full"}
            rows.append(row | {"over left to right": ratio, "target": 1.5})
    return rows


@torch.no_grad()
def time_chain(args: MPOBenchmarkArguments) -> list[Row]:
    """Time activations that pass a chain, and what the layer itself picks, against the dense layer."""
    hidden, intermediate = args.config.hidden_size, args.config.intermediate_size
    rows = []
    for inputs, outputs in ((hidden, hidden), (hidden, intermediate), (intermediate, hidden)):
        dense = nn.Linear(inputs, outputs).eval()
        for num_cores in (3, 5):
            factors = factor_matrix(outputs, inputs, num_cores)
            for cap in (1,) if args.smoke else (4, 8, 12):
                bonds = [min(cap, bond) for bond in full_bonds(*factors)]
                counts, macs = plan_chain(*factors, bonds)
                if len(counts) > 1:
                    layer = decompose_layer(dense, num_cores=num_cores, bonds=bonds)
                    shape = {"layer": f"{inputs} to {outputs}", "cores": num_cores, "bonds": cap}
                    shape |= {"multiplications over dense": round(macs / (inputs * outputs), 3)}
                    rows += [shape | row for row in time_tokens(args, dense, layer, counts)]
    return rows


def time_tokens(args: MPOBenchmarkArguments, dense: nn.Linear, layer: MPOMatrix, counts: tuple[int, ...]) -> list[Row]:
    """Time one layer on few and many tokens; a target stands where the layer picks its chain."""
    chain = layer.chain()
    starts = [sum(counts[:k]) for k in range(len(counts))]
    links = [merge(chain[start : start + count]) for start, count in zip(starts, counts, strict=True)]
    rows = []
    for tokens in (1, 32, 64, 256, 1024):
        x = torch.randn(tokens, dense.in_features)
        passes_chain = args.compare(partial(dense, x), lambda x=x: contract_activation(x, links) + layer.bias)
        picked = args.compare(partial(dense, x), partial(layer, x))
        row = {"tokens": tokens, "chain over dense": passes_chain, "layer over dense": picked}
        rows.append(row | {"target": 1.0 if picks_chain(layer, x) else None})
    return rows


def picks_chain(layer: MPOMatrix, x: Tensor) -> bool:
    """Return whether the layer leaves its matrix unbuilt."""
    layer.train().eval()  # which forgets what was kept
    layer(x)
    return layer._matrix.value is None


def time_training(args: MPOBenchmarkArguments) -> list[Row]:
    """Time whole steps, forward, backward and AdamW, with all feed-forward matrices decomposed."""
    config = args.config
    config.num_hidden_layers = args.layers
    dense = BertForSequenceClassification(config).train()
    batch = {"input_ids": torch.randint(config.vocab_size, (args.batch, args.seq))}
    batch["labels"] = torch.randint(2, (args.batch,))
    shape = {"layers": args.layers, "batch": f"{args.batch}x{args.seq}"}
    rows = []
    for cap, train_centre in ((None, False), (None, True), (64, False)):
        model = compress_mpo(dense, target_modules=FFN, bond=cap, train_centre=train_centre)
        ratio = args.compare(make_step(dense, batch), make_step(model, batch), args.step_rounds)
        row = {"bonds": cap or "full", "centre": "trained" if train_centre else "frozen"}
        rows.append(shape | row | {"over dense": ratio, "target": round(1 / 1.35, 3)})
    return rows


def make_step(model: PreTrainedModel, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return one step of AdamW on what is not frozen."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_compression(args: MPOBenchmarkArguments) -> list[Row]:
    """Time `compress_mpo` once, all linear layers and the word embeddings: seconds as a share of the target."""
    rows = []
    for cap in (None, 64):
        model = BertModel(args.config)
        now = CLOCKS[args.clock]
        start = now()
        compressed = compress_mpo(model, bond=cap)
        seconds = now() - start
        layers = [module for module in compressed.modules() if isinstance(module, MPOMatrix)]
        kept = sum(sum(count_parameters(m.row_factors, m.column_factors, m.bonds)) for m in layers)
        row = {"bonds": cap or "full", "matrices": len(layers)}
        row["parameters over dense"] = round(kept / sum(m.rows * m.columns for m in layers), 3)
        rows.append(row | {f"share of {COMPRESSION_TARGET:.0f} s": round(seconds / COMPRESSION_TARGET, 3)})
    return rows


CASES: dict[str, Callable[[MPOBenchmarkArguments], list[Row]]] = {
    "evaluation": time_evaluation,
    "rebuild": time_rebuild,
    "chain": time_chain,
    "training": time_training,
    "compression": time_compression,
}


def written(value: object) -> str:
    """Write a value, a ratio with its 95 % interval."""
    if isinstance(value, SpeedUp):
        return f"{value.median:.2f} ({value.low:.2f} to {value.high:.2f})"
    return "-" if value is None else str(value)


def main(args: MPOBenchmarkArguments) -> None:
    """Print a table for each case."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    facts = {"command": " ".join(["python", *sys.argv])} | environment()
    print(markdown_table([{"what": key, "value": str(value)} for key, value in facts.items()]))
    results: dict[str, list[Row]] = {}
    for case in args.cases:
        start = time.perf_counter()
        rows = CASES[case](args)
        table = markdown_table([{key: written(value) for key, value in row.items()} for row in rows])
        print(f"\n{case}, {args.clock} clock, {time.perf_counter() - start:.0f} s\n\n{table}", flush=True)
        results[case] = [
            {key: asdict(value) if isinstance(value, SpeedUp) else value for key, value in row.items()} for row in rows
        ]
        if args.output is not None:
            args.output.write_text(
                json.dumps({"environment": facts, "results": results}, indent=2) + "\n", encoding="utf-8"
            )


if __name__ == "__main__":
    main(HfArgumentParser(MPOBenchmarkArguments).parse_args_into_dataclasses()[0])
