"""Second moments of the inputs of writers, and of what their errors do to the outputs of the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moebert.architectures.heads import kinds_of_outputs
from hf_moebert.architectures.inputs import Batch

from .functional_influence import draw_direction, with_constant
from .modeling_units import UnitGroup


@dataclass
class Influence:
    """Inputs of a writer, and the effect of its errors on the outputs of the model.

    Attributes:
        counted: Of each batch, the tokens at which an error reaches the outputs: none of padding. Shapes `(tokens,)`.
        moment: Sum of `x x^T` over these tokens, with a constant for the bias. Shape `(in, in)`, float64.
        metric: Sum of the second moments of the gradients over them. Shape `(out, out)`, float64.
    """

    counted: list[Tensor] = field(default_factory=list)
    moment: Any = 0.0
    metric: Any = 0.0

    def add(self, inputs: Tensor, gradients: Tensor, bias: Tensor | None) -> None:
        """Take in the inputs `(tokens, in)` and the gradients `(tokens, out)` of a batch."""
        gradients = gradients.double()
        counts = gradients.any(dim=1)  # (tokens,)
        self.counted.append(counts)
        self.moment += sum_moments(inputs[counts], bias)
        self.metric += gradients.T @ gradients

    @property
    def count(self) -> int:
        """Number of tokens."""
        return sum(int(counts.sum()) for counts in self.counted)


def sum_moments(inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Sum `x x^T` over inputs `(tokens, in)` of a layer, in float64, `(in, in)`."""
    inputs = with_constant(inputs.double(), bias)
    return inputs.T @ inputs


def measure_influence(
    model: PreTrainedModel, groups: Sequence[UnitGroup], batches: Sequence[Batch], *, seed: int
) -> dict[nn.Module, Influence]:
    """Measure, in one pass without labels, what the writers are given and what their errors would do.

    Args:
        model: In eval mode, none of its parameters trainable.
        groups: Units of the model.
        batches: Inputs of the model.
        seed: Of the directions of the outputs.

    Returns:
        By writer, in the order in which the model uses them.

    Raises:
        ValueError: If the inputs do not reach a writer, or errors of it do not reach the outputs.
    """
    found: dict[nn.Module, Influence] = {}

    def watch(writer: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        if not output.requires_grad:  # the graph starts here
            output = output.detach().requires_grad_()
        influence, inputs = found.setdefault(writer, Influence()), args[0].detach().flatten(0, -2)
        output.register_hook(lambda gradient: influence.add(inputs, gradient.flatten(0, -2), writer.bias))
        return output

    generator = torch.Generator().manual_seed(seed)
    handles = [group.writer.register_forward_hook(watch) for group in groups]
    try:
        for batch in batches:
            with torch.enable_grad():
                _project(model, batch, generator).backward()
    finally:
        for handle in handles:
            handle.remove()
    for group in groups:
        if group.writer not in found or not found[group.writer].count:
            raise ValueError(
                f"The outputs must depend on every layer, but the {group.kind} of layer {group.layer} have no part in "
                "them. Give inputs of the model's task."
            )
    return found


def _project(model: PreTrainedModel, batch: Batch, generator: torch.Generator) -> Tensor:
    """Run the model, and project its outputs on a direction."""
    outputs, mask = model.forward(**batch), batch.get("attention_mask")  # what `model.compile()` made calls no hooks
    total = []
    for name, kind in kinds_of_outputs(model, outputs).items():
        output = outputs[name].float()
        direction = draw_direction(output.detach(), kind, generator)
        if mask is not None and output.dim() == 3 and mask.shape == output.shape[:2]:  # (batch, seq, outputs)
            direction = direction * mask[..., None].to(direction)
        total.append((direction * output).sum())
    return torch.stack(total).sum()


class _Reached(Exception):
    """Ends a forward pass."""


def read_moment(model: PreTrainedModel, writer: Any, batches: Sequence[Batch], counted: list[Tensor]) -> Tensor:
    """Return the mean of `x x^T` over the inputs of a writer that count, `(in, in)`; the model runs up to there."""
    total: Any = 0.0
    for batch, counts in zip(batches, counted, strict=True):
        with _stopping_at(writer) as inputs:
            model.forward(**batch)
        total += sum_moments(inputs[0].flatten(0, -2)[counts], writer.bias)
    return total / sum(int(counts.sum()) for counts in counted)


@contextmanager
def _stopping_at(module: nn.Module) -> Iterator[list[Tensor]]:
    """Run a model only as far as a module, and collect what that is given."""
    inputs: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor]) -> None:
        inputs.append(args[0])
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        yield inputs
    except _Reached:
        pass
    finally:
        handle.remove()
