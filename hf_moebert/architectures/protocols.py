"""Protocols between packages: the members that one package reads from the modules and callbacks of another.

Methods whose code travels with a checkpoint do not import them. They have the members by name, and a test compares.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable


if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class PartlyActive(Protocol):
    """A module that uses only a part of its own parameters for one token; `measure_footprint` reads it.

    Attributes:
        active_fraction: Share of its own parameters used for one token, in (0, 1].
    """

    active_fraction: float


@runtime_checkable
class SortedExperts(Protocol):
    """Stacked experts that multiply slices of tokens sorted by expert; `optimize_for_inference` replaces the products.

    Attributes:
        prefers_slices: Whether slices are multiplied on any device.
        has_gate: Whether the first matrix is a gate and an up-projection, one above the other.
        act_fn: The activation; of a gate alone, where there is one.
    """

    # What a module registers is not declared: from Python 3.12 on, `isinstance` does not see it.
    prefers_slices: bool
    has_gate: bool

    @property
    def stacks(self) -> "tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]":
        """Weights and biases before and behind the activation, `(experts, out, in)` and `(experts, out)`."""

    def run_sorted(self, slots: "Tensor", counts: list[int]) -> "Tensor":
        """Apply each expert to its slice, of `counts` rows: `(slots, hidden)` to `(slots, hidden)`."""

    def activate(self, x: "Tensor") -> "Tensor":
        """Apply the activation and, in a gated network, the gate: `(slots, expert_size or twice that)`."""


@runtime_checkable
class PackedSentences(Protocol):
    """The argument `sentences` of a layer's `forward`: the sentences of a batch without padding, in one row of tokens.

    Attributes:
        lengths: Real tokens of each sentence, one for each row of the batch.
    """

    lengths: list[int]

    def unpack(self, x: "Tensor") -> "Tensor":
        """Put the tokens back, `(1, tokens, ...)` to `(batch, seq, ...)`; padding is zero."""


@runtime_checkable
class UnitCosts(Protocol):
    """Costs of the units of a model, as shares of the time of the dense model; `LatencyTable` is one.

    Attributes:
        milliseconds: Time of the dense model.
        smallest: Share that is left with one unit of each kind in every layer.
    """

    @property
    def milliseconds(self) -> float: ...  # noqa: D102 - see above

    @property
    def smallest(self) -> float: ...  # noqa: D102 - see above

    def costs(self, kind: str) -> "Tensor":
        """Return the share of 1, 2, ... units of one layer above that of one unit, `(units,)`."""


@runtime_checkable
class OptimizedForInference(Protocol):
    """A module changed by `optimize_for_inference`; what rewrites weights refuses it.

    Attributes:
        make_linear: Builds a linear layer for inference from a weight, a bias and an activation.
    """

    make_linear: Callable[..., Any]


@dataclass(frozen=True)
class AnswerOptions:
    """How a client wants its inputs answered; what a model has no use for, it ignores.

    Args:
        tasks: Tasks of a multi-task model; `None` for all that can read the input.
        truncate: Whether to cut a text that is longer than the model takes, instead of refusing it.
        raw_scores: Whether to answer with logits, instead of what the problem makes of them.
        normalize: Whether embeddings have the length 1; by default as the model's folder says.
        prompt_name: Prompt of an embedder to put before a text; by default as its folder says.
    """

    tasks: tuple[str, ...] | None = None
    truncate: bool = False
    raw_scores: bool = False
    normalize: bool | None = None
    prompt_name: str | None = None


@runtime_checkable
class Predictor(Protocol):
    """A model that `hf_moebert.serving` can serve. One thread at a time calls `answer`."""

    def describe(self) -> Mapping[str, Any]:
        """Return the `kind` of the model, one of those that routes answer by, and what clients need to know of it."""

    def check(self, inputs: Any, options: AnswerOptions) -> None:
        """Raise a ValueError for an input that cannot be answered; must be quick."""

    def answer(self, requests: Sequence[tuple[Any, AnswerOptions]]) -> Sequence[Any]:
        """Answer inputs, each with its own options; an exception in the place of an answer is that input's alone."""


@runtime_checkable
class UpdatablePredictor(Predictor, Protocol):
    """A predictor of several tasks, which come and go while it serves; one thread calls all that changes them."""

    def describe_tasks(self) -> Mapping[str, Mapping[str, Any]]:
        """Return a description of each task."""

    def load_task(self, folder: Path) -> Any:
        """Load a task for `put_task`; may be slow."""

    def put_task(self, name: str, task: Any) -> None:
        """Add or replace a task, or raise a ValueError and change nothing."""

    def remove_task(self, name: str) -> None:
        """Remove a task."""


@runtime_checkable
class ManyTasks(Protocol):
    """A model of many tasks, which falls apart into one model for each."""

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""

    def extract_task(self, name: str) -> Any:
        """Return a copy of the model of a task."""

    @classmethod
    def from_tasks(cls, models: Mapping[str, Any]) -> Any:
        """Make one model of those of the tasks."""
