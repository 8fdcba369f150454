"""Time the masked CRF against pytorch-crf, layer against layer, with and without masks.

    pip install pytorch-crf==0.7.2
    python benchmarks/crf.py
    python benchmarks/crf.py --rounds 50 --output build/crf.json

Emissions and scores are random, in float32. Both sides get the same numbers, must agree on likelihoods, gradients and
tags (but under "masked", where they mean different things), and run interleaved in one process; ratios are paired by
round. One thread is timed by its own CPU time, more by elapsed time. Half of the rows of a "ragged" batch are shorter
than the others. "masked" is ours with the legality of a tag scheme, which the peer does not know, against the peer
without. "underflow" has emissions so extreme that ours has to fall back on its slow way.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchcrf
from torch import Tensor
from transformers import HfArgumentParser

from hf_moebert.measuring.latency import compare_latency, environment
from hf_moebert.methods.masked_crf import MaskedCRF
from hf_moebert.reporting.tables import markdown_table


CASES = ("full", "ragged", "masked", "underflow")
# by batch and tags; at batch 1 the aim is not to be slower
TARGETS = {(32, 9): (2.5, 2.5, 1.9), (32, 40): (5.0, 5.0, 2.0), (1, 9): (1.0, 1.0, 1.0), (1, 40): (1.0, 1.0, 1.0)}
WORK = ("log-likelihood", "loss and gradient", "decoding")


@dataclass
class CrfBenchmarkArguments:
    """Batches to time, and rounds."""

    cases: list[str] = field(default_factory=lambda: list(CASES), metadata={"help": "Kinds of batches."})
    batches: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Rows of a batch."})
    tags: list[int] = field(default_factory=lambda: [9, 40], metadata={"help": "Numbers of tags."})
    seq: int = field(default=128, metadata={"help": "Words of a row."})
    threads: int = field(default=1, metadata={"help": "Threads that torch computes with."})
    rounds: int = field(default=20, metadata={"help": "Timed calls of each side."})
    seed: int = field(default=0, metadata={"help": "Of emissions, scores, tags and bootstrap."})
    output: Path | None = field(default=None, metadata={"help": "JSON file for everything measured."})

    def __post_init__(self) -> None:
        if unknown := set(self.cases) - set(CASES):
            raise ValueError(f"`cases` must be among {CASES}, got {sorted(unknown)}.")


class Batch:
    """Both layers with the same scores, and the same input for both, each in the layout that it likes."""

    def __init__(self, case: str, batch: int, tags: int, args: CrfBenchmarkArguments) -> None:
        generator = torch.Generator().manual_seed(args.seed)
        labels = ["O", *(f"{prefix}-{kind}" for kind in range(tags) for prefix in "BI")][:tags]
        self.ours = MaskedCRF(labels, mask_transitions="training" if case == "masked" else "off")
        self.peer = torchcrf.CRF(tags, batch_first=True)
        names = {"transitions": "transitions", "start": "start_transitions", "end": "end_transitions"}
        with torch.no_grad():
            for mine, theirs in names.items():
                score = getattr(self.ours, mine)
                score.copy_(torch.rand(score.shape, generator=generator) / 5 - 0.1)
                getattr(self.peer, theirs).copy_(score)
            if case == "underflow":  # the first tag is a favourite that nothing else may follow
                self.ours.transitions[0, 1:] = self.peer.transitions[0, 1:] = -1e4
        self.emissions = torch.randn(batch, args.seq, tags, generator=generator)  # (batch, seq, tags)
        if case == "underflow":
            self.emissions[:, :-1, 0] += 300
            self.emissions[:, -1, 0] -= 3e4
        lengths = torch.full((batch,), args.seq)
        if case == "ragged":
            lengths[1::2] = torch.randint(1, args.seq, (batch // 2,), generator=generator)
        self.mask = torch.arange(args.seq) < lengths[:, None]  # (batch, seq)
        self.gold = torch.zeros(batch, args.seq, dtype=torch.long)  # (batch, seq): "O" everywhere is legal

    def likelihood(self, emissions: Tensor, ours: bool) -> Tensor:
        """Return the log-likelihood of each row."""
        if ours:
            return self.ours.log_likelihood(emissions, self.gold, self.mask)
        return self.peer(emissions, self.gold, self.mask, reduction="none")

    def calls(self, work: str) -> dict[str, Callable[[], Any]]:
        """Return what is timed, by side."""
        if work == "decoding":
            return {
                "peer": lambda: self.peer.decode(self.emissions, self.mask),
                "ours": lambda: self.ours.decode(self.emissions, self.mask),
            }
        if work == "log-likelihood":
            run = torch.no_grad()(self.likelihood)
            return {side: lambda side=side: run(self.emissions, side == "ours") for side in ("peer", "ours")}
        leaf = self.emissions.clone().requires_grad_()
        return {side: lambda side=side: self.step(leaf, side == "ours") for side in ("peer", "ours")}

    def step(self, leaf: Tensor, ours: bool) -> Tensor:
        """Return the gradient of the emissions."""
        leaf.grad = None
        (-self.likelihood(leaf, ours).sum()).backward()
        return leaf.grad

    def check(self) -> None:
        """Refuse to time what does not agree."""
        values = {side: self.calls("log-likelihood")[side]() for side in ("ours", "peer")}
        torch.testing.assert_close(values["ours"], values["peer"], rtol=1e-4, atol=1e-3)
        gradients = {side: self.calls("loss and gradient")[side]().clone() for side in ("ours", "peer")}
        torch.testing.assert_close(gradients["ours"], gradients["peer"], rtol=1e-3, atol=1e-3)
        tags = self.calls("decoding")["ours"]()
        rows = [row[mask].tolist() for row, mask in zip(tags, self.mask, strict=True)]
        assert rows == self.calls("decoding")["peer"](), "the two sides decode differently"


def measure(case: str, batch: int, tags: int, args: CrfBenchmarkArguments) -> dict[str, Any]:
    """Time one kind of batch: one row of the table."""
    sides = Batch(case, batch, tags, args)
    if case != "masked":
        sides.check()
    row: dict[str, Any] = {"batch": batch, "tags": tags, "case": case}
    clock = "cpu" if args.threads == 1 else "wall"
    for work, target in zip(WORK, TARGETS.get((batch, tags), (None,) * 3), strict=True):
        ratio = compare_latency(sides.calls(work), baseline="peer", rounds=args.rounds, clock=clock, seed=args.seed)[
            "ours"
        ]
        row[work] = asdict(ratio) | {"target": target if case == "full" else None}
    return row


def show(row: dict[str, Any]) -> dict[str, str]:
    """Write a row for people."""
    cells = {key: str(row[key]) for key in ("batch", "tags", "case")}
    for work in WORK:
        ratio = row[work]
        aim = "" if ratio["target"] is None else f" (aim {ratio['target']:g}x)"
        cells[work] = f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]{aim}"
    return cells


def main() -> None:
    """Time everything, and print one table."""
    (args,) = HfArgumentParser(CrfBenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    rows = [measure(case, batch, tags, args) for case in args.cases for tags in args.tags for batch in args.batches]
    print(f"pytorch-crf over ours, {args.seq} words, float32, {args.threads} thread(s); above 1 ours is faster\n")
    print(markdown_table([show(row) for row in rows]))
    if args.output is not None:
        settings = {key: str(value) for key, value in asdict(args).items()}
        report = {"rows": rows, "settings": settings, "environment": environment()}
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
