"""Train a model without its dropout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


# Attributes of attention modules that hold the rate themselves
RATES = ("dropout", "dropout_prob", "attention_dropout", "attn_dropout", "dropout_p")


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set all rates of dropout to zero while the block runs; the configuration stays as it is.

    A student that begins close to its teacher otherwise learns from the noise that dropout puts between them: our own
    observation.
    """
    changed: list[tuple[Any, str, float]] = []
    for module in model.modules():
        names = ("p",) if isinstance(module, nn.Dropout) else RATES
        for name in names:
            rate = module.__dict__.get(name)  # not of modules of these names
            if isinstance(rate, float) and rate:
                changed.append((module, name, rate))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in changed:
            setattr(module, name, rate)
