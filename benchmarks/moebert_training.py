"""Time what trains a MoEBERT: one layer's forward and backward, and the measuring of importance.

    python benchmarks/moebert_training.py
    python benchmarks/moebert_training.py --tokens 64 --rounds 50

The peers: a loop over separate `nn.Linear` experts (the paper's way to hold experts), the dense feed-forward network,
and for importance one backward per example and layer (the paper's code). One thread, timed by its own CPU time, all
interleaved in one process; ratios are paired by round.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from hf_moebert import MoEBertConfig, MoEBertModel, measure_importance
from hf_moebert.measuring.latency import compare_latency, environment
from hf_moebert.reporting.tables import markdown_table


@dataclass
class TrainingBenchmarkArguments:
    """Sizes of the benchmark, and its rounds."""

    tokens: list[int] = field(default_factory=lambda: [64, 1024], metadata={"help": "Tokens of a layer's pass."})
    rounds: int = field(default=20, metadata={"help": "Timed passes of a layer."})
    importance_rounds: int = field(default=5, metadata={"help": "Timed measurements of importance."})
    examples: int = field(default=8, metadata={"help": "Examples that importance is measured on."})
    seq: int = field(default=32, metadata={"help": "Tokens of each of them."})


class SeparateExperts(nn.Module):
    """The peer: every expert is two linear layers, run one after the other on its tokens."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.expert_size
        self.up = nn.ModuleList(nn.Linear(hidden, size) for _ in range(config.num_experts))
        self.down = nn.ModuleList(nn.Linear(size, hidden) for _ in range(config.num_experts))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Run the experts, `(tokens, hidden)`; top-1."""
        order = index.flatten().argsort(stable=True)
        counts = index.flatten().bincount(minlength=len(self.up)).tolist()
        parts = x[order].split(counts)
        output = torch.cat([down(F.gelu(up(part))) for part, up, down in zip(parts, self.up, self.down, strict=True)])
        return output[order.argsort()] * weights


class Dense(nn.Module):
    """The feed-forward network that the experts replace."""

    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Run the network, `(tokens, hidden)`."""
        return self.down(F.gelu(self.up(x)))


def experts(implementation: str) -> nn.Module:
    """Build one layer's experts with random weights."""
    model = MoEBertModel(MoEBertConfig(num_hidden_layers=1))
    model.set_experts_implementation(implementation)
    (network,) = model.networks().values()
    return network.experts


def train_step(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> None:
    """Run forward and backward once."""
    module.zero_grad()
    module(x, index, weights).square().mean().backward()


def time_layers(tokens: int, rounds: int) -> list[dict[str, str]]:
    """Compare the implementations with the loop over separate linears."""
    modules = {"loop over linears": SeparateExperts(MoEBertConfig()), "dense": Dense(MoEBertConfig())}
    modules |= {name: experts(name) for name in ("sorted_mm", "eager", "grouped_mm")}
    x = torch.randn(tokens, 768, requires_grad=True)
    index, weights = torch.randint(4, (tokens, 1)), torch.ones(tokens, 1)
    calls: dict[str, Callable] = {name: partial(train_step, m, x, index, weights) for name, m in modules.items()}
    ratios = compare_latency(calls, baseline="loop over linears", rounds=rounds, clock="cpu")
    return [
        {"tokens": str(tokens), "layer": name, "speed-up over the loop": f"{r.median:.2f} [{r.low:.2f}, {r.high:.2f}]"}
        for name, r in ratios.items()
    ]


def one_backward_per_example_and_layer(model: BertForSequenceClassification, examples: list[dict]) -> Tensor:
    """Measure importance as the paper's code does: two partial backward passes for each example and layer."""
    model.eval()
    layers = model.bert.encoder.layer
    scores = torch.zeros(len(layers), model.config.intermediate_size)
    for example in examples:
        loss = model(**{name: value[None] for name, value in example.items()}).loss
        for number, layer in enumerate(layers):
            up, down = layer.intermediate.dense.weight, layer.output.dense.weight
            (grad_up,) = torch.autograd.grad(loss, up, retain_graph=True)
            (grad_down,) = torch.autograd.grad(loss, down, retain_graph=True)
            scores[number] += ((up * grad_up).sum(dim=1) + (down * grad_down).sum(dim=0)).detach().abs()
    return scores


def time_importance(args: TrainingBenchmarkArguments) -> list[dict[str, str]]:
    """Compare `measure_importance` with the peer on BERT-base; both must find the same scores."""
    model = BertForSequenceClassification(BertConfig()).eval()
    ids = torch.randint(model.config.vocab_size, (args.examples, args.seq))
    examples = [{"input_ids": row, "labels": torch.tensor(n % 2)} for n, row in enumerate(ids)]
    ours = partial(measure_importance, model, examples, batch_size=args.examples)
    theirs = partial(one_backward_per_example_and_layer, model, examples)
    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-6)
    calls = {"one backward per example and layer": theirs, "measure_importance": ours}
    ratios = compare_latency(calls, baseline=next(iter(calls)), rounds=args.importance_rounds, warmup=0, clock="cpu")
    r = ratios["measure_importance"]
    shape = f"{args.examples} x {args.seq}"
    return [{"examples x tokens": shape, "speed-up over the peer": f"{r.median:.1f} [{r.low:.1f}, {r.high:.1f}]"}]


def main(args: TrainingBenchmarkArguments) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(markdown_table([{"what": key, "value": str(value)} for key, value in environment().items()]))
    for tokens in args.tokens:
        print(f"\n{markdown_table(time_layers(tokens, args.rounds))}")
    print(f"\n{markdown_table(time_importance(args))}")


if __name__ == "__main__":
    main(HfArgumentParser(TrainingBenchmarkArguments).parse_args_into_dataclasses()[0])
