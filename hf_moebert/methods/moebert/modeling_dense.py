"""The cut of a dense model: checks of what it is cut by, and the weights of the experts."""

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_moebert import MoEFields
from .functional import assign_neurons, cut_experts
from .modeling_layers import MoEBertFeedForward
from .modeling_surgery import FeedForward, matrix_of


def check_dense(model: Any, dense_class: type, name: str) -> None:
    """Refuse a model that is not of the dense class with the same head, or whose matrices are not dense tensors."""
    wanted, config = dense_class.__name__, getattr(model, "config", None)
    shrunk = getattr(config, "model_type", "").startswith("shrunk_")
    ours = getattr(model, "loads_strictly", False) and not shrunk
    if ours or not isinstance(model, dense_class) or config.is_heterogeneous > shrunk:  # type: ignore[union-attr]
        raise ValueError(
            f"`model` must be a dense {wanted} to become a {name}, or a shrunk one, got {type(model).__name__}. Load "
            f"it with `{wanted}.from_pretrained`, merge adapters, and convert it before it is compiled."
        )
    form = getattr(model, "quantization_method", None)
    if form is not None:
        raise ValueError(
            f"`model` must be dense to be cut into the experts of {name}, but its form is {form!r}. Call "
            "`to_dense(model)` first."
        )
    if any(parameter.is_meta for parameter in model.parameters()):  # type: ignore[attr-defined]
        raise ValueError("`model` must hold its weights in memory, some are offloaded. Load it without offloading.")


def check_importance(importance: Tensor, found: list[FeedForward]) -> None:
    """Refuse scores that are not finite, or not one for each neuron of the widest layer, `(layers, intermediate)`."""
    expected = (len(found), max(network.num_units for network in found))
    if not hasattr(importance, "isfinite"):
        raise ValueError(
            f"`importance` must be a tensor, got {type(importance).__name__}. Use `torch.as_tensor`, or "
            "`measure_importance`."
        )
    if importance.shape != expected or not importance.isfinite().all():
        raise ValueError(
            f"`importance` must hold a finite score for each neuron, of shape {expected} (layers, intermediate), "
            f"got shape {tuple(importance.shape)}, finite: {bool(importance.isfinite().all())}. Measure it on "
            "this model with `measure_importance`."
        )


def check_token_counts(token_counts: Tensor | None, vocab_size: int) -> None:
    """Refuse counts that are not one for each token id, `(vocab,)`."""
    if token_counts is None or token_counts.shape != (vocab_size,):
        raise ValueError(
            f"`token_counts` must have shape ({vocab_size},) for `routing` 'hash-balanced', got "
            f"{None if token_counts is None else tuple(token_counts.shape)}. Count the ids of the training set."
        )


def load_dense(student: Any, dense: nn.Module, found: list[FeedForward], importance: Tensor) -> None:
    """Fill a new mixture with the weights of a dense model, cut into experts.

    Args:
        student: The mixture; its gates and tables stay as they were drawn.
        dense: The dense model with the same head.
        found: Feed-forward networks of the dense model.
        importance: Score of each neuron; of narrower networks the first ones count. Shape `(networks, width)`.

    Raises:
        ValueError: If body or head have other parts.
    """
    networks = student.networks()
    converted = [found[layer] for layer in student.config.converted_layers]
    cut = [f"{path}." for network in converted for path in network.matrix_paths]
    state = {name: x for name, x in dense.state_dict().items() if not name.startswith(tuple(cut))}
    missing, unexpected = student.load_state_dict(state, strict=False)
    own = (*(f"{path}." for path in networks), "router.", f"{student.base_model_prefix}.router.")
    missing = [name for name in missing if not name.startswith(own)]
    if missing or unexpected:
        raise ValueError(
            f"`model` must have the body and head of a dense {type(student).__name__}, got {type(dense).__name__}: "
            f"missing {missing}, unexpected {unexpected}. Convert with the class that has the same head."
        )
    for layer, network, source in zip(student.config.converted_layers, networks.values(), converted, strict=True):
        fill_experts(network, source, importance[layer, : source.num_units], student.config)


@torch.no_grad()
def fill_experts(network: MoEBertFeedForward, dense: FeedForward, importance: Tensor, config: MoEFields) -> None:
    """Copy the neurons of a dense network to the experts that they are dealt to.

    Args:
        network: The mixture.
        dense: The network that it takes the place of.
        importance: Score of each neuron. Shape `(width,)`.
        config: Configuration of the mixture.
    """
    size, shared = config.sizes_for(dense.num_units)
    index = assign_neurons(importance, config.num_experts, size, shared)
    entries = [dense.part("up")] if dense.paths.gate is None else [dense.part("gate"), dense.part("up")]
    down = dense.part("down")
    up = torch.cat([matrix_of(linear) for linear in entries])  # (gates * width, hidden)
    bias = None if down.bias is None else torch.cat([linear.bias for linear in entries])
    tensors: Any = cut_experts(up, bias, matrix_of(down), down.bias, index=index)
    for (weight, weight_bias), (cut, cut_bias) in zip(network.experts.stacks, (tensors[:2], tensors[2:]), strict=True):
        weight.copy_(cut)
        if weight_bias is not None:
            weight_bias.copy_(cut_bias)
