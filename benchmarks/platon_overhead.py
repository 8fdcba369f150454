"""Time what pruning adds to training: statistics, threshold and masks of BERT-base's 85.0 million encoder scalars.

    python benchmarks/platon_overhead.py
    python benchmarks/platon_overhead.py --rounds 5 --step_rounds 0
    python benchmarks/platon_overhead.py --granularity structured --keep_ratio 0.5

The peer is the straightforward form: a loop over the parameters with fresh tensors, and `torch.cat` with `kthvalue`
for the threshold. One thread, timed by its own CPU time, interleaved in one process; ratios are paired by round. Extra
memory is the growth of the process's peak while one call runs. The last table sets what pruning adds to a step, the
mean over a window, against a whole training step (forward, backward, clipping, AdamW); for units there is no other.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from hf_moebert import PlatonConfig
from hf_moebert.measuring.latency import compare_times, environment, time_rounds
from hf_moebert.methods.platon.functional_selection import kth_smallest
from hf_moebert.methods.platon.training_pruner import Pruner
from hf_moebert.reporting.tables import markdown_table


@dataclass
class OverheadArguments:
    """How often to time what."""

    rounds: int = field(default=10, metadata={"help": "Timed rounds of statistics, threshold and masks."})
    step_rounds: int = field(default=3, metadata={"help": "Timed whole training steps; 0 leaves them out."})
    layers: int = field(default=12, metadata={"help": "Layers of the BERT, by default those of BERT-base."})
    hidden: int = field(default=768, metadata={"help": "Their width; there are four times as many neurons."})
    batch: int = field(default=32, metadata={"help": "Sequences of a training step."})
    seq: int = field(default=128, metadata={"help": "Tokens of each of them."})
    keep_ratio: float = field(default=0.1, metadata={"help": "Share of the weights kept."})
    granularity: str = field(default="unstructured", metadata={"help": "Or `structured`."})
    criterion: str = field(default="platon", metadata={"help": "See PlatonConfig; one with windows."})
    seed: int = field(default=0, metadata={"help": "Of weights, gradients and ids."})


class Straightforward:
    """The peer: the same equations as one writes them down first."""

    def __init__(self, pruner: Pruner) -> None:
        self.parameters, self.config = pruner.parameters, pruner.config
        self.tensors = {
            kind: {name: tensor.clone().view_as(self.parameters[name]) for name, tensor in tensors.items()}
            for kind, tensors in pruner.statistics.tensors.items()
        }

    def observe(self, position: int) -> None:
        """Update the statistics with fresh tensors."""
        window, importance, uncertainty = (self.tensors[kind] for kind in ("window", "importance", "uncertainty"))
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name, parameter in self.parameters.items():
            s = (parameter * parameter.grad).abs().detach()
            if position:
                window[name] = (window[name] * position + s) / (position + 1)
                continue
            importance[name] = beta1 * importance[name] + (1 - beta1) * window[name]
            distance = (window[name] - importance[name]).abs()
            uncertainty[name] = beta2 * uncertainty[name] + (1 - beta2) * distance
            window[name] = s

    def scores(self) -> dict[str, Tensor]:
        """Score every weight."""
        return {name: self.tensors["importance"][name] * self.tensors["uncertainty"][name] for name in self.parameters}

    def threshold(self, k: int) -> float:
        """Concatenate all scores and select."""
        return torch.cat([scores.flatten() for scores in self.scores().values()]).kthvalue(k).values.item()

    def mask(self, threshold: float) -> None:
        """Compare and fill."""
        scores = self.scores()
        for name, parameter in self.parameters.items():
            parameter.data.masked_fill_(scores[name] < threshold, 0.0)


def prepare(args: OverheadArguments) -> tuple[BertForSequenceClassification, Pruner]:
    """Make a BERT with random weights and gradients, whose statistics have seen two windows."""
    torch.manual_seed(args.seed)
    sizes = {"num_hidden_layers": args.layers, "hidden_size": args.hidden, "intermediate_size": 4 * args.hidden}
    model = BertForSequenceClassification(BertConfig(**sizes)).train()
    config = PlatonConfig(
        keep_ratio=args.keep_ratio,
        granularity=args.granularity,
        criterion=args.criterion,
        include_bias=args.granularity == "unstructured",
        initial_warmup=0,
        final_warmup=1,
    )
    pruner = Pruner(model, config, 1000)
    for _ in range(20):
        for parameter in pruner.parameters.values():
            parameter.grad = torch.randn_like(parameter).mul_(1e-4)
        pruner.statistics.observe((pruner.clock + 1) % config.window)
        pruner.clock += 1
    return model, pruner


def peak_growth(call: Callable[[], object]) -> float:
    """Return by how many MB the process's peak of memory rises above what it holds, while a call runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1000


def _status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def parts_of(pruner: Pruner) -> dict[str, Callable[[], object]]:
    """Return the parts of a step, by name."""
    pruner.clock = pruner.end + 1
    pruner._renew_masks()
    return {
        "statistics, ordinary step": partial(pruner.statistics.observe, 3),
        "statistics, end of a window": partial(pruner.statistics.observe, 0),
        "masks applied": pruner.apply_masks,
        "masks renewed and applied": lambda: (pruner._renew_masks(), pruner.apply_masks()),
    }


def time_parts(pruner: Pruner, rounds: int) -> tuple[dict[str, np.ndarray], list[dict[str, str]]]:
    """Time each part against the peer; both must find the same threshold."""
    peer = Straightforward(pruner)
    sizes = [len(piece) for piece in pruner.selector.pieces]
    zeros = round((1 - pruner.config.keep_ratio) * pruner.numel)
    threshold = partial(kth_smallest, pruner.selector._score_by_index, sizes, zeros, torch.device("cpu"))
    theirs_by_part = {
        "statistics, ordinary step": partial(peer.observe, 3),
        "statistics, end of a window": partial(peer.observe, 0),
        "exact threshold": partial(peer.threshold, zeros),
        "masks applied": lambda: peer.mask(pruner.threshold),
        "masks renewed and applied": lambda: peer.mask(peer.threshold(zeros)),
    }
    ours_by_part = parts_of(pruner) | {"exact threshold": threshold}
    ours_and_theirs = {name: (ours_by_part[name], theirs) for name, theirs in theirs_by_part.items()}
    times, rows = {}, []
    found = threshold()[0]
    memory = {name: peak_growth(ours) for name, (ours, _) in ours_and_theirs.items()}  # before the peer leaves a heap
    assert found == peer.threshold(zeros), "the thresholds must be equal to the last bit"
    for name, (ours, theirs) in ours_and_theirs.items():
        durations = time_rounds({"ours": ours, "theirs": theirs}, rounds=rounds, warmup=1, clock="cpu")
        ratio = compare_times(durations, baseline="theirs", clock="cpu")["ours"]
        times[name] = durations["ours"]
        rows.append(
            {
                "part": name,
                "speed-up over the peer": f"{ratio.median:.1f}x [{ratio.low:.1f}, {ratio.high:.1f}]",
                "extra memory": f"{memory[name]:.0f} MB",
                "of the peer": f"{peak_growth(theirs):.0f} MB",
            }
        )
    return times, rows


def training_steps(
    pruner: Pruner, optimizer: torch.optim.Optimizer, backward: Callable[[], None]
) -> dict[str, Callable[[], None]]:
    """Return whole training steps, without pruning and with it."""

    def step(*, prune: bool) -> None:
        backward()
        with torch.no_grad():
            if prune:
                pruner.observe()
            optimizer.step()
            if prune:
                pruner.advance()
        optimizer.zero_grad()

    return {"plain": partial(step, prune=False), "pruned": partial(step, prune=True)}


def time_steps(model: BertForSequenceClassification, pruner: Pruner, args: OverheadArguments) -> dict[str, np.ndarray]:
    """Time whole training steps, without pruning and in its final phase."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.seq))
    labels = torch.randint(2, (args.batch,))

    def backward() -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    calls = training_steps(pruner, optimizer, backward)
    return time_rounds(calls, rounds=args.step_rounds, warmup=1, clock="cpu")


def overhead_rows(parts: Mapping[str, np.ndarray], step: np.ndarray, window: int) -> list[dict[str, str]]:
    """Share of a training step that each kind of step adds, and the mean over a window of the final phase."""
    median = {name: float(np.median(times)) for name, times in parts.items()}
    ordinary, closing = median["statistics, ordinary step"], median["statistics, end of a window"]
    statistics = ((window - 1) * ordinary + closing) / window
    renewed, applied = median["masks renewed and applied"], median["masks applied"]
    costs = {
        "before pruning begins": statistics,
        "while the ratio falls": statistics + renewed / window,
        "final phase": statistics + (renewed + (window - 1) * applied) / window,
    }
    return [{"phase": name, "adds to a step": f"{cost / np.median(step):.2%}"} for name, cost in costs.items()]


def main(args: OverheadArguments) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    model, pruner = prepare(args)
    print(markdown_table([{"what": key, "value": str(value)} for key, value in environment().items()]))
    print(f"\n{pruner.numel:,} scalars in {len(pruner.parameters)} tensors, {args.rounds} rounds\n")
    with torch.no_grad():
        if args.granularity == "unstructured":
            times, rows = time_parts(pruner, args.rounds)
            print(markdown_table(rows))
        else:
            times = time_rounds(parts_of(pruner), rounds=args.rounds, warmup=1, clock="cpu")
    if args.step_rounds:
        steps = time_steps(model, pruner, args)
        shape = f"{args.layers} x {args.hidden}, {args.batch} x {args.seq}"
        print(f"\n{shape}, mean over a window of {pruner.config.window} steps\n")
        print(markdown_table(overhead_rows(times, steps["plain"], pruner.config.window)))
        ratio = compare_times(steps, baseline="pruned", clock="cpu")["plain"]
        print(f"\nWhole steps in turns, {args.step_rounds} rounds: pruned / plain {ratio.median:.3f}")
        print(f"[{ratio.low:.3f}, {ratio.high:.3f}]")


if __name__ == "__main__":
    main(HfArgumentParser(OverheadArguments).parse_args_into_dataclasses()[0])
