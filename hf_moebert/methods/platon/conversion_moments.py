"""Second moments of the inputs of writers, and of what their errors do to the outputs of the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.architectures.importance import LABELS, load_batches

from .functional_influence import Kind, draw_direction, with_constant
from .modeling_units import UnitGroup


Batch = dict[str, Tensor]
MIN_EXAMPLES = 32  # fewer say little about what a layer is given
MAX_LENGTH = 512  # tokens of a text, where the tokenizer sets no limit


def load_inputs(
    model: PreTrainedModel, dataset: Any, processing: Any, *, max_examples: int, batch_size: int
) -> list[Batch]:
    """Encode the first examples of a data set, in batches on the model's device, without their labels.

    Args:
        model: The model whose `forward` says which columns there are.
        dataset: Texts, or encoded examples.
        processing: A tokenizer, or the collator of encoded examples; `None` for that of transformers.
        max_examples: How many are used.
        batch_size: Examples of a batch.

    Raises:
        ValueError: If there are too few examples, or texts and no tokenizer.
    """
    examples = list(islice(dataset, max_examples))
    if len(examples) < MIN_EXAMPLES:
        raise ValueError(
            f"`dataset` and `max_examples` must give at least {MIN_EXAMPLES} examples, got {len(examples)}. Give some "
            "hundred texts of the kind that the model is used for; they need no labels."
        )
    is_tokenizer = isinstance(processing, PreTrainedTokenizerBase)
    if isinstance(examples[0], str):
        if not is_tokenizer:
            raise ValueError(
                f"`processing` must be the model's tokenizer for texts, got {type(processing).__name__}. Use "
                "`AutoTokenizer.from_pretrained`."
            )
        limit = min(processing.model_max_length, MAX_LENGTH)
        encoded = processing(sorted(examples, key=len), truncation=True, max_length=limit)  # little is padded
        examples = [{name: values[row] for name, values in encoded.items()} for row in range(len(examples))]
    collator = DataCollatorWithPadding(processing) if is_tokenizer else processing
    with torch.random.fork_rng(devices=[]):  # a `DataLoader` draws a seed, though nothing is drawn by it
        return [_without_labels(model, batch) for batch in load_batches(model, examples, collator, batch_size)]


def _without_labels(model: Any, batch: Batch) -> Batch:
    """Leave out the labels; a decoder is given those that it would be trained with."""
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    if "labels" in batch and model.config.is_encoder_decoder and model.can_generate():
        inputs.setdefault("decoder_input_ids", model.prepare_decoder_input_ids_from_labels(batch["labels"]))
    return inputs


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
    for name, kind in _kinds_of_outputs(model, outputs).items():
        output = outputs[name].float()
        direction = draw_direction(output.detach(), kind, generator)
        if mask is not None and output.dim() == 3 and mask.shape == output.shape[:2]:  # (batch, seq, outputs)
            direction = direction * mask[..., None].to(direction)
        total.append((direction * output).sum())
    return torch.stack(total).sum()


def _kinds_of_outputs(model: PreTrainedModel, outputs: Any) -> dict[str, Kind]:
    if "start_logits" in outputs:
        return {"start_logits": "classes", "end_logits": "classes"}
    if "logits" not in outputs:
        return {"last_hidden_state": "numbers"}
    problem = getattr(model.config, "problem_type", None)
    if problem == "regression" or outputs["logits"].shape[-1] == 1:
        return {"logits": "numbers"}
    return {"logits": "labels" if problem == "multi_label_classification" else "classes"}


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
