"""Records of what the routers of a model decided, and the fields that an output has for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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
    logits: Tensor  # (batch, seq, experts)
    chosen: Tensor  # index, (tokens, top_k)


# The decisions in the forward pass that runs in this thread; None outside of one that is recorded, as when a
# checkpointed block runs again in the backward pass
_records: ContextVar[list[Routing] | None] = ContextVar("routing", default=None)


@contextmanager
def recording() -> Iterator[list[Routing]]:
    """Collect the decisions of all networks that run inside, in order."""
    records: list[Routing] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def record(routing: Routing) -> None:
    """Add a decision to the records, if there are any."""
    records = _records.get()
    if records is not None:
        records.append(routing)
