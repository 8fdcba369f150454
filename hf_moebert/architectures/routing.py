"""Records of what the routers of a model decided, and the fields that an output has for them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class RoutingOutput(ModelOutput):
    """The fields that the output of a routed model has besides those of the base class.

    Args:
        aux_loss: Balance loss of the routers, unweighted; only where it has a weight.
        router_logits: Logits of each router, `(batch, seq, experts)`, or `(batch, experts)` if sentences are routed.
    """

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class Routing(NamedTuple):
    """The decision of one network in one forward pass."""

    network: Any
    logits: Any  # (batch, [seq,] experts), None where a table decides
    chosen: Tensor  # index, (tokens, top_k)


class _Thread(threading.local):
    """State of the forward pass that runs in this thread; unlike a context variable, compilers can trace it."""

    # None outside of a pass that is recorded, as when a checkpointed block runs again in the backward pass
    records: list[Routing] | None = None


_thread = _Thread()


@contextmanager
def recording() -> Iterator[list[Routing]]:
    """Collect the decisions of all networks that run inside, in order."""
    outer, _thread.records = _thread.records, []
    try:
        yield _thread.records
    finally:
        _thread.records = outer


def record(routing: Routing) -> None:
    """Add a decision to the records, if there are any."""
    if _thread.records is not None:
        _thread.records.append(routing)
