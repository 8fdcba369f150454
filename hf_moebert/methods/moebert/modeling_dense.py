"""The cut of a dense BERT: checks of what it is cut by, and the weights of the experts."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from .configuration_moebert import MoEBertConfig
from .functional import assign_neurons, cut_experts


EXPERT_STACKS = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")


def check_dense(model: Any, name: str) -> None:
    """Refuse a model that is not the dense BERT with the same head, or whose matrices are not dense tensors."""
    wanted = name.replace("MoEBert", "Bert")
    if wanted not in {cls.__name__ for cls in type(model).__mro__} or model.config.is_heterogeneous:
        raise ValueError(
            f"`model` must be a dense {wanted} to become a {name}, got {type(model).__name__}. Load it with "
            f"`{wanted}.from_pretrained`, merge adapters, and convert it before it is shrunk or compiled."
        )
    form = getattr(model, "quantization_method", None)
    if form is not None:
        raise ValueError(
            f"`model` must be dense to be cut into the experts of {name}, but its form is {form!r}. Call "
            "`to_dense(model)` first."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must hold its weights in memory, some are offloaded. Load it without offloading.")


def check_importance(importance: Tensor, expected: tuple[int, int]) -> None:
    """Refuse scores that are not finite, or not one for each neuron, `(layers, intermediate)`."""
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


def load_experts(student: Any, dense: nn.Module, importance: Tensor) -> None:
    """Fill a new MoEBERT with the weights of a dense BERT, cut into experts.

    Args:
        student: The MoEBERT; its gates and tables stay as they were drawn.
        dense: The dense BERT with the same head.
        importance: Score of each neuron. Shape `(layers, intermediate)`.

    Raises:
        ValueError: If body or head have other parts.
    """
    prefix = "" if student.base_model is student else f"{student.base_model_prefix}."
    state = cut_state(dense.state_dict(), importance, student.config, prefix)
    missing, unexpected = student.load_state_dict(state, strict=False)
    missing = without_routing(missing)
    if missing or unexpected:
        raise ValueError(
            f"`model` must have the body and head of a dense {type(student).__name__}, got {type(dense).__name__}: "
            f"missing {missing}, unexpected {unexpected}. Convert with the class that has the same head."
        )


def cut_state(state: dict[str, Tensor], importance: Tensor, config: MoEBertConfig, prefix: str) -> dict[str, Tensor]:
    """Rename and cut the feed-forward weights of a dense state dict, whose names begin with `prefix`."""
    state = dict(state)
    for layer in config.converted_layers:
        name = f"{prefix}encoder.layer.{layer}."
        for part in ("weight", "bias"):
            state[f"{name}moe.LayerNorm.{part}"] = state.pop(f"{name}output.LayerNorm.{part}")

        up, up_bias = (state.pop(f"{name}intermediate.dense.{part}") for part in ("weight", "bias"))
        down, down_bias = (state.pop(f"{name}output.dense.{part}") for part in ("weight", "bias"))
        index = assign_neurons(importance[layer], config.num_experts, config.expert_size, config.num_shared_neurons)
        stacks = cut_experts(up, up_bias, down, down_bias, index=index)
        for stack, tensor in zip(EXPERT_STACKS, stacks, strict=True):
            state[f"{name}moe.experts.{stack}"] = tensor
    return state


def without_routing(names: Collection[str]) -> list[str]:
    """Leave out the names of gates and hash tables, which no dense model has."""
    return [name for name in names if not name.endswith((".gate.weight", "router.table"))]
