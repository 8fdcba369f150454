"""Time what a study made: in turns against the first, on one thread of the processor."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from hf_moebert.measuring.latency import SpeedUp, compare_latency


Batch = Mapping[str, torch.Tensor]


def with_ratio_interval(ratio: SpeedUp, *, as_cost: bool = False) -> str:
    """Write a speed-up with its interval, or the share of the baseline's time that it stands for."""
    values = (ratio.median, ratio.low, ratio.high)
    median, low, high = (1 / values[0], 1 / values[2], 1 / values[1]) if as_cost else values
    return f"{median:.2f}x [{low:.2f}, {high:.2f}]"


def timing_rows(
    calls: Mapping[str, Callable[[], object]], column: str, *, as_cost: bool = False, **options: int
) -> list[dict[str, str]]:
    """Time calls in turns against the first of them, on one thread of the processor."""
    torch.set_num_threads(1)
    ratios = compare_latency(calls, baseline=next(iter(calls)), clock="cpu", **options)
    return [{"run": name, column: with_ratio_interval(ratio, as_cost=as_cost)} for name, ratio in ratios.items()]


def training_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """Return a function that makes one training step in float32 with the Trainer's default optimizer."""
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def shape_of(batch: Batch) -> str:
    """Write the shape of the inputs of a batch."""
    return "x".join(str(size) for size in batch["input_ids"].shape)
