"""Time an embedder on texts of real lengths: padded batches, sorted ones, and groups of like length, in both engines.

    hf-moebert export MODEL GRAPHS --precision float32 --precision int8
    python benchmarks/lengths.py --model MODEL --graphs GRAPHS --texts texts.jsonl

One thread, timed by its own processor time, all interleaved; ratios are over padded batches in the order of the texts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from hf_moebert import load_onnx, optimize_for_inference
from hf_moebert.data.buckets import run_by_length
from hf_moebert.measuring.latency import compare_times, time_rounds
from hf_moebert.reporting.tables import markdown_table
from hf_moebert.runtime.folders import PRECISIONS


WAYS = {"sorted": 0.001, "half": 0.5, "three quarters": 0.75, "nine tenths": 0.9}  # the shortest over the longest


@dataclass
class LengthsArguments:
    """What is timed, and how often."""

    model: str = field(metadata={"help": "Folder of a model without head, with its tokenizer."})
    graphs: Path = field(metadata={"help": "Folder of its export in float32 and int8."})
    texts: Path = field(metadata={"help": "JSON lines with a column `text`."})
    count: int = field(default=64, metadata={"help": "How many texts."})
    batch_size: int = field(default=32, metadata={"help": "Most texts of a batch."})
    rounds: int = field(default=4, metadata={"help": "Timed passes over all texts."})


def run_part(model: Any, part: list[Tensor]) -> Tensor:
    """Run rows as one batch, padded to the longest."""
    mask = pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
    return model(input_ids=pad_sequence(part, batch_first=True), attention_mask=mask)[0]


def run_padded(model: Any, rows: list[Tensor], batch_size: int) -> None:
    """Run rows in their order."""
    for start in range(0, len(rows), batch_size):
        run_part(model, rows[start : start + batch_size])


def make_calls(models: dict[str, Any], rows: list[Tensor], batch_size: int) -> dict[str, Callable[[], object]]:
    """Bind every model to every way of batching."""
    calls: dict[str, Callable[[], object]] = {}
    lengths = [len(row) for row in rows]
    for name, model in models.items():
        calls[f"{name}: padded"] = partial(run_padded, model, rows, batch_size)
        run = partial(run_by_length, rows, lengths, partial(run_part, model))
        for way, shortest in WAYS.items():
            calls[f"{name}: {way}"] = partial(run, batch_size=batch_size, shortest=shortest)
        calls[f"{name}: alone"] = partial(run, batch_size=1)
    return calls


@torch.no_grad()
def main(args: LengthsArguments) -> None:
    """Time all, and print the ratios of each engine."""
    torch.set_num_threads(1)
    texts = load_dataset("json", data_files=str(args.texts), split="train")["text"][: args.count]
    ids = AutoTokenizer.from_pretrained(args.model)(texts, truncation=True, max_length=128)["input_ids"]
    models = {f"onnx {name}": load_onnx(args.graphs, precision=name, threads=1) for name in PRECISIONS}
    for name, skips in (("torch int8", True), ("torch int8, padding kept", False)):
        dense = AutoModel.from_pretrained(args.model)
        models[name] = optimize_for_inference(dense, precision="int8", skip_padding=skips)
    calls = make_calls(models, [torch.tensor(row) for row in ids], args.batch_size)
    times = time_rounds(calls, rounds=args.rounds, warmup=1, clock="cpu")
    rows = []
    for name in models:
        own = {call: values for call, values in times.items() if call.startswith(f"{name}: ")}
        for call, ratio in compare_times(own, baseline=f"{name}: padded", clock="cpu").items():
            rows.append({"call": call, "over padded": f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"})
    print(markdown_table(rows))


if __name__ == "__main__":
    main(HfArgumentParser(LengthsArguments).parse_args_into_dataclasses()[0])
